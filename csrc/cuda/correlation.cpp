#include "correlation.h"

#include <cstdint>
#include <stdexcept>

#include "layout.h"

namespace kdkernels::cuda {

#define KDK_DECLARE(rule)                                                                        \
  void rule##_correlation_tile(const CorrelationTask&, const CorrelationPlan&, void*);           \
  void rule##_correlation_columns(const CorrelationTask&, const CorrelationPlan&, void*);        \
  void rule##_correlation_stream(const CorrelationTask&, const CorrelationPlan&, void*);         \
  void rule##_correlation_slices(const CorrelationTask&, const CorrelationPlan&, void*);
KDK_CORRELATION_RULES(KDK_DECLARE)
#undef KDK_DECLARE

namespace {

using Kernel = void (*)(const CorrelationTask&, const CorrelationPlan&, void*);

struct CorrelationRule {
  const char* name;
  Kernel tile, stream, columns, slices;

  Kernel of(CorrelationTraversal traversal) const {
    switch (traversal) {
      case CorrelationTraversal::stream: return stream;
      case CorrelationTraversal::columns: return columns;
      case CorrelationTraversal::slices: return slices;
      default: return tile;
    }
  }
};

constexpr CorrelationRule kRules[] = {
#define KDK_ENTRY(rule) \
  {#rule, rule##_correlation_tile, rule##_correlation_stream, rule##_correlation_columns, \
   rule##_correlation_slices},
    KDK_CORRELATION_RULES(KDK_ENTRY)
#undef KDK_ENTRY
};

const CorrelationRule& find(const std::string& name) {
  for (const CorrelationRule& rule : kRules)
    if (name == rule.name) return rule;
  throw std::invalid_argument("rule must be a correlation loss, got " + name);
}

struct Layout {  // of the workspace
  int64_t counts, sums, ticket, columns, rows, partials, bytes;
  bool in_gradient;  // the partial moments are kept where the gradient will be
};

// Numbers that a traversal keeps of each row.
int row_terms(CorrelationTraversal traversal, bool need_gradient) {
  switch (traversal) {
    case CorrelationTraversal::stream: return 6;
    case CorrelationTraversal::columns:
    case CorrelationTraversal::slices: return need_gradient ? 6 : 0;
    default: return 0;
  }
}

Layout layout(const CorrelationRun& run, const CorrelationPlan& plan) {
  const CorrelationProblem& problem = run.problem;
  const bool wide = is_wide(problem.student, problem.teacher);
  const int64_t real = wide ? 8 : 4;
  const int64_t partials = kMoments * real * plan.parts * problem.classes;
  Layout at{};
  // The gradient is dense and private, and written only when all have read the moments: it lends its
  // memory, which keeps the peak at one gradient.
  at.in_gradient =
      problem.gradient.data &&
      partials <= problem.rows * problem.classes * element_bytes(problem.gradient.type) &&
      reinterpret_cast<std::uintptr_t>(problem.gradient.data) % 16 == 0;
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + 15) / 16 * 16;
    return begin;
  };
  at.counts = take(8 * int64_t(plan.parts));
  const bool slices = plan.traversal == CorrelationTraversal::slices;
  at.sums = take(8 * (int64_t(plan.blocks) + (slices ? plan.groups : 0)));
  at.ticket = take(slices ? 4 : 0);
  at.columns = take(4 * real * problem.classes);
  at.rows = take(row_terms(plan.traversal, problem.gradient.data != nullptr) * real * problem.rows);
  at.partials = take(at.in_gradient ? 0 : partials);
  at.bytes = end;
  return at;
}

}  // namespace

RowShape shape_of(const CorrelationProblem& problem) {
  return shape_of(problem.student, problem.teacher, problem.gradient, problem.rows,
                  problem.classes, true);
}

int64_t workspace_bytes(const CorrelationRun& run, const CorrelationPlan& plan) {
  return layout(run, plan).bytes;
}

void run_correlation(const std::string& name, const CorrelationRun& run,
                     const CorrelationPlan& plan, char* workspace, void* stream) {
  const CorrelationRule& rule = find(name);
  if (run.problem.counted)
    throw std::invalid_argument("counted must be None for compiled CUDA kernels, got a Tensor");
  const Layout at = layout(run, plan);
  CorrelationTask task{};
  task.problem = run.problem;
  if (run.reduction == kMean) {
    task.problem.inter /= double(run.problem.rows);
    task.problem.intra /= double(run.problem.classes);
  }
  task.upstream = run.upstream;
  task.total = run.total;
  task.rows = workspace + at.rows;
  task.partials = at.in_gradient ? run.problem.gradient.data : workspace + at.partials;
  task.counts = reinterpret_cast<int64_t*>(workspace + at.counts);
  task.columns = workspace + at.columns;
  task.sums = reinterpret_cast<double*>(workspace + at.sums);
  task.ticket = reinterpret_cast<unsigned*>(workspace + at.ticket);
  rule.of(plan.traversal)(task, plan, stream);
}

}  // namespace kdkernels::cuda
