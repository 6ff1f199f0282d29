// exp, log, expm1 and log1p of a number type F, element by element, for the terms of a rule.
//
// A SIMD vector of float takes polynomials, in any instruction set: at most 2 units in the last place,
// exact at 0, infinities and NaN, subnormal numbers included. Vectors of double and scalars take the
// library's functions. Nothing here is faster than it is accurate: log1p and expm1 keep their relative
// accuracy near 0, which is what makes a divergence of nearly equal distributions exact.
#pragma once

#include "math.h"

namespace kdkernels::rules {

// A function of scalars for each element of a vector.
template <class F, class Function>
KDK_FN F each_element(const F& x, const Function& f) {
  F y{};
  for (unsigned lane = 0; lane < sizeof(F) / sizeof(y[0]); ++lane) y[lane] = f(x[lane]);
  return y;
}

template <class F>
constexpr bool kFloatVector = !std::is_arithmetic_v<F> && std::is_same_v<scalar_t<F>, float>;

namespace polynomial {

// The vector of integers that is as wide as F.
template <class F>
using Bits = std::decay_t<decltype(std::declval<F&>() < std::declval<F&>())>;
template <class To, class From>
KDK_FN To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// exp(x) = low high (1 + rest), low and high being powers of two: one alone may be out of range.
template <class F>
KDK_FN void split_exponent(const F& x, F& low, F& high, F& rest) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F least = broadcast<F>(-104.0f), most = broadcast<F>(89.0f);  // 0 and infinity
  F bounded = select(x < least, least, x);  // NaN stays
  bounded = select(bounded > most, most, bounded);
  const F n = (bounded * 1.44269504f + kRound) - kRound;
  // log 2 in two parts, of which n times the first is exact.
  const F r = (bounded - n * 0.693145752f) - n * 1.42860682e-06f;
  F y = r * 1.98412698e-04f + 1.38888889e-03f;
  y = y * r + 8.33333333e-03f;
  y = y * r + 4.16666667e-02f;
  y = y * r + 1.66666667e-01f;
  y = y * r + 0.5f;
  rest = y * (r * r) + r;
  const Bits<F> count = __builtin_convertvector(select(x == x, n, F{}), Bits<F>), half = count >> 1;
  low = same_bits<F>(Bits<F>((half + 127) << 23));
  high = same_bits<F>(Bits<F>((count - half + 127) << 23));
}

// log(1 + f) - f for 1 / sqrt 2 <= 1 + f <= sqrt 2, relative to f^2.
template <class F>
KDK_FN F log_near_one_less(const F& f) {
  F y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  const F square = f * f;
  return y * f * square - square * 0.5f;
}

// log(1 + f) for 1 / sqrt 2 <= 1 + f <= sqrt 2, relative to f.
template <class F>
KDK_FN F log_near_one(const F& f) {
  return f + log_near_one_less(f);
}

// x = 2^n (1 + f), for a normal number x > 0; `n` counts. Other x give finite numbers.
template <class F>
KDK_FN void split_normal(const F& x, Bits<F>& n, F& f) {
  const Bits<F> bits = same_bits<Bits<F>>(x);
  n = (bits - 0x3f3504f3) >> 23;  // the exponent of x / sqrt(1 / 2), rounded down
  f = same_bits<F>(Bits<F>(bits - (n << 23))) - 1.0f;
}

// x = 2^n (1 + f), for x > 0; `n` counts.
template <class F>
KDK_FN void split_number(const F& x, F& n, F& f) {
  const auto subnormal = x < std::numeric_limits<float>::min();
  Bits<F> exponent;
  split_normal(select(subnormal, F(x * 8388608.0f), x), exponent, f);
  n = __builtin_convertvector(exponent, F) - select(subnormal, broadcast<F>(23.0f), F{});
}

template <class F>
KDK_FN F log_of_split(const F& n, const F& f) {
  return n * 0.693145752f + (log_near_one(f) + n * 1.42860677e-06f);
}

// log where no polynomial reaches: 0, infinity, negative numbers and NaN.
template <class F>
KDK_FN F log_beyond(const F& x, const F& y) {
  const float infinity = std::numeric_limits<float>::infinity();
  const F special = select(x == 0.0f, broadcast<F>(-infinity),
                           select(x < 0.0f, broadcast<F>(std::numeric_limits<float>::quiet_NaN()), x));
  const auto inside = (x > 0.0f) & (x < infinity);
  return select(inside, y, special);
}

}  // namespace polynomial

