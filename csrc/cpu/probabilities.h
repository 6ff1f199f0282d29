// Probabilities of a row's classes for the correlation family: a softmax, or the sigmoid of each logit.
#pragma once

#include "modes.h"
#include "problem.h"
#include "sources.h"

namespace kdkernels::KDK_ISA {

template <class S>
struct RowTerms {  // what the gradient needs of a row, or of each lane's
  S max_s, max_t, inverse_s, inverse_t;  // of a softmax
  S of_p, of_q, mean_q, mean_p;
};

// The sigmoid of x over the temperature of an exponential; rounded, because it is computed again.
template <class R>
KDK_FN Vec<R> sigmoid(const Vec<R>& x, const Exponential<R>& exponential) {
  const auto below = x < R(0);
  const Vec<R> e = exponential(rules::select(below, x, Vec<R>(-x)));
  return rounded(Vec<R>(rules::select(below, e, splat<R>(R(1))) / (e + R(1))));
}

// The sigmoids of a row, with their means: of differences to the first one, which are exactly 0 where
// the row is constant.
template <class M, class R = typename M::Real>
inline void sigmoids_of_row(const M& mode, const CorrelationProblem& problem, const R* s, const R* t,
                            R* q, R* p, RowTerms<typename M::S>& terms) {
  using V = Vec<R>;
  const R fill = -kInfinity<R>;
  const Exponential<R> exponential(splat<R>(R(1.0 / problem.tau)));
  const V first_q = sigmoid<R>(M::spread(mode.first(s)), exponential);
  const V first_p = sigmoid<R>(M::spread(mode.first(t)), exponential);
  Blocked<V> sum_q, sum_p;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const V x = sigmoid<R>(mode.template get<kPart>(s, i, fill), exponential);
        const V y = sigmoid<R>(mode.template get<kPart>(t, i, fill), exponential);
        mode.template put<kPart>(q, i, x);
        store<R>(p + i * kLanes<R>, y);
        V a = x - first_q, b = y - first_p;
        if constexpr (kPart) {
          a = mask_rest(mode, a);
          b = mask_rest(mode, b);
        }
        sum_q.add(a);
        sum_p.add(b);
      },
      [&]() KDK_LAMBDA {
        sum_q.flush();
        sum_p.flush();
      });
  const R share = R(1.0 / double(problem.classes));
  terms.mean_q = M::first_of(first_q) + M::sum(sum_q.total) * share;
  terms.mean_p = M::first_of(first_p) + M::sum(sum_p.total) * share;
}

// The exponentials of a row's softmaxes, with what normalises them.
template <class M, class R = typename M::Real>
inline void exponentials_of_row(const M& mode, const CorrelationProblem& problem, const R* s,
                                const R* t, R* q, R* p, RowTerms<typename M::S>& terms) {
  using V = Vec<R>;
  const R fill = -kInfinity<R>;
  maxima<false>(mode, InPlace<R>{s}, InPlace<R>{t}, terms.max_s, terms.max_t);
  const V origin_s = M::spread(terms.max_s), origin_t = M::spread(terms.max_t);
  const Exponential<R> exponential(splat<R>(R(1.0 / problem.tau)));
  Blocked<V> sum_s, sum_t;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const V e = exponential(V(mode.template get<kPart>(s, i, fill) - origin_s));
        const V f = exponential(V(mode.template get<kPart>(t, i, fill) - origin_t));
        mode.template put<kPart>(q, i, e);
        store<R>(p + i * kLanes<R>, f);
        sum_s.add(e);
        sum_t.add(f);
      },
      [&]() KDK_LAMBDA {
        sum_s.flush();
        sum_t.flush();
      });
  terms.inverse_s = R(1) / M::sum(sum_s.total);
  terms.inverse_t = R(1) / M::sum(sum_t.total);
  terms.mean_q = terms.mean_p = rules::broadcast<typename M::S>(R(1.0 / double(mode.classes)));
}

}  // namespace kdkernels::KDK_ISA
