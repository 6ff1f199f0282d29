// What a rule offers for one instruction set.
#pragma once

#include "../problem.h"

namespace kdkernels::cpu {

// torch's thread pool: f(context, begin, end) over [0, count).
using Task = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, Task task, void* context);

// A loss of rows against K ids each: what a row is, and the dense loss of its small logits.
struct TopKLossProblem {
  TopKProblem rows;
  RowProblem dense;  // student, gradient: `rows.small`, `rows.small_upstream`; no mask and no hard term
  void (*dense_rows)(const RowProblem&, ParallelFor);
  double hard;                    // multiplies the cross-entropies
  const void* hard_token_weight;  // factor of each row's cross-entropy in the working type, or null
  void* parts;                    // as of RowProblem
};

// The kernels of one rule for one instruction set; null where the family does not apply.
struct Kernels {
  Family family;
  void (*row_f32)(const RowProblem&, ParallelFor);
  void (*row_f64)(const RowProblem&, ParallelFor);
  void (*correlation_f32)(const CorrelationProblem&, ParallelFor);
  void (*correlation_f64)(const CorrelationProblem&, ParallelFor);
  void (*factors_f32)(const FactorProblem&, ParallelFor);
  void (*factors_f64)(const FactorProblem&, ParallelFor);
  void (*tuples_f32)(const TupleProblem&, ParallelFor);
  void (*tuples_f64)(const TupleProblem&, ParallelFor);
  void (*topk_f32)(const TopKProblem&, ParallelFor);
  void (*topk_f64)(const TopKProblem&, ParallelFor);
  void (*topk_loss_f32)(const TopKLossProblem&, ParallelFor);
  void (*topk_loss_f64)(const TopKLossProblem&, ParallelFor);
};

}  // namespace kdkernels::cpu