template <class F>
KDK_FN F exponential(const F& x) {
  if constexpr (std::is_arithmetic_v<F>) {
    return std::exp(x);
  } else if constexpr (kFloatVector<F>) {
    F low, high, rest;
    polynomial::split_exponent(x, low, high, rest);
    return (low + low * rest) * high;
  } else {
    return each_element(x, [](scalar_t<F> e) { return std::exp(e); });
  }
}

// exp(x) - 1.
template <class F>
KDK_FN F exponential_less_one(const F& x) {
  if constexpr (std::is_arithmetic_v<F>) {
    return std::expm1(x);
  } else if constexpr (kFloatVector<F>) {
    F low, high, rest;
    polynomial::split_exponent(x, low, high, rest);
    const F near = low * rest * high + (low * high - 1.0f);
    return select(x > 40.0f, F((low + low * rest) * high), near);  // 2^128 would overflow
  } else {
    return each_element(x, [](scalar_t<F> e) { return std::expm1(e); });
  }
}

template <class F>
KDK_FN F logarithm(const F& x) {
  if constexpr (std::is_arithmetic_v<F>) {
    return std::log(x);
  } else if constexpr (kFloatVector<F>) {
    F n, f;
    polynomial::split_number(x, n, f);
    return polynomial::log_beyond(x, polynomial::log_of_split(n, f));
  } else {
    return each_element(x, [](scalar_t<F> e) { return std::log(e); });
  }
}

// log(x), of which x - 1 is known as well, and better near 1.
template <class F>
KDK_FN F logarithm_of(const F& x, const F& less_one) {
  if constexpr (std::is_arithmetic_v<F>) {
    return less_one > F(-0.29) && less_one < F(0.41) ? std::log1p(less_one) : std::log(x);
  } else if constexpr (kFloatVector<F>) {
    F n, f;
    polynomial::split_number(x, n, f);
    const auto near = (less_one > -0.29f) & (less_one < 0.41f);
    n = select(near, F{}, n);
    f = select(near, less_one, f);
    return polynomial::log_beyond(x, polynomial::log_of_split(n, f));
  } else {
    F y{};
    for (unsigned lane = 0; lane < sizeof(F) / sizeof(y[0]); ++lane)
      y[lane] = logarithm_of(scalar_t<F>(x[lane]), scalar_t<F>(less_one[lane]));
    return y;
  }
}

// log x of x = 1 + z >= 0, of which z is known as well, and better near 1; and what a divergence makes of
// it, both >= 0 and z^2 / 2 near 1, where each keeps its relative accuracy:
//   over = x log x - z,  under = z - log x.
// Where x underflows, log is some number as low as that, and over is -z. NaN may give any number.
template <class F>
KDK_FN void logarithm_terms(const F& x, const F& z, F& log, F& over, F& under) {
  using R = scalar_t<F>;
  if constexpr (kFloatVector<F>) {
    polynomial::Bits<F> n;
    F f;
    polynomial::split_normal(x, n, f);
    const auto near = n == 0;
    f = select(near, z, f);
    const F less = polynomial::log_near_one_less(f);
    const F count = __builtin_convertvector(n, F);
    log = count * 0.693145752f + ((f + less) + count * 1.42860677e-06f);
    under = select(near, F(-less), F(z - log));
    over = select(near, z, x) * log - select(near, under, z);
  } else {
    const F least = broadcast<F>(std::numeric_limits<R>::min());
    log = logarithm_of(select(x < least, least, x), z);
    const auto near = log * log < R(0.0625);
    under = select(near, F(phi_series(F(-log)) * (log * log)), F(z - log));
    over = select(near, z, x) * log - select(near, under, z);
  }
}

// log(1 + x).
template <class F>
KDK_FN F logarithm_of_one_plus(const F& x) {
  return logarithm_of(F(x + scalar_t<F>(1)), x);
}

}  // namespace kdkernels::rules
