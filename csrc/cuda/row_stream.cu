// Rows of any length by a block each, read twice; and, where there are few rows, by several blocks
// each, which meet at the barriers of a cooperative grid.
#include "launch.cuh"
#include "row.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

template <class T>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1)
    row_stream(KDK_PARAMETER RowTask task, KDK_PARAMETER bool vector) {
  Block group;
  walk_rows<Rule, float, false>(task, group, block_index(), 0, block_count(),
                                [&](int64_t row, bool valid) {
                                  return Streamed<T>(RowPointers<T>(task.problem, row),
                                                     task.problem.classes, vector, valid,
                                                     group.rank(), group.size());
                                });
}

// As many teams of blocks as rows.
template <class T>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1)
    row_split(KDK_PARAMETER RowTask task, KDK_PARAMETER bool vector, KDK_PARAMETER int team) {
  Team group(task.exchange, team);
  walk_rows<Rule, float, false>(task, group, 0, block_index() / team, block_count() / team,
                                [&](int64_t row, bool valid) {
                                  return Streamed<T>(RowPointers<T>(task.problem, row),
                                                     task.problem.classes, vector, valid,
                                                     group.rank(), group.size());
                                });
}

template <class T>
void run(const RowTask& task, const RowPlan& plan, void* stream) {
  LaunchShape shape{plan.blocks, plan.threads, 1, size_t(plan.shared), false};
  if (plan.traversal == Traversal::stream)
    return launch<row_stream<T>>(shape, stream, task, plan.vector);
  shape.cooperative = true;
  launch<row_split<T>>(shape, stream, task, plan.vector, plan.cluster);
}

}  // namespace

void KDK_JOIN(KDK_RULE, _row_stream)(const RowTask& task, const RowPlan& plan, void* stream) {
  with_type(task.problem.student.type,
            [&](auto of) { run<typename decltype(of)::type>(task, plan, stream); });
}

}  // namespace kdkernels::cuda
