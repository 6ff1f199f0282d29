#include "rows.h"

#include <stdexcept>

#include "common.h"
#include "layout.h"

namespace kdkernels::cuda {

#define KDK_DECLARE(rule)                                              \
  void rule##_row_lanes(const RowTask&, const RowPlan&, void*);        \
  void rule##_row_block(const RowTask&, const RowPlan&, void*);        \
  void rule##_row_cluster(const RowTask&, const RowPlan&, void*);      \
  void rule##_row_stream(const RowTask&, const RowPlan&, void*);       \
  void rule##_row_general(const RowTask&, const RowPlan&, void*);      \
  extern const bool rule##_row_reads_target;
KDK_ROW_RULES(KDK_DECLARE)
#undef KDK_DECLARE

namespace {

using Kernel = void (*)(const RowTask&, const RowPlan&, void*);

struct RowRule {
  const char* name;
  Kernel lanes, block, cluster, stream, general;
  const bool* reads_target;

  Kernel of(Traversal traversal) const {
    switch (traversal) {
      case Traversal::lanes: return lanes;
      case Traversal::block: return block;
      case Traversal::cluster: return cluster;
      case Traversal::stream:
      case Traversal::split: return stream;
      default: return general;
    }
  }
};

constexpr RowRule kRules[] = {
#define KDK_ENTRY(rule)                                                                        \
  {#rule,           rule##_row_lanes,  rule##_row_block, rule##_row_cluster, rule##_row_stream, \
   rule##_row_general, &rule##_row_reads_target},
    KDK_ROW_RULES(KDK_ENTRY)
#undef KDK_ENTRY
};

const RowRule& find(const std::string& name) {
  for (const RowRule& rule : kRules)
    if (name == rule.name) return rule;
  throw std::invalid_argument("rule must be a row loss, got " + name);
}

struct Layout {  // of the workspace
  int64_t counts, partials, exchange, bytes;
  int parts;   // in which another launch counts the valid rows
  bool count;  // whether they count
};

Layout layout(const RowRun& run, const RowPlan& plan) {
  Layout at{};
  int64_t end = 16;  // a ticket
  at.count = run.problem.target && run.reduction == kMean;
  at.parts = at.count && run.problem.rows > kCountedByWarps ? count_parts(run.problem.rows) : 0;
  at.counts = end;
  end += 8 * at.parts;
  at.partials = end;
  if (run.total) end += 8 * int64_t(plan.blocks);
  at.exchange = end;
  if (plan.traversal == Traversal::split)
    end += int64_t(kTeamReductions) * kMostValues * 8 * plan.blocks;
  at.bytes = end;
  return at;
}

}  // namespace

RowShape shape_of(const RowProblem& problem) {
  return shape_of(problem.student, problem.teacher, problem.gradient, problem.rows,
                  problem.classes, !problem.standardize);
}

bool reads_target(const std::string& rule) { return *find(rule).reads_target; }

void expect_divergence_alone(const RowProblem& problem, bool parts) {
  if (problem.hard != 0.0)
    throw std::invalid_argument("hard_weight must be 0 for compiled CUDA kernels, got another");
  if (parts)
    throw std::invalid_argument("return_parts must be False for compiled CUDA kernels, got True");
}

int64_t workspace_bytes(const RowRun& run, const RowPlan& plan) { return layout(run, plan).bytes; }

void run_rows(const std::string& name, const RowRun& run, const RowPlan& plan, char* workspace,
              unsigned* ticket, void* stream) {
  const RowRule& rule = find(name);
  const Layout at = layout(run, plan);
  RowTask task{};
  task.problem = run.problem;
  task.upstream_stride = run.upstream_stride;
  const bool prepared = at.parts || (run.total && !ticket);
  task.ticket = prepared ? reinterpret_cast<unsigned*>(workspace) : ticket;
  if (at.parts) {
    task.counts = reinterpret_cast<int64_t*>(workspace + at.counts);
    task.parts = at.parts;
  } else if (at.count) {
    task.count = true;
  } else if (run.reduction == kMean) {
    task.problem.scale /= double(run.problem.rows);
  }
  if (run.total) {
    task.partials = reinterpret_cast<double*>(workspace + at.partials);
    task.total = run.total;
  }
  task.exchange = workspace + at.exchange;
  if (prepared)
    prepare_rows(run.problem.target, run.problem.rows, run.problem.ignore_index,
                 const_cast<int64_t*>(task.counts), at.parts, task.ticket, stream);
  rule.of(plan.traversal)(task, plan, stream);
}

}  // namespace kdkernels::cuda
