// What a thread keeps for its rows, and a row's factors and values.
#pragma once

#include "binary.h"
#include "row_kernel.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {

// A thread's scratch, `count` values each, for `sets` rows at once.
template <class R>
struct Scratch {
  static constexpr int kArrays = 7;
  R* base;
  int64_t count;
  bool logits_read_again;

  KDK_FN Scratch(int64_t count, int sets, bool logits_read_again)
      : base(static_cast<R*>(cpu::scratch(sizeof(R) * kArrays * count * sets))),
        count(count),
        logits_read_again(logits_read_again) {}

  // Arrays whose content is dead by the time another is written share memory: the exponentials and
  // the gradient take the place of the logits, unless the rule reads those again.
  KDK_FN R* student(int set) const { return base + (kArrays * set) * count; }
  KDK_FN R* teacher(int set) const { return base + (kArrays * set + 1) * count; }
  KDK_FN R* gradient(int set) const {
    return logits_read_again ? base + (kArrays * set + 3) * count : student(set);
  }
  // What no later stage of another row reads may be that of the set `shared`.
  template <class M>
  KDK_FN void give(RowState<M>& row, int set, int shared) const {
    R* const own = base + kArrays * shared * count;
    row.exp_t = own + 2 * count;
    row.exp_s = logits_read_again ? own + 4 * count : student(set);
    row.gap = logits_read_again ? own + 5 * count : teacher(set);
    row.exp_hard = own + 6 * count;
  }
};

template <class Rule>
KDK_FN bool reads_logits_again(const RowProblem& problem) {
  if constexpr (kBinary<Rule>) return false;
  else return problem.standardize || !rules::PointwiseOf<Rule>::type::centred;
}

// A row's number, or that of all rows.
template <class R>
KDK_FN R of_row(const void* numbers, int64_t row, R otherwise) {
  return numbers ? static_cast<const R*>(numbers)[row] : otherwise;
}

// What multiplies a row's divergence and its cross-entropy, and 1 / temperature.
template <class R>
struct RowFactors {
  R value, hard, upstream, inverse_temperature;

  KDK_FN RowFactors(const RowProblem& problem, const Temperature<R>& temperature, int64_t row)
      : value(R(problem.scale) * of_row<R>(problem.token_weight, row, R(1))),
        hard(R(problem.hard) * of_row<R>(problem.hard_token_weight, row, R(1))),
        upstream(of_row<R>(problem.upstream, row, R(1))),
        inverse_temperature(problem.row_temperature
                                ? R(1) / of_row<R>(problem.row_temperature, row, R(1))
                                : temperature.inverse) {}
};

// The values of a row of the loss and of its parts.
template <class R>
KDK_FN void put_values(const RowProblem& problem, int64_t row, R value, R hard, R entropy) {
  static_cast<R*>(problem.loss)[row] = value + hard;
  if (!problem.parts) return;
  R* const parts = static_cast<R*>(problem.parts);
  parts[row] = value;
  parts[problem.rows + row] = hard;
  parts[2 * problem.rows + row] = entropy;
}

}  // namespace kdkernels::KDK_ISA
