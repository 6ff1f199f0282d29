// Moments of the columns of the correlation family: of a tile of rows, of a chunk, of all; and their relations.
#pragma once

#include "correlation_row.h"
#include "tiles.h"

namespace kdkernels::KDK_ISA {

// Merge the moments of `count_b` rows into those of `count_a` rows (Chan, Golub, LeVeque).
template <class V>
KDK_FN void merge(V (&a)[kMoments], const V (&b)[kMoments], double count_a, double count_b) {
  using R = rules::scalar_t<V>;
  const R share = R(count_b / (count_a + count_b));
  const R weight = R(count_a * count_b / (count_a + count_b));
  const V dq = b[kMeanQ] - a[kMeanQ], dp = b[kMeanP] - a[kMeanP];
  a[kMeanQ] += dq * share;
  a[kMeanP] += dp * share;
  a[kQQ] += b[kQQ] + dq * dq * weight;
  a[kPP] += b[kPP] + dp * dp * weight;
  a[kQP] += b[kQP] + dq * dp * weight;
}

template <class R>
KDK_FN void load_moments(const R* from, int64_t stride, int64_t i, Vec<R> (&m)[kMoments]) {
  for (int k = 0; k < kMoments; ++k) m[k] = load<R>(from + k * stride + i);
}
template <class R>
KDK_FN void store_moments(R* to, int64_t stride, int64_t i, const Vec<R> (&m)[kMoments]) {
  for (int k = 0; k < kMoments; ++k) store<R>(to + k * stride + i, m[k]);
}

// Moments of `count` rows of the vector of classes at i, into the chunk's moments of `before` rows.
template <class R>
KDK_FN void join(Vec<R> (&m)[kMoments], int64_t count, int64_t before, R* moments, int64_t stride,
                 int64_t i) {
  if (before) {
    Vec<R> total[kMoments];
    load_moments<R>(moments, stride, i, total);
    merge(total, m, double(before), double(count));
    return store_moments<R>(moments, stride, i, total);
  }
  store_moments<R>(moments, stride, i, m);
}

// Column moments of a tile of `count` rows, merged into the chunk's moments of `before` rows. Sums are of
// differences to the first row, so that the mean of a constant column is that constant, and its moments
// exactly 0.
template <class R>
void merge_tile(const R* const* q, const R* p, int64_t stride, int64_t classes, int64_t count,
                int64_t before, R* moments) {
  using V = Vec<R>;
  const ByClass<R> mode{classes};
  const R inverse = R(1.0 / double(count));
  sweep(
      mode,
      [&](int64_t step, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const int64_t i = step * kLanes<R>;
        V m[kMoments] = {};
        const V first_q = mode.template get<kPart>(q[0], step, R(0)), first_p = load<R>(p + i);
        for (int64_t r = 1; r < count; ++r) {
          m[kMeanQ] += mode.template get<kPart>(q[r], step, R(0)) - first_q;
          m[kMeanP] += load<R>(p + r * stride + i) - first_p;
        }
        m[kMeanQ] = first_q + m[kMeanQ] * inverse;
        m[kMeanP] = first_p + m[kMeanP] * inverse;
        for (int64_t r = 0; r < count; ++r) {
          const V a = mode.template get<kPart>(q[r], step, R(0)) - m[kMeanQ];
          const V b = load<R>(p + r * stride + i) - m[kMeanP];
          m[kQQ] += a * a;
          m[kPP] += b * b;
          m[kQP] += a * b;
        }
        join<R>(m, count, before, moments, stride, i);
      },
      [&]() KDK_LAMBDA {});
}

template <class Rule, class R>
void relate_columns(const CorrelationContext<R>& c, int64_t begin, int64_t end) {
  const CorrelationProblem& problem = c.problem;
  R* const loss = static_cast<R*>(problem.loss) + problem.rows;
  for (int64_t i = begin; i < end; i += kLanes<R>) {
    Vec<R> total[kMoments] = {};
    int64_t before = 0;
    for (int64_t chunk = 0; chunk < c.chunks; ++chunk) {
      if (!c.counts[chunk]) continue;
      Vec<R> m[kMoments];
      load_moments<R>(c.moments + chunk * kMoments * c.stride, c.stride, i, m);
      merge(total, m, double(before), double(c.counts[chunk]));
      before += c.counts[chunk];
    }
    const int64_t lanes = end - i < kLanes<R> ? end - i : kLanes<R>;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      R of_p, of_q;
      loss[i + lane] = R(problem.intra) *
                       Rule::template relation<R>(total[kQQ][lane], total[kPP][lane],
                                                  total[kQP][lane], R(problem.eps), of_p, of_q);
      R* const to = c.columns + i + lane;
      to[kOfP * c.stride] = of_p * R(problem.intra);
      to[kOfQ * c.stride] = of_q * R(problem.intra);
      to[kColumnP * c.stride] = total[kMeanP][lane];
      to[kColumnQ * c.stride] = total[kMeanQ][lane];
    }
  }
}

}  // namespace kdkernels::KDK_ISA
