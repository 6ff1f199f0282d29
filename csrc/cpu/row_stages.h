// What one row (or one vector of rows) carries through its stages, and the stages that are the same for
// every rule: they are compiled once for each instruction set (row_stages.cpp), not once more for each
// rule and type of gradient.
//
// Stages over logits that stay in cache: maxima; exponentials and their sums; value and gradient
// (row_kernel.h). Each is a function of the row's state, so that a driver can run the first stage of a
// later row before the last of an earlier one and hide the latency of the reductions and logarithms
// between them. The exponentials are kept in scratch, so that each class costs two.
#pragma once

#include "modes.h"
#include "problem.h"

namespace kdkernels::KDK_ISA {

// Logits to fetch into cache while the last stage computes; nothing where `data` is null.
struct Ahead {
  const char* data = nullptr;
  int64_t bytes = 0;  // of an element

  template <class R>
  KDK_FN void fetch(int64_t step) const {
    __builtin_prefetch(data + step * kLanes<R> * bytes, 0, 2);
  }
};

// Mean and standard deviation (unbiased) of a row. The mean is centre + rest: rounded to one number it
// would be off by as much as the logits are, and a constant row would seem to vary.
template <class S>
struct Moments {
  S centre, rest, deviation;
};

// A row on its way through the stages. The first group is set by the driver.
template <class M, class R = typename M::Real>
struct RowState {
  using S = typename M::S;
  M mode;
  const R *s, *t;  // logits (after the first stage, where they had to be converted)
  R* exp_s;        // exponentials of the scaled logits; may be the row's gradient, or s
  R* exp_t;        // has room for whole vectors, as `gap` has
  R* gap;          // teacher's scaled logits minus the student's; may be t
  R* exp_hard;     // exponentials at temperature 1, where they are no power of exp_s
  S coefficient;   // multiplies d value / d logits
  S hard_coefficient;  // multiplies d cross-entropy / d logits
  S inverse_temperature;
  Ahead ahead_s{}, ahead_t{};  // the next row

  S max_s, max_t;        // origins of the exponentials
  S scale_s, scale_t;    // 1 / temperature, over the deviation if standardised
  Moments<S> moments_s;
  S spread_s;
  S target_s, target_t;  // scaled logits of the target
  S z_s, z_t;            // sums of the exponentials
  S pivot_gap;           // gap of the student's most likely class, for rules that are not centred
  S hard_target, z_hard;  // logit of the target and sum over the other classes, at temperature 1
  S log_sum;             // sum of the exponentials times their logarithms
  S hard_value{}, entropy{};  // of the last stage: cross-entropy of the target; entropy of q
};

// What does not change from row to row.
template <class R>
struct Temperature {
  R inverse;
  Exponential<R> exponential;
  bool of_row;    // the exponentials' factors differ by row
  bool hard, entropy;
  int squarings;  // which make the exponentials those at temperature 1; -1: they are no such power

  KDK_FN explicit Temperature(const RowProblem& problem)
      : inverse(R(1.0 / problem.temperature)),
        exponential(splat<R>(inverse)),
        of_row(problem.standardize || problem.row_temperature),
        hard(problem.hard != 0.0),
        entropy(problem.parts) {
    const double t = of_row ? 0.0 : problem.temperature;
    squarings = t == 1.0 ? 0 : t == 2.0 ? 1 : t == 4.0 ? 2 : -1;
  }
};

// The gradient of the target's cross-entropy at temperature 1: factor times the exponentials of the
// other classes, and minus their sum at the target, where 1 - probability would cancel.
template <class M, class R = typename M::Real>
struct HardTerm {
  const R* from = nullptr;  // null where there is none
  int squarings = 0;
  typename M::S of_target{};
  typename M::V factor{}, at_target{};

  KDK_FN explicit operator bool() const { return from; }
  template <bool kPart>
  KDK_FN typename M::V get(const M& mode, int64_t step) const {
    typename M::V e = mode.template get<kPart>(from, step, R(0));
    for (int i = 0; i < squarings; ++i) e *= e;
    e *= factor;
    mode.replace(step, e, at_target);
    return e;
  }
};

// Stage 1: maxima over the classes of the softmax, and the scale. The logits of row `number` are at row.s
// and row.t afterwards, which have room in scratch where they do not lie in the working type.
template <bool kDecoupled, class R>
void find_maxima(RowState<ByClass<R>>& row, const RowProblem& problem,
                 const Temperature<R>& temperature, int64_t number, R* scratch_s, R* scratch_t);
// Likewise of rows across the lanes, which are in scratch.
template <bool kDecoupled, class R>
void find_maxima(RowState<ByRow<R>>& row, const RowProblem& problem,
                 const Temperature<R>& temperature);

// Stage 2: exponentials and their sums; and the gap of the class (any of them) at the student's maximum.
template <bool kDecoupled, bool kCentred, class M, class R = typename M::Real>
void exponentiate(RowState<M>& row, const Temperature<R>& temperature);

// log(z_t / z_s). Where both rows are certain, the sums without the largest class keep the digits that
// 1 + x loses, and with them d of the likeliest class is exact, of which 1 - p is all that matters.
template <class M>
typename M::S log_ratio_of_sums(const RowState<M>& row, const typename M::S& inverse_s);

// Cross-entropy of the target at temperature 1, from the log-odds of the other classes against it.
template <class M, class R = typename M::Real>
HardTerm<M> hard_term(RowState<M>& row, const Temperature<R>& temperature);

// Entropy of the classes of the softmax, from sum e log e.
template <class M>
typename M::S entropy_of(const RowState<M>& row);

// The softmax's derivative takes the mean slope off: gradient -= pull * exp_s.
template <bool kDecoupled, class M, class R = typename M::Real>
void project(const RowState<M>& row, R* gradient, const typename M::S& pull,
             const typename M::V& at_target, const HardTerm<M>& hard);

// The part of the gradient that flows through the student's deviation; then that of the cross-entropy,
// which reads the logits as they are.
template <class M, class R = typename M::Real>
void through_deviation(const RowState<M>& row, R* gradient, const HardTerm<M>& hard);

}  // namespace kdkernels::KDK_ISA
