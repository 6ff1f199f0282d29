// Rows of up to 8192 classes, each in the registers of a block: read once.
#include "launch.cuh"
#include "row.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

template <class T>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1)
    row_block(KDK_PARAMETER RowTask task, KDK_PARAMETER bool vector) {
  Block group;
  walk_rows<Rule, float, false>(
      task, group, block_index(), 0, block_count(), [&](int64_t row, bool valid) {
        return Registers<T, kBlockElements>(RowPointers<T>(task.problem, row), int(task.problem.classes),
                                       vector, valid, group.rank(), group.size());
      });
}

template <class T>
void run(const RowTask& task, const RowPlan& plan, void* stream) {
  launch<row_block<T>>({plan.blocks, plan.threads, 1, size_t(plan.shared), false}, stream, task,
                       plan.vector);
}

}  // namespace

void KDK_JOIN(KDK_RULE, _row_block)(const RowTask& task, const RowPlan& plan, void* stream) {
  with_type(task.problem.student.type,
            [&](auto of) { run<typename decltype(of)::type>(task, plan, stream); });
}

}  // namespace kdkernels::cuda
