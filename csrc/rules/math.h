// What the rules are written in: a few functions over a number type F.
//
// F is a scalar (CUDA, and the per-row terms on the CPU) or a SIMD vector of float or double (CPU).
// Arithmetic and comparisons are the operators of the type; `select` chooses by a comparison.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define KDK_FN __host__ __device__ __forceinline__
#elif defined(KDK_NO_FORCED_INLINE)  // sanitizers take minutes to instrument what is inlined
#define KDK_FN inline
#else
#define KDK_FN inline __attribute__((always_inline))
#endif

namespace kdkernels {

// The traversal that a rule asks for.
enum class Family { divergence, decoupled, binary, correlation, factor, tuple, sparse };

// Options of a loss, in the order in which its file in kdkernels/losses passes them.
struct Options {
  double value[4];
};

namespace rules {

template <class F, bool = std::is_arithmetic_v<F>>
struct scalar {  // the element type of F
  using type = F;
};
template <class F>
struct scalar<F, false> {
  using type = std::decay_t<decltype(std::declval<F&>()[0])>;
};
template <class F>
using scalar_t = typename scalar<F>::type;

template <class M, class F>
KDK_FN F select(const M& condition, const F& yes, const F& no) {
  return condition ? yes : no;
}

template <class F>
KDK_FN F broadcast(scalar_t<F> x) {
  return F{} + x;
}

// The smaller of two; NaN where x is.
template <class F>
KDK_FN F smaller(const F& x, const F& bound) {
  return select(x > bound, bound, x);
}

// A term times its weight; 0 where the weight is 0, were the term infinite.
template <class F, class W>
KDK_FN F weighted(const F& value, const W& weight) {
  using R = scalar_t<F>;
  const F infinity = broadcast<F>(std::numeric_limits<R>::infinity());
  return select(value == infinity, select(F{} + weight == F{}, F{}, F(value * weight)), F(value * weight));
}

// Square root and quotient of a row's or a column's numbers; |y| at most 1e37. On a GPU float's are within
// two units in the last place, which a loss does not notice, and flush denormal numbers: exact
// ones take as long as some of the row's classes.
template <class R>
KDK_FN R root(R x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<R, float>) {
    asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
  }
#endif
  return std::sqrt(x);
}
template <class R>
KDK_FN R quotient(R x, R y) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<R, float>) {
    asm("div.approx.ftz.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
    return x;
  }
#endif
  return x / y;
}

// phi(d) / d^2 for |d| < 1/4, where phi(d) = exp(-d) - 1 + d: exact to the last bits where the closed
// form would cancel. Float: minimax; double: Taylor.
template <class F>
KDK_FN F phi_series(const F& d) {
  using R = scalar_t<F>;
  if constexpr (std::is_same_v<R, float>) {
    F sum = d * R(1.38953e-03) + R(-8.34884e-03);
    sum = sum * d + R(4.166672e-02);
    sum = sum * d + R(-1.6666642e-01);
    return sum * d + R(0.5);
  } else {
    F sum = d * R(-1.0 / 6227020800.0) + R(1.0 / 479001600.0);
    sum = sum * d + R(-1.0 / 39916800.0);
    sum = sum * d + R(1.0 / 3628800.0);
    sum = sum * d + R(-1.0 / 362880.0);
    sum = sum * d + R(1.0 / 40320.0);
    sum = sum * d + R(-1.0 / 5040.0);
    sum = sum * d + R(1.0 / 720.0);
    sum = sum * d + R(-1.0 / 120.0);
    sum = sum * d + R(1.0 / 24.0);
    sum = sum * d + R(-1.0 / 6.0);
    return sum * d + R(0.5);
  }
}

// One class's part of KL(p || q), with d = log p - log q; where p = 0 any d will do, -inf - -inf too:
//   value = p phi(d) = p d + (q - p),  slope = q - p.
// Over a whole distribution sum(q - p) = 0, so the values sum to sum p d; but each is >= 0 and
// nothing cancels, which keeps the divergence of nearly equal distributions exact. NaN gives NaN.
template <class F>
KDK_FN void kl_terms(const F& p, const F& q, const F& d, F& value, F& slope) {
  using R = scalar_t<F>;
  const F gap = q - p;
  const F square = d * d;
  const auto near = square < R(0.0625);  // never where p = 0 makes d infinite or NaN
  const F close = phi_series(d) * (p * square);
  slope = select(near, F(close - p * d), gap);
  value = select(near, close, select(p == R(0), gap, F(gap + p * d)));
}

// The target's logit, which no maximum has seen: +inf makes the row NaN, as in any other class.
template <class F>
KDK_FN F logit_or_nan(const F& x) {
  using R = scalar_t<F>;
  const F infinity = broadcast<F>(std::numeric_limits<R>::infinity());
  return select(x == infinity, broadcast<F>(std::numeric_limits<R>::quiet_NaN()), x);
}

// A distribution over two outcomes, the target class and the others, with its logarithms.
template <class F>
struct TwoPoint {
  F t, n;          // probabilities
  F log_t, log_n;  // log n is never log(1 - t): the traversals compute it from the log-odds
};

// The two-point distribution whose log-odds n : t are x. NaN stays NaN.
template <class R>
KDK_FN TwoPoint<R> two_point(R x) {
  const R e = std::exp(x < R(0) ? x : -x), sum = R(1) + e;
#if defined(__CUDA_ARCH__)
  const R tail = std::log1p(e);
#else
  // Of a float in double, which keeps what 1 + e loses; e^3 / 3 is nothing beside e there.
  R tail;
  if constexpr (std::is_same_v<R, float>)
    tail = e < R(1e-5) ? e - R(0.5) * e * e : R(std::log(1.0 + double(e)));
  else tail = std::log1p(e);
#endif
  const R likely = R(1) / sum, rare = e / sum;
  const R log_likely = -tail, log_rare = -(x < R(0) ? -x : x) - tail;
  return x > R(0) ? TwoPoint<R>{rare, likely, log_rare, log_likely}
                  : TwoPoint<R>{likely, rare, log_likely, log_rare};
}

// The divergence that a rule sums over classes.
template <class Rule, bool kDecoupled = Rule::family == Family::decoupled>
struct PointwiseOf {
  using type = Rule;
};
template <class Rule>
struct PointwiseOf<Rule, true> {
  using type = typename Rule::Implicit;
};

constexpr double kStandardizeEps = 1e-7;  // kdkernels/reference/_rows.py

// KL(p || q) of two-point distributions, and q_t - p_t = d KL / d (log-odds of q). The difference is
// taken on the rarer side, where it keeps its relative accuracy.
template <class F>
KDK_FN void binary_kl(const TwoPoint<F>& p, const TwoPoint<F>& q, F& value, F& slope) {
  F value_t, slope_t, value_n, slope_n;
  kl_terms(p.t, q.t, F(p.log_t - q.log_t), value_t, slope_t);
  kl_terms(p.n, q.n, F(p.log_n - q.log_n), value_n, slope_n);
  value = value_t + value_n;
  slope = select(p.t < p.n, slope_t, F(-slope_n));
}

}  // namespace rules
}  // namespace kdkernels
