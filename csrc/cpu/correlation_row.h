// One row (or one vector of rows) of the correlation family: its relation, and its gradient.
#pragma once

#include <type_traits>

#include "convert.h"
#include "probabilities.h"

namespace kdkernels::KDK_ISA {

// Centred moments of a column over some rows: mean of q and p, sums of squares and of products.
enum Moment { kMeanQ, kMeanP, kQQ, kPP, kQP, kMoments };
// What the gradient needs of a column.
enum Column { kOfP, kOfQ, kColumnP, kColumnQ, kColumnNumbers };

template <class R>
struct CorrelationContext {
  const CorrelationProblem& problem;
  int64_t chunks, chunk_rows, stride;  // stride: padded classes
  int tile;                            // rows taken together
  bool lanes;                          // of which vectors are made, a class at a time
  void* rows;                          // RowTerms of each row, or of each vector of rows
  R* moments;                          // [chunks][kMoments][stride]
  R* columns;                          // [kColumnNumbers][stride]
  int64_t* counts;                     // [chunks]: rows that count

  // Whether the student's probabilities stay in the gradient between the first and the last phase.
  KDK_FN bool keeps_probabilities() const {
    return problem.gradient.data && direct<R>(problem.gradient);
  }
  KDK_FN const R* of_columns(Column column) const { return columns + column * stride; }
  template <class S>
  KDK_FN RowTerms<S>& terms(int64_t index) const {
    return static_cast<RowTerms<S>*>(rows)[index];
  }
  KDK_FN int64_t end_of(int64_t chunk) const {
    const int64_t end = (chunk + 1) * chunk_rows;
    return end < problem.rows ? end : problem.rows;
  }
};

// 1 - rho of a row, or of each lane's, and its coefficients.
template <class Rule, class R, class S>
KDK_FN S relation(const CorrelationProblem& problem, const S& aa, const S& bb, const S& ab,
                  RowTerms<S>& terms) {
  const R eps = R(problem.eps), inter = R(problem.inter);
  S value{};
  if constexpr (std::is_same_v<S, R>) {
    value = Rule::template relation<R>(aa, bb, ab, eps, terms.of_p, terms.of_q);
  } else {
    for (int lane = 0; lane < kLanes<R>; ++lane) {
      R of_p, of_q;
      value[lane] = Rule::template relation<R>(aa[lane], bb[lane], ab[lane], eps, of_p, of_q);
      terms.of_p[lane] = of_p;
      terms.of_q[lane] = of_q;
    }
  }
  terms.of_p *= inter;
  terms.of_q *= inter;
  return value * inter;
}

// Probabilities of one row into q and p, and its relation. p is padded with zeros to whole vectors; q
// may be the row's gradient, which keeps it for the last phase.
template <class Rule, class M, class R = typename M::Real>
inline typename M::S relate_row(const M& mode, const CorrelationProblem& problem, const R* s,
                                const R* t, R* q, R* p, RowTerms<typename M::S>& terms) {
  using V = Vec<R>;
  V scale_s{}, scale_t{};
  if constexpr (Rule::sigmoid) {
    sigmoids_of_row(mode, problem, s, t, q, p, terms);
  } else {
    exponentials_of_row(mode, problem, s, t, q, p, terms);
    scale_s = M::spread(terms.inverse_s);
    scale_t = M::spread(terms.inverse_t);
  }
  const V mean_q = M::spread(terms.mean_q), mean_p = M::spread(terms.mean_p);
  Blocked<V> aa, bb, ab;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        V x = mode.template get<kPart>(q, i, R(0));
        V y = load<R>(p + i * kLanes<R>);
        if constexpr (!Rule::sigmoid) {
          x = rounded(V(x * scale_s));
          y = rounded(V(y * scale_t));
          mode.template put<kPart>(q, i, x);
          store<R>(p + i * kLanes<R>, y);
        }
        V a = x - mean_q, b = y - mean_p;
        if constexpr (kPart) {
          a = mask_rest(mode, a);
          b = mask_rest(mode, b);
        }
        aa.add(a * a);
        bb.add(b * b);
        ab.add(a * b);
      },
      [&]() KDK_LAMBDA {
        aa.flush();
        bb.flush();
        ab.flush();
      });
  return relation<Rule, R>(problem, M::sum(aa.total), M::sum(bb.total), M::sum(ab.total), terms);
}

// Gradient of one row. Where kKept, `gradient` holds the student's probabilities; else they are computed
// from the logits s into q. `pull` is scratch and may be where the teacher's logits t are. The row
// `ahead` elements further is fetched meanwhile: these are too many streams for the hardware.
template <class Rule, bool kKept, class M, class R = typename M::Real>
KDK_FN void differentiate_row(const M& mode, const CorrelationContext<R>& c,
                              const RowTerms<typename M::S>& terms, const R* s, const R* t, R* q,
                              R* pull, R* gradient, int64_t ahead) {
  using V = Vec<R>;
  const CorrelationProblem& problem = c.problem;
  const R fill = -kInfinity<R>;
  const V origin_s = M::spread(terms.max_s), origin_t = M::spread(terms.max_t);
  const V scale_s = M::spread(terms.inverse_s), scale_t = M::spread(terms.inverse_t);
  const V row_p = M::spread(terms.of_p), row_q = M::spread(terms.of_q);
  const V factor = splat<R>(R(1.0 / problem.tau));
  const Exponential<R> exponential(factor);
  const V mean_q = M::spread(terms.mean_q), mean_p = M::spread(terms.mean_p);
  Blocked<V> dot;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const int64_t at = i * kLanes<R>;
        if constexpr (kKept) {
          __builtin_prefetch(t + ahead + at, 0, 2);
          __builtin_prefetch(gradient + ahead + at, 0, 2);
        }
        V x = mode.template get<kPart>(kKept ? gradient : s, i, kKept ? R(0) : fill);
        V y = mode.template get<kPart>(t, i, fill);
        if constexpr (Rule::sigmoid) {
          if constexpr (!kKept) x = sigmoid<R>(x, exponential);
          y = sigmoid<R>(y, exponential);
        } else {
          if constexpr (!kKept) x = rounded(V(scale_s * exponential(V(x - origin_s))));
          y = rounded(V(scale_t * exponential(V(y - origin_t))));
        }
        V g = row_p * (y - mean_p) + row_q * (x - mean_q);
        g += M::of_class(c.of_columns(kOfP), i) * (y - M::of_class(c.of_columns(kColumnP), i));
        g += M::of_class(c.of_columns(kOfQ), i) * (x - M::of_class(c.of_columns(kColumnQ), i));
        if constexpr (Rule::sigmoid) {
          mode.template put<kPart>(gradient, i, V(x * (R(1) - x) * factor * g));
        } else {
          if constexpr (kPart) g = mask_rest(mode, g);
          if constexpr (!kKept) store<R>(q + at, x);
          store<R>(pull + at, g);
          dot.add(x * g);
        }
      },
      [&]() KDK_LAMBDA { dot.flush(); });
  if constexpr (Rule::sigmoid) return;
  const V centre = M::spread(M::sum(dot.total));
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const int64_t at = i * kLanes<R>;
        V x;
        if constexpr (kKept) x = mode.template get<kPart>(gradient, i, R(0));
        else x = load<R>(q + at);
        mode.template put<kPart>(gradient, i, V(x * factor * (load<R>(pull + at) - centre)));
      },
      [&]() KDK_LAMBDA {});
}

}  // namespace kdkernels::KDK_ISA
