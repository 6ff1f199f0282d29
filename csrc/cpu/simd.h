// A SIMD vector of float or double for the instruction set of this translation unit.
//
// Each translation unit is compiled for one instruction set (KDK_ISA is its name and its namespace,
// so that no inline function of one is ever linked into another). The vectors are the compiler's
// vector extension; intrinsics appear only where it generates poor code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../rules/elementary.h"

#if defined(KDK_NO_FORCED_INLINE)
#define KDK_LAMBDA
#else
#define KDK_LAMBDA __attribute__((always_inline))
#endif

namespace kdkernels::KDK_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kBytes)));
typedef double VecD __attribute__((vector_size(kBytes)));
typedef int32_t VecI __attribute__((vector_size(kBytes)));
typedef int64_t VecL __attribute__((vector_size(kBytes)));
typedef uint32_t VecU __attribute__((vector_size(kBytes)));

template <class R>
struct Simd;
template <>
struct Simd<float> {
  using V = VecF;
  using I = VecI;
  using Int = int32_t;
};
template <>
struct Simd<double> {
  using V = VecD;
  using I = VecL;
  using Int = int64_t;
};
template <class R>
using Vec = typename Simd<R>::V;
template <class R>
constexpr int kLanes = kBytes / int(sizeof(R));
template <class R>
constexpr R kInfinity = std::numeric_limits<R>::infinity();

template <class R>
KDK_FN Vec<R> splat(R x) {
  return Vec<R>{} + x;
}

template <class R>
KDK_FN Vec<R> load(const R* p) {
  Vec<R> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class R>
KDK_FN void store(R* p, const Vec<R>& v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first `count` lanes from memory, the others `fill`.
template <class R>
KDK_FN Vec<R> load_part(const R* p, int count, R fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    return (Vec<R>)_mm512_mask_loadu_ps((__m512)splat<R>(fill), __mmask16((1u << count) - 1), p);
  } else {
    return (Vec<R>)_mm512_mask_loadu_pd((__m512d)splat<R>(fill), __mmask8((1u << count) - 1), p);
  }
#else
  Vec<R> v = splat<R>(fill);
  for (int lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
#endif
}

template <class R>
KDK_FN void store_part(R* p, const Vec<R>& v, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
  }
#else
  for (int lane = 0; lane < count; ++lane) p[lane] = v[lane];
#endif
}

// The value as rounded: keeps the compiler from fusing the multiplication that made it into what
// follows, where it must be bitwise what was stored elsewhere.
template <class V>
KDK_FN V rounded(V v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// Lane numbers 0, 1, 2, ... plus `first`.
template <class R>
KDK_FN typename Simd<R>::I lane_numbers(int64_t first) {
  typename Simd<R>::I v{};
  for (int lane = 0; lane < kLanes<R>; ++lane) v[lane] = lane;
  return v + typename Simd<R>::Int(first);
}

// max; where either operand is NaN, the second one.
KDK_FN VecF maximum(const VecF& a, const VecF& b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
KDK_FN VecD maximum(const VecD& a, const VecD& b) { return a > b ? a : b; }
KDK_FN float maximum(float a, float b) { return a > b ? a : b; }
KDK_FN double maximum(double a, double b) { return a > b ? a : b; }

// Horizontal reductions, as a tree: the order is fixed.
template <class R>
KDK_FN R reduce_sum(Vec<R> v) {
  R lanes[kLanes<R>];
  __builtin_memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 8
  for (int half = kLanes<R> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

template <class R>
KDK_FN R reduce_max(Vec<R> v) {
  R lanes[kLanes<R>];
  __builtin_memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 8
  for (int half = kLanes<R> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane)
      lanes[lane] = maximum(lanes[lane], lanes[lane + half]);
  return lanes[0];
}
#if defined(__AVX512F__)
template <>
KDK_FN float reduce_sum<float>(VecF v) {
  return _mm512_reduce_add_ps((__m512)v);
}
template <>
KDK_FN float reduce_max<float>(VecF v) {
  return _mm512_reduce_max_ps((__m512)v);
}
#endif

// 2^(x scale) for x <= 0 (or NaN) and scale > 0: relative error 2 ulp, 0 for x = -inf. `lowest` is
// kLowestPower / scale, below which powers are 0.
#if defined(__AVX512F__)
constexpr float kLowestPower = -200.0f;
#else
constexpr float kLowestPower = -127.0f;  // the exponent that the bits below make 0
#endif
KDK_FN VecF exp2_scaled(const VecF& x, const VecF& scale, const VecF& lowest) {
  // 1.5 * 2^23: adding it rounds to an integer; 127 more, and its low bits are the power's exponent.
  const float kRound = 12582912.0f + 127.0f;
  const VecF bounded = maximum(lowest, x);  // the second operand where either is NaN
  const VecF shifted = bounded * scale + kRound;
  const VecF n = shifted - kRound;
  const VecF r = bounded * scale - n;
  VecF y = r * 1.54035127e-04f + 1.33907355e-03f;
  y = y * r + 9.61823749e-03f;
  y = y * r + 5.55035743e-02f;
  y = y * r + 2.40226498e-01f;
  y = y * r + 6.93147188e-01f;
  y = y * r + 1.0f;
#if defined(__AVX512F__)
  return (VecF)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  VecU bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  VecF power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return y * power;
#endif
}
KDK_FN VecD exp2_scaled(const VecD& x, const VecD& scale, const VecD&) {
  VecD y{};
  for (int lane = 0; lane < kLanes<double>; ++lane) y[lane] = std::exp2(x[lane] * scale[lane]);
  return y;
}

// exp(x factor) for x <= 0, with what depends on the factor computed once.
template <class R>
struct Exponential {
  Vec<R> scale, lowest;
  Exponential() = default;
  KDK_FN explicit Exponential(const Vec<R>& factor)
      : scale(factor * R(1.442695040888963407)), lowest(R(kLowestPower) / scale) {}
  KDK_FN Vec<R> operator()(const Vec<R>& x) const { return exp2_scaled(x, scale, lowest); }
};

// Per-row terms: a scalar where lanes are classes, a vector where lanes are rows.
using rules::exponential;
using rules::logarithm;
using rules::two_point;

// The same for each lane of a vector.
template <class R, class V, class = std::enable_if_t<!std::is_arithmetic_v<V>>>
KDK_FN rules::TwoPoint<V> two_point(const V& x) {
  rules::TwoPoint<V> pair{};
  for (int lane = 0; lane < kLanes<R>; ++lane) {
    const rules::TwoPoint<R> one = two_point<R>(x[lane]);
    pair.t[lane] = one.t;
    pair.n[lane] = one.n;
    pair.log_t[lane] = one.log_t;
    pair.log_n[lane] = one.log_n;
  }
  return pair;
}

template <class S>
KDK_FN S square_root(const S& x) {
  if constexpr (std::is_arithmetic_v<S>) {
    return std::sqrt(x);
  } else {
    S y{};
    for (unsigned lane = 0; lane < sizeof(S) / sizeof(y[0]); ++lane) y[lane] = std::sqrt(x[lane]);
    return y;
  }
}

}  // namespace kdkernels::KDK_ISA
