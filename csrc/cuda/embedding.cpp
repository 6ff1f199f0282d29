#include "embedding.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "common.h"
#include "layout.h"

namespace kdkernels::cuda {

#define KDK_DECLARE(rule) void rule##_factor_rows(const FactorTask&, const FactorPlan&, void*);
KDK_FACTOR_RULES(KDK_DECLARE)
#undef KDK_DECLARE
#define KDK_DECLARE(rule) \
  void rule##_tuple_pairs(const TupleTask&, const TuplePlan&, bool wide, void*);
KDK_TUPLE_RULES(KDK_DECLARE)
#undef KDK_DECLARE

namespace {

template <class Kernel>
struct NamedKernel {
  const char* name;
  Kernel run;
};
using FactorKernel = void (*)(const FactorTask&, const FactorPlan&, void*);
using TupleKernel = void (*)(const TupleTask&, const TuplePlan&, bool, void*);

constexpr NamedKernel<FactorKernel> kFactorRules[] = {
#define KDK_ENTRY(rule) {#rule, rule##_factor_rows},
    KDK_FACTOR_RULES(KDK_ENTRY)
#undef KDK_ENTRY
};
constexpr NamedKernel<TupleKernel> kTupleRules[] = {
#define KDK_ENTRY(rule) {#rule, rule##_tuple_pairs},
    KDK_TUPLE_RULES(KDK_ENTRY)
#undef KDK_ENTRY
};

template <class Rules>
auto find(const Rules& rules, const std::string& name) {
  for (const auto& rule : rules)
    if (name == rule.name) return rule.run;
  throw std::invalid_argument("rule must be an embedding loss, got " + name);
}

FactorPlan by_warps(FactorTraversal traversal, int32_t elements, const FactorShape& shape,
                    const Device& device) {
  const int64_t blocks = ceil_divide(shape.samples, kFactorWarpThreads / 32);
  return {traversal, 32, elements, kFactorWarpThreads, blocks_for(blocks, device), kBlockShared};
}
FactorPlan by_blocks(FactorTraversal traversal, int32_t elements, int64_t threads,
                     const FactorShape& shape, const Device& device) {
  return {traversal, 0, elements, int32_t(threads), blocks_for(shape.samples, device), kBlockShared};
}

constexpr int64_t kMostInLanes = 32 * 16;
constexpr int64_t kMostInBlock = kBlockThreads * 2 * kFactorBlockElements;

FactorPlan by_lanes(const FactorShape& shape, const Device& device) {
  return by_warps(FactorTraversal::lanes, shape.width <= 256 ? 8 : 16, shape, device);
}
FactorPlan by_block(const FactorShape& shape, const Device& device) {
  // Few samples: more threads answer sooner. Many: two smaller blocks share a multiprocessor, and
  // one loads while the other computes.
  const bool longer = shape.width > kBlockThreads * kFactorBlockElements ||
                      (shape.width >= 2048 && shape.samples > device.multiprocessors);
  const int32_t elements = kFactorBlockElements * (longer ? 2 : 1);
  const int64_t threads = round_up(ceil_divide(shape.width, elements), 128);
  return by_blocks(FactorTraversal::block, elements, threads, shape, device);
}
FactorPlan by_stream(const FactorShape& shape, const Device& device) {
  return by_blocks(FactorTraversal::stream, 0, kBlockThreads, shape, device);
}
FactorPlan by_general(const FactorShape& shape, const Device& device) {
  return shape.width <= 1024
             ? by_warps(FactorTraversal::general, 0, shape, device)
             : by_blocks(FactorTraversal::general, 0, kBlockThreads, shape, device);
}

int64_t of_one_anchor(int64_t batch, bool wide) {
  return round_up(batch * (kTupleColumnArrays * (wide ? 8 : 4) + 4), 16);
}

struct TupleLayout {  // of the workspace
  int64_t tuples, scratch, bytes;
};
TupleLayout layout(int64_t batch, const TuplePlan& plan) {
  const int64_t scratch = round_up(16 * batch, 16);
  return {8 * batch, scratch, scratch + plan.scratch * plan.blocks};
}

}  // namespace

FactorShape shape_of(const FactorProblem& problem) {
  FactorShape shape{problem.samples, problem.width, problem.teacher.type != Scalar::f64};
  for (const Rows* x : {&problem.inheritance, &problem.exploration, &problem.teacher,
                        &problem.inheritance_gradient, &problem.exploration_gradient}) {
    if (!x->data) continue;
    shape.aligned = shape.aligned && x->type == problem.teacher.type && x->class_stride == 1 &&
                    whole_packs(*x, problem.width);
  }
  return shape;
}

FactorPlan plan_factors(const FactorShape& shape, const Device& device) {
  if (!shape.aligned) return by_general(shape, device);
  if (shape.width <= kMostInLanes) return by_lanes(shape, device);
  if (shape.width <= kMostInBlock) return by_block(shape, device);
  return by_stream(shape, device);
}

FactorPlan plan_factors_as(FactorTraversal traversal, const FactorShape& shape,
                           const Device& device) {
  switch (traversal) {
    case FactorTraversal::lanes:
      if (shape.aligned && shape.width <= kMostInLanes) return by_lanes(shape, device);
      break;
    case FactorTraversal::block:
      if (shape.aligned && shape.width <= kMostInBlock) return by_block(shape, device);
      break;
    case FactorTraversal::stream:
      if (shape.aligned) return by_stream(shape, device);
      break;
    case FactorTraversal::general: return by_general(shape, device);
  }
  throw std::invalid_argument("traversal must be able to walk these samples");
}

bool fits(const FactorPlan& plan, const FactorShape& shape, const Device& device) {
  const bool good = plan.threads % 32 == 0 && plan.threads >= 32 && plan.threads <= kBlockThreads &&
                    plan.blocks >= 1 && plan.shared >= kBlockShared &&
                    plan.shared <= device.block_shared && (plan.lanes == 32 || plan.lanes == 0);
  switch (plan.traversal) {
    case FactorTraversal::lanes:
      return good && plan.lanes == 32 && plan.threads == kFactorWarpThreads &&
             32 * plan.elements >= shape.width && shape.aligned;
    case FactorTraversal::block:
      return good && plan.lanes == 0 && shape.aligned &&
             int64_t(plan.threads) * plan.elements >= shape.width;
    case FactorTraversal::stream: return good && plan.lanes == 0 && shape.aligned;
    case FactorTraversal::general: return good;
  }
  return false;
}

int64_t workspace_bytes(const FactorRun& run, const FactorPlan& plan) {
  return 16 + (run.total ? 8 * int64_t(plan.blocks) : 0);
}

void run_factors(const std::string& rule, const FactorRun& run, const FactorPlan& plan,
                 char* workspace, unsigned* ticket, void* stream) {
  const auto kernel = find(kFactorRules, rule);
  FactorTask task{run.problem, run.upstream, nullptr, nullptr, run.total};
  const double divisor = (task.problem.cosine ? 1.0 : double(task.problem.width)) *
                         (run.reduction == kMean ? double(task.problem.samples) : 1.0);
  task.problem.inheritance_weight /= divisor;
  task.problem.exploration_weight /= divisor;
  if (run.total) {
    task.partials = reinterpret_cast<double*>(workspace + 16);
    task.ticket = ticket ? ticket : reinterpret_cast<unsigned*>(workspace);
    if (!ticket) prepare_rows(nullptr, 0, 0, nullptr, 0, task.ticket, stream);
  }
  kernel(task, plan, stream);
}

TuplePlan plan_tuples(int64_t batch, bool wide, bool gradient, const Device& device) {
  const int64_t threads =
      std::min<int64_t>(std::max<int64_t>(round_up(batch, 32), 128), kBlockThreads);
  const int64_t fixed = kBlockExchange + kTupleScanBytes, arrays = of_one_anchor(batch, wide);
  TuplePlan plan{int32_t(threads), blocks_for(batch, device), int32_t(fixed), 0, 1};
  if (fixed + arrays <= device.block_shared) {
    plan.shared = int32_t(fixed + arrays);
  } else {
    plan.scratch = arrays;
    plan.blocks = int32_t(std::min<int64_t>(batch, 2 * device.multiprocessors));
  }
  // Each adds up all anchors' tuples again, so that there are no more than can run at once.
  if (gradient) {
    const int64_t wanted = ceil_divide(batch * batch, kClosingThreads * 16);
    plan.closing_blocks = int32_t(std::min<int64_t>(wanted, 2 * device.multiprocessors));
  }
  return plan;
}

int64_t workspace_bytes(const TupleRun& run, const TuplePlan& plan) {
  return layout(run.problem.batch, plan).bytes;
}

void run_tuples(const std::string& rule, const TupleRun& run, const TuplePlan& plan,
                char* workspace, void* stream) {
  const auto kernel = find(kTupleRules, rule);
  const TupleLayout at = layout(run.problem.batch, plan);
  TupleTask task{run.problem, run.scale, run.reduction == kMean, run.total, nullptr, plan.scratch};
  task.problem.loss = reinterpret_cast<double*>(workspace);
  task.problem.tuples = reinterpret_cast<int64_t*>(workspace + at.tuples);
  if (plan.scratch) task.scratch = workspace + at.scratch;
  kernel(task, plan, run.wide, stream);
}

}  // namespace kdkernels::cuda
