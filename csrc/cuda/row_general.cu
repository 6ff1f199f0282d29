// Rows of any dtypes and strides, in float or double, with or without standardisation: by a thread
// each where neighbouring rows lie next to each other (NCHW), else by a warp or a block.
#include "launch.cuh"
#include "row.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

template <class R, class T, class Group>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1) row_general(KDK_PARAMETER RowTask task) {
  Group group;
  const int rows = thread_count() / group.size();
  walk_rows<Rule, R, true>(task, group, int64_t(block_index()) * rows,
                           thread_index() / group.size(), int64_t(block_count()) * rows,
                           [&](int64_t row, bool valid) {
                             return General<R, T>(task.problem, row, valid, group.rank(),
                                               group.size());
                           });
}

template <class R, class T>
void run(const RowTask& task, const RowPlan& plan, void* stream) {
  const LaunchShape shape{plan.blocks, plan.threads, 1, size_t(plan.shared), false};
  switch (plan.lanes) {
    case 1: return launch<row_general<R, T, Alone>>(shape, stream, task);
    case 32: return launch<row_general<R, T, Lanes<32>>>(shape, stream, task);
    default: return launch<row_general<R, T, Block>>(shape, stream, task);
  }
}

}  // namespace

extern const bool KDK_JOIN(KDK_RULE, _row_reads_target);
const bool KDK_JOIN(KDK_RULE, _row_reads_target) = Rule::family == Family::decoupled;

void KDK_JOIN(KDK_RULE, _row_general)(const RowTask& task, const RowPlan& plan, void* stream) {
  const Scalar s = task.problem.student.type, t = task.problem.teacher.type;
  if (s == Scalar::f64 || t == Scalar::f64) return run<double, void>(task, plan, stream);
  if (s != t) return run<float, void>(task, plan, stream);
  with_type(s, [&](auto of) { run<float, typename decltype(of)::type>(task, plan, stream); });
}

}  // namespace kdkernels::cuda
