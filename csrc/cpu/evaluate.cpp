#include "evaluate.h"

#include <stdexcept>

#include "scratch.h"

namespace kdkernels::cpu {
namespace {

// Sum in a fixed order, in double.
template <class R>
double total(const R* values, int64_t count) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += double(values[i + k]);
  for (; i < count; ++i) sums[0] += double(values[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

double total(const void* values, int64_t count, bool wide) {
  return wide ? total(static_cast<const double*>(values), count)
              : total(static_cast<const float*>(values), count);
}

[[noreturn]] void fail(const RowProblem& problem, int64_t target) {
  throw std::invalid_argument("target must be in [0, " + std::to_string(problem.classes) +
                              ") or ignore_index=" + std::to_string(problem.ignore_index) +
                              ", got " + std::to_string(target));
}

}  // namespace

Rows contiguous_rows(void* data, Scalar type, int64_t rows, int64_t classes) {
  return {data, type, 1, 1, {rows}, {classes}};
}

void finish(RowProblem& problem, const Kernels& kernels, double scale, int64_t reduction) {
  const bool reads_target = kernels.family == Family::decoupled;
  if (reads_target && !problem.target && problem.rows)
    throw std::invalid_argument("target must be a Tensor of class indices, got None");
  int64_t valid = problem.rows;
  if (problem.target) {
    for (int64_t row = 0; row < problem.rows; ++row) {
      const int64_t target = problem.target[row];
      if (target == problem.ignore_index) --valid;
      else if (reads_target && (target < 0 || target >= problem.classes)) fail(problem, target);
    }
  }
  problem.scale = scale / (reduction == kMean && valid > 0 ? double(valid) : 1.0);
}

double run(RowProblem& problem, const Kernels& kernels, bool wide, int64_t reduction,
           ParallelFor parallel_for) {
  const auto kernel = wide ? kernels.row_f64 : kernels.row_f32;
  if (!kernel) throw std::invalid_argument("rule must be a row loss, got another family");
  if (problem.rows == 0) return 0.0;
  if (reduction == kNone) {
    kernel(problem, parallel_for);
    return 0.0;
  }
  const Buffer values(problem.rows * (wide ? 8 : 4));
  problem.loss = values.data;
  kernel(problem, parallel_for);
  return total(values.data, problem.rows, wide);
}

double run(CorrelationProblem& problem, const Kernels& kernels, bool wide, int64_t reduction,
           ParallelFor parallel_for) {
  const auto kernel = wide ? kernels.correlation_f64 : kernels.correlation_f32;
  if (!kernel) throw std::invalid_argument("rule must be a correlation loss, got another family");
  if (reduction == kNone)
    throw std::invalid_argument("reduction must be 'mean' or 'sum', got 'none'");
  if (problem.rows == 0) return 0.0;
  if (reduction == kMean) {
    problem.inter /= double(problem.rows);
    problem.intra /= double(problem.classes);
  }
  const Buffer values((problem.rows + problem.classes) * (wide ? 8 : 4));
  problem.loss = values.data;
  kernel(problem, parallel_for);
  return total(values.data, problem.rows + problem.classes, wide);
}

}  // namespace kdkernels::cpu
