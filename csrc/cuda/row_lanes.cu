// Rows of up to 1024 classes, each in the registers of 8 or 32 lanes: read once.
#include "launch.cuh"
#include "row.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

// Blocks on a multiprocessor, as far as the registers of a row allow.
template <class T>
constexpr int lane_blocks(int elements) {
  if (elements < 32) return 4;
  return sizeof(T) == 2 || Rule::family == Family::decoupled ? 2 : 3;
}

template <class T, int kLanes, int kElements>
KDK_KERNEL void KDK_BOUNDS(kLaneThreads, lane_blocks<T>(kElements))
    row_lanes(KDK_PARAMETER RowTask task, KDK_PARAMETER bool vector) {
  Lanes<kLanes> group;
  const int rows = kLaneThreads / kLanes;
  walk_rows<Rule, float, false>(
      task, group, int64_t(block_index()) * rows, thread_index() / kLanes,
      int64_t(block_count()) * rows, [&](int64_t row, bool valid) {
        return Registers<T, kElements>(RowPointers<T>(task.problem, row), int(task.problem.classes),
                                       vector, valid, group.rank(), kLanes);
      });
}

template <class T>
void run(const RowTask& task, const RowPlan& plan, void* stream) {
  const LaunchShape shape{plan.blocks, plan.threads, 1, size_t(plan.shared), false};
  if (plan.lanes == 8) return launch<row_lanes<T, 8, 8>>(shape, stream, task, plan.vector);
  switch (plan.elements) {
    case 8: return launch<row_lanes<T, 32, 8>>(shape, stream, task, plan.vector);
    case 16: return launch<row_lanes<T, 32, 16>>(shape, stream, task, plan.vector);
    default: return launch<row_lanes<T, 32, 32>>(shape, stream, task, plan.vector);
  }
}

}  // namespace

void KDK_JOIN(KDK_RULE, _row_lanes)(const RowTask& task, const RowPlan& plan, void* stream) {
  with_type(task.problem.student.type,
            [&](auto of) { run<typename decltype(of)::type>(task, plan, stream); });
}

}  // namespace kdkernels::cuda
