#include "evaluate.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdkernels::cpu {
namespace {

// Sum in a fixed order, in double; by halves, so that the rounding error of a sum of doubles does not grow
// with the number of rows and columns.
template <class R>
double total(const R* values, int64_t count) {
  if (count > 256) return total(values, count / 2) + total(values + count / 2, count - count / 2);
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

// Raises for a class index that is read and is none.
template <class Problem>
void require_class(const Problem& problem, int64_t target) {
  if (target < 0 || target >= problem.classes)
    throw std::invalid_argument("class indices must be in [0, " + std::to_string(problem.classes) +
                                ") or ignore_index=" + std::to_string(problem.ignore_index) +
                                ", got " + std::to_string(target));
}

// A large gradient is fresh memory, and its first touch faults page by page: ask for huge pages.
void expect_writes(const Rows& gradient, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHuge = std::uintptr_t(2) << 20;
  if (!gradient.data || bytes < int64_t(4 * kHuge)) return;
  const std::uintptr_t data = reinterpret_cast<std::uintptr_t>(gradient.data);
  const std::uintptr_t begin = (data + kHuge - 1) / kHuge * kHuge;
  const std::uintptr_t end = (data + std::uintptr_t(bytes)) / kHuge * kHuge;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)gradient;
  (void)bytes;
#endif
}

[[noreturn]] void fail_ids(const TopKProblem& problem) {
  const int64_t* const begin = problem.ids + (problem.bad[0] - 1) * problem.k;
  std::vector<int64_t> ids(begin, begin + problem.k);
  std::sort(ids.begin(), ids.end());
  for (const int64_t id : ids)
    if (id != kAbsent && (id < 0 || id >= problem.classes))
      throw std::invalid_argument("teacher_ids must be in [0, " + std::to_string(problem.classes) +
                                  "), got " + std::to_string(id));
  const auto first = std::upper_bound(ids.begin(), ids.end(), kAbsent);
  throw std::invalid_argument("teacher_ids must be different within a row, got " +
                              std::to_string(*std::adjacent_find(first, ids.end())) + " twice");
}

template <class Problem>
void expect_writes(const Problem& problem) {
  constexpr int64_t kBytes[] = {8, 4, 2, 2};
  expect_writes(problem.gradient,
                problem.rows * problem.classes * kBytes[int(problem.gradient.type)]);
}

}  // namespace

void finish(RowProblem& problem, const Kernels& kernels, int64_t reduction) {
  const bool reads_target = kernels.family == Family::decoupled || problem.hard != 0.0;
  if (reads_target && !problem.target && problem.rows)
    throw std::invalid_argument("target must be a Tensor of class indices, got None");
  int64_t valid = problem.rows;
  if (problem.target) {
    for (int64_t row = 0; row < problem.rows; ++row) {
      const int64_t target = problem.target[row];
      if (target == problem.ignore_index) --valid;
      else if (reads_target) require_class(problem, target);
    }
  }
  if (reduction != kMean || valid == 0) return;
  problem.scale /= double(valid);
  problem.hard /= double(valid);
}

double run(RowProblem& problem, const Kernels& kernels, bool wide, int64_t reduction,
           ParallelFor parallel_for) {
  const auto kernel = wide ? kernels.row_f64 : kernels.row_f32;
  if (!kernel) throw std::invalid_argument("rule must be a row loss, got another family");
  if (problem.rows == 0) return 0.0;
  expect_writes(problem);
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
  expect_writes(problem);
  int64_t counted = 0;
  for (int64_t row = 0; row < problem.rows; ++row) counted += problem.counts(row);
  if (!counted) problem.intra = 0.0;  // columns of nothing
  if (reduction == kMean && counted) {
    problem.inter /= double(counted);
    problem.intra /= double(problem.classes);
  }
  const Buffer values((problem.rows + problem.classes) * (wide ? 8 : 4));
  problem.loss = values.data;
  kernel(problem, parallel_for);
  return total(values.data, problem.rows + problem.classes, wide);
}

namespace {

void require_classes(const TopKProblem& problem) {
  if (problem.hard && !problem.target && problem.rows)
    throw std::invalid_argument("target must be a Tensor of class indices, got None");
  for (int64_t row = 0; problem.hard && row < problem.rows; ++row) {
    const int64_t target = problem.target[row];
    if (target != problem.ignore_index) require_class(problem, target);
  }
}

}  // namespace

void run(TopKProblem& problem, const Kernels& kernels, bool wide, ParallelFor parallel_for) {
  const auto kernel = wide ? kernels.topk_f64 : kernels.topk_f32;
  if (!kernel) throw std::invalid_argument("rule must be of sparse teachers, got another family");
  require_classes(problem);
  if (problem.rows == 0) return;
  if (problem.gradient.data != problem.student.data) expect_writes(problem);
  int64_t bad = 0;
  problem.bad = &bad;
  kernel(problem, parallel_for);
  if (bad) fail_ids(problem);
}

double run(TopKLossProblem& problem, const Kernels& kernels, const Kernels& dense_kernels, bool wide,
           int64_t reduction, ParallelFor parallel_for) {
  const auto kernel = wide ? kernels.topk_loss_f64 : kernels.topk_loss_f32;
  problem.dense_rows = wide ? dense_kernels.row_f64 : dense_kernels.row_f32;
  if (!kernel || !problem.dense_rows)
    throw std::invalid_argument("rule must be a row loss, got another family");
  TopKProblem& rows = problem.rows;
  require_classes(rows);
  if (rows.rows == 0) return 0.0;
  RowProblem& dense = problem.dense;
  int64_t live = 0;
  for (int64_t row = 0; row < rows.rows; ++row)
    live += !rows.target || rows.target[row] != rows.ignore_index;
  if (reduction == kMean && live) {
    dense.scale /= double(live);
    problem.hard /= double(live);
  }
  const int64_t bytes = wide ? 8 : 4, small = rows.rows * (rows.k + 1);
  const Buffer values(rows.rows * bytes), numbers(kTopKNumbers * rows.rows * bytes);
  const Buffer logits(small * bytes), upstream(rows.gradient.data ? small * bytes : 1);
  const Buffer hard_upstream(rows.hard ? rows.rows * bytes : 1);
  const Scalar type = wide ? Scalar::f64 : Scalar::f32;
  dense.classes = rows.k + 1;
  dense.student = contiguous_rows(logits.data, type, rows.rows, dense.classes);
  dense.gradient = dense.student;
  dense.gradient.data = rows.gradient.data ? upstream.data : nullptr;
  dense.temperature = 1.0;
  dense.loss = values.data;
  rows.small = logits.data;
  rows.numbers = numbers.data;
  rows.small_upstream = upstream.data;
  rows.hard_upstream = hard_upstream.data;
  if (rows.gradient.data != rows.student.data) expect_writes(rows);
  int64_t bad = 0;
  rows.bad = &bad;
  kernel(problem, parallel_for);
  if (bad) fail_ids(rows);
  return total(values.data, rows.rows, wide);
}

}  // namespace kdkernels::cpu
