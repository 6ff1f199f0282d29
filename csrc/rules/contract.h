// What a rule of the divergence, the decoupled or the binary family gives, and what the traversals may rely on.
// Its Triton twin is kdkernels/triton/contract.py; tests/test_rules.py tries both on every rule.
//
//   struct Rule {
//     static constexpr Family family = Family::divergence;
//     static constexpr bool centred = ...;
//     template <class F> KDK_FN static void
//     pointwise(const Options&, const F& p, const F& q, const F& d, F& value, F& slope);
//   };
//
// pointwise: one class, from the probabilities p of the teacher and q of the student and
// d = log p - log q. The loss of a row is the sum of the values; slope = d value / d log q, and the
// traversal makes k (slope - q sum(slope)) of it, the gradient by the logits.
//
//   everywhere   value >= 0, so that nothing cancels in the sum: a term that sums to 0 over the classes,
//                such as q - p, may be added to that end (and its derivative to the slope).
//   p = q, d = 0   value = 0. Near it value and slope keep their relative accuracy, which d has too:
//                it is computed before anything is rounded, and p - q is not.
//   p = 0        d is -inf, or any number where p underflows, or NaN where q = 0 too.
//   q = 0        d is +inf, or any number where q underflows. The slope is finite; value and slope are 0
//                where p = 0 too.
//   NaN          NaN in p and q gives NaN.
//
// centred: whether the slopes of a row sum to 0 by construction. If not, the traversal takes off the
// pivot, the slope per q of the student's most likely class, from all classes before it projects: the
// gradient stays the same, and what cancels is small where the student is certain. The rule does
// nothing for it.
//
// Options are those of the loss by position, in the order of `options` in its file in kdkernels/losses,
// four at most; those that are missing are 0.
//
// A decoupled rule names the divergence of the classes other than the target, `Implicit`, and gives
// the explicit term of the row:
//
//     template <class F> KDK_FN static void
//     explicit_term(const Options&, const TwoPoint<F>& p, const TwoPoint<F>& q, F& value, F& slope,
//                   F& implicit_weight);
//
// with slope = d value / d (log-odds of the target), and the weight of the other term. Its options serve
// both. All functions are called with F = float, double and SIMD vectors of them.
//
// A binary rule takes each class as a two-point distribution of its own, whose log-odds are the logit
// over the temperature: nothing is normalised over the row, and the loss is the sum of the values.
//
//     template <class F> KDK_FN static void
//     pointwise(const Options&, const F& s, const F& t, const F& gap, F& value, F& slope);
//
// with the log-odds s of the student and t of the teacher, gap = t - s, which keeps its relative accuracy
// near 0, and slope = d value / d s. value >= 0 everywhere; both are 0 where s = t, and keep their
// relative accuracy near it. -inf and inf are the probabilities 0 and 1, and gap may be NaN where both
// are the same of them. NaN in s or t gives NaN.
//
// A rule that CUDA is not to compile says `static constexpr bool cuda = false;` with the reason.
#pragma once

#include "elementary.h"

namespace kdkernels::rules {

template <class Rule, class F>
constexpr bool gives_pointwise() {
  return std::is_same_v<decltype(Rule::pointwise(
                            std::declval<const Options&>(), std::declval<const F&>(),
                            std::declval<const F&>(), std::declval<const F&>(), std::declval<F&>(),
                            std::declval<F&>())),
                        void>;
}
template <class Rule, class F>
constexpr bool gives_explicit_term() {
  using Pair = TwoPoint<F>;
  return std::is_same_v<decltype(Rule::explicit_term(
                            std::declval<const Options&>(), std::declval<const Pair&>(),
                            std::declval<const Pair&>(), std::declval<F&>(), std::declval<F&>(),
                            std::declval<F&>())),
                        void>;
}

// True; a rule that breaks the contract does not compile, with the reason.
template <class Rule>
constexpr bool keeps_contract() {
  constexpr bool kDecoupled = Rule::family == Family::decoupled;
  using Pointwise = typename PointwiseOf<Rule>::type;
  if constexpr (Rule::family != Family::binary) {
    static_assert(kDecoupled || Rule::family == Family::divergence,
                  "a rule of rows is of the family divergence, decoupled or binary");
    static_assert(Pointwise::family == Family::divergence, "Implicit is a divergence");
    static_assert(std::is_same_v<decltype(Pointwise::centred), const bool>,
                  "a divergence says whether its slopes are centred");
  }
  static_assert(gives_pointwise<Pointwise, float>() && gives_pointwise<Pointwise, double>(),
                "a rule of rows has a pointwise function of float and double");
  if constexpr (kDecoupled)
    static_assert(gives_explicit_term<Rule, float>() && gives_explicit_term<Rule, double>(),
                  "a decoupled rule has an explicit term of float and double");
  return true;
}

// The slope per q of a class, and the slope of any class from which that pivot is taken. Where the
// student has no class at all there is nothing to take off.
template <class F>
KDK_FN F pivot_of(const F& slope, const F& q) {
  using R = scalar_t<F>;
  return select(q == R(0), F{}, F(slope / q));
}

}  // namespace kdkernels::rules
