// A divergence from K ids a row, with the gradient computed in the forward pass: while a row's logits are
// in cache its sums are made (topk_sums.h), the dense loss's rule runs on its K + 1 small logits, and the
// gradient by these goes back to the logits.
#pragma once

#include "topk.h"

namespace kdkernels::KDK_ISA {

constexpr int64_t kFetchedAhead = 4096;  // fewest classes for which the next row is fetched ahead

// The rule on one row's small logits: its value, and the gradient where one is wanted.
template <class R>
inline void small_row(const cpu::TopKLossProblem& problem, int64_t row) {
  const auto at = [row](const void* numbers, int64_t width) KDK_LAMBDA {
    return numbers ? static_cast<R*>(const_cast<void*>(numbers)) + row * width : nullptr;
  };
  RowProblem one = problem.dense;
  one.rows = 1;
  one.target = nullptr;
  for (Rows* x : {&one.student, &one.teacher, &one.gradient}) x->data = at(x->data, one.classes);
  one.token_weight = at(one.token_weight, 1);
  one.loss = at(one.loss, 1);
  problem.dense_rows(one, [](int64_t count, int64_t, cpu::Task task, void* context) {
    task(context, 0, count);
  });
}

template <class R>
void run_topk_loss_rows(const cpu::TopKLossProblem& problem, int64_t begin, int64_t end) {
  const TopKProblem& rows = problem.rows;
  const bool wanted = rows.gradient.data != nullptr;
  const int64_t blocks = rows.classes / kTopKBlock + 1;
  // Not in the thread's scratch, which the rule uses in between.
  cpu::Buffer buffer(wanted ? sizeof(R) * blocks * kTopKBlock + sizeof(double) * blocks : 0);
  Kept<R> kept;
  if (wanted) {
    kept.values = static_cast<R*>(buffer.data);
    kept.origins = reinterpret_cast<double*>(kept.values + blocks * kTopKBlock);
  }
  R* const values = static_cast<R*>(problem.dense.loss);
  R* const parts = static_cast<R*>(problem.parts);
  const R* const hard_weight = static_cast<const R*>(problem.hard_token_weight);
  R* const hard_upstream = static_cast<R*>(const_cast<void*>(rows.hard_upstream));
  const auto put = [&](int64_t row, R hard, R entropy) KDK_LAMBDA {
    if (parts) {
      parts[row] = values[row];
      parts[rows.rows + row] = hard;
      parts[2 * rows.rows + row] = entropy;
    }
    values[row] += hard;
  };
  with_type(rows.student, [&](auto* student) KDK_LAMBDA {
    using T = std::decay_t<decltype(*student)>;
    T* const gradient = static_cast<T*>(rows.gradient.data);
    for (int64_t i = begin; i < end; ++i) {
      const TopKRow<R> row(rows, i);
      const T* const z = student + rows.student.offset(i);
      if (row.ignored()) {
        values[i] = R(0);
        put(i, R(0), R(0));
        if (wanted) std::memset(gradient + rows.gradient.offset(i), 0, sizeof(T) * rows.classes);
        continue;
      }
      const TopKScratch<R> scratch(rows);
      if (!set_apart(row, scratch)) {
        report(rows.bad, i);
        continue;
      }
      forward_row<R>(row, scratch, z, wanted ? &kept : nullptr);
      small_row<R>(problem, i);
      const R factor = R(problem.hard) * (hard_weight ? hard_weight[i] : R(1));
      const R hard = rows.hard ? R(rules::weighted(row.number(kHard), factor)) : R(0);
      put(i, hard, rows.entropy ? row.number(kEntropy) : R(0));
      if (!wanted) continue;
      if (rows.hard) hard_upstream[i] = factor;
      int64_t next = i + 1;  // what is ignored is not fetched either
      while (next < end && rows.target && rows.target[next] == rows.ignore_index) ++next;
      const bool fetch = next < end && rows.classes >= kFetchedAhead;
      const T* const ahead = fetch ? student + rows.student.offset(next) : nullptr;
      // The rule has had the scratch in between.
      backward_row<R>(row, TopKScratch<R>(rows), z, gradient + rows.gradient.offset(i), ahead, &kept);
    }
  });
}

template <class R>
void run_topk_loss(const cpu::TopKLossProblem& problem, cpu::ParallelFor parallel_for) {
  parallel_for(
      problem.rows.rows, 16384 / problem.rows.classes + 1,
      [](void* opaque, int64_t begin, int64_t end) {
        run_topk_loss_rows<R>(*static_cast<const cpu::TopKLossProblem*>(opaque), begin, end);
      },
      const_cast<cpu::TopKLossProblem*>(&problem));
}

}  // namespace kdkernels::KDK_ISA
