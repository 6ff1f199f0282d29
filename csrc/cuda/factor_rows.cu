// Factors against the teacher's (IE-KD), a sample for a warp or a block: both students share the
// sweeps, so the teacher is read once, and everything is read once where it fits registers.
#include "factor.cuh"
#include "launch.cuh"
#include "totals.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

// All samples of a block's groups, one a group at a time.
template <bool kCosine, class R, class Group, class MakeSource>
KDK_DEVICE void walk_samples(const FactorTask& task, Group& group, const MakeSource& make_source) {
  const R upstream = task.upstream ? *static_cast<const R*>(task.upstream) : R(1);
  const int groups = thread_count() / group.size();
  const int64_t step = int64_t(block_count()) * groups;
  double total = 0;
  for (int64_t row = int64_t(block_index()) * groups + thread_index() / group.size();
       row < task.problem.samples; row += step) {
    auto source = make_source(row);
    const double value = process_sample<Rule, kCosine>(task.problem, upstream, source, group);
    if (group.rank() == 0) total += value;
  }
  if (task.partials) add_up<R>(total, task.partials, task.ticket, task.total);
}

template <bool kCosine, class T, int kElements>
KDK_KERNEL void KDK_BOUNDS(kFactorWarpThreads, (kElements == 16 ? 3 : 5))
    factor_lanes(KDK_PARAMETER FactorTask task) {
  Lanes<32> group;
  walk_samples<kCosine, float>(task, group, [&](int64_t row) {
    return FactorRegisters<T, kElements>(task.problem, row, group.rank(), kWarp);
  });
}

template <bool kCosine, class T, int kElements>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1)
    factor_block(KDK_PARAMETER FactorTask task) {
  Block group;
  walk_samples<kCosine, float>(task, group, [&](int64_t row) {
    return FactorRegisters<T, kElements>(task.problem, row, group.rank(), group.size());
  });
}

template <bool kCosine, class T>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1) factor_stream(KDK_PARAMETER FactorTask task) {
  Block group;
  walk_samples<kCosine, float>(task, group, [&](int64_t row) {
    return FactorStream<T>(task.problem, row, group.rank(), group.size());
  });
}

template <bool kCosine, class R, class Group>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1) factor_general(KDK_PARAMETER FactorTask task) {
  Group group;
  walk_samples<kCosine, R>(task, group, [&](int64_t row) {
    return FactorGeneral<R>(task.problem, row, group.rank(), group.size());
  });
}

template <bool kCosine, class R>
void run_general(const FactorTask& task, const LaunchShape& shape, bool warps, void* stream) {
  if (warps) return launch<factor_general<kCosine, R, Lanes<32>>>(shape, stream, task);
  launch<factor_general<kCosine, R, Block>>(shape, stream, task);
}

template <bool kCosine, class T>
void run_dense(const FactorTask& task, const FactorPlan& plan, const LaunchShape& shape,
               void* stream) {
  constexpr int kFew = kFactorBlockElements, kMany = 2 * kFactorBlockElements;
  const bool many = plan.elements == 16;
  switch (plan.traversal) {
    case FactorTraversal::lanes:
      if (many) return launch<factor_lanes<kCosine, T, 16>>(shape, stream, task);
      return launch<factor_lanes<kCosine, T, 8>>(shape, stream, task);
    case FactorTraversal::block:
      if (many) return launch<factor_block<kCosine, T, kMany>>(shape, stream, task);
      return launch<factor_block<kCosine, T, kFew>>(shape, stream, task);
    default: return launch<factor_stream<kCosine, T>>(shape, stream, task);
  }
}

template <bool kCosine>
void run(const FactorTask& task, const FactorPlan& plan, void* stream) {
  const FactorProblem& problem = task.problem;
  const LaunchShape shape{plan.blocks, plan.threads, 1, size_t(plan.shared), false};
  if (plan.traversal == FactorTraversal::general) {
    const bool wide = problem.inheritance.type == Scalar::f64 ||
                      problem.exploration.type == Scalar::f64 ||
                      problem.teacher.type == Scalar::f64;
    return wide ? run_general<kCosine, double>(task, shape, plan.lanes == 32, stream)
                : run_general<kCosine, float>(task, shape, plan.lanes == 32, stream);
  }
  switch (problem.teacher.type) {
    case Scalar::f16: return run_dense<kCosine, f16>(task, plan, shape, stream);
    case Scalar::bf16: return run_dense<kCosine, bf16>(task, plan, shape, stream);
    default: return run_dense<kCosine, float>(task, plan, shape, stream);
  }
}

}  // namespace

void KDK_JOIN(KDK_RULE, _factor_rows)(const FactorTask& task, const FactorPlan& plan,
                                      void* stream) {
  task.problem.cosine ? run<true>(task, plan, stream) : run<false>(task, plan, stream);
}

}  // namespace kdkernels::cuda
