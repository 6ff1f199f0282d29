// Rows of any dtypes and strides, in float or double, with or without standardisation: by a thread
// each where neighbouring rows lie next to each other (NCHW), else by a warp or a block.
#include "launch.cuh"
#include "row.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

template <class R, class Group>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1) row_general(KDK_PARAMETER RowTask task) {
  Group group;
  const int rows = thread_count() / group.size();
  walk_rows<Rule, R, true>(task, group, int64_t(block_index()) * rows,
                           thread_index() / group.size(), int64_t(block_count()) * rows,
                           [&](int64_t row, bool valid) {
                             return General<R>(task.problem, row, valid, group.rank(),
                                               group.size());
                           });
}

template <class R>
void run(const RowTask& task, const RowPlan& plan, void* stream) {
  const LaunchShape shape{plan.blocks, plan.threads, 1, size_t(plan.shared), false};
  switch (plan.lanes) {
    case 1: return launch<row_general<R, Alone>>(shape, stream, task);
    case 32: return launch<row_general<R, Lanes<32>>>(shape, stream, task);
    default: return launch<row_general<R, Block>>(shape, stream, task);
  }
}

}  // namespace

extern const bool KDK_JOIN(KDK_RULE, _row_reads_target);
const bool KDK_JOIN(KDK_RULE, _row_reads_target) = Rule::family == Family::decoupled;

void KDK_JOIN(KDK_RULE, _row_general)(const RowTask& task, const RowPlan& plan, void* stream) {
  const bool wide = task.problem.student.type == Scalar::f64 ||
                    task.problem.teacher.type == Scalar::f64;
  wide ? run<double>(task, plan, stream) : run<float>(task, plan, stream);
}

}  // namespace kdkernels::cuda
