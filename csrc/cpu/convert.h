// Moving rows between tensors (any dtype and strides) and scratch in the working type R.
#pragma once

#include "problem.h"
#include "simd.h"

namespace kdkernels::KDK_ISA {


template <class To, class From>
KDK_FN To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

KDK_FN float widen(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

KDK_FN float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift the exponent by a multiplication, which also normalises subnormals.
  const float magnitude = bit_cast<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t bits = bit_cast<uint32_t>(magnitude);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // inf and NaN
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
#endif
}
KDK_FN float widen(float x) { return x; }
KDK_FN double widen(double x) { return x; }

// To the nearest, ties to even; NaN stays NaN.
template <class To>
KDK_FN To narrow(float x) {
  if constexpr (std::is_same_v<To, bf16>) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16{uint16_t(x == x ? rounded : 0x7fc0)};
  } else if constexpr (std::is_same_v<To, f16>) {
#if defined(__F16C__)
    return f16{uint16_t(_cvtss_sh(x, 0))};
#else
    const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude >= 0x477ff000) {  // rounds to 2^16 or beyond
      half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: an addition aligns and rounds it
      half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    } else {
      half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    return f16{uint16_t(half | sign)};
#endif
  } else {
    return To(x);
  }
}
template <class To>
KDK_FN To narrow(double x) {
  if constexpr (std::is_same_v<To, double>) return x;
  else return narrow<To>(float(x));
}

// Whole vectors of half-precision numbers, where the compiler would convert one at a time.
template <class T>
constexpr bool kHalf = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;
typedef uint16_t VecH __attribute__((vector_size(kBytes / 2)));

template <class T>
KDK_FN VecF widen_vector(const T* from) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, f16>)
    return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  if constexpr (std::is_same_v<T, f16>)
    return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  if constexpr (std::is_same_v<T, bf16>) {
    VecH half;
    __builtin_memcpy(&half, from, sizeof half);
    return bit_cast<VecF>(__builtin_convertvector(half, VecU) << 16);
  }
  VecF wide{};
  for (int lane = 0; lane < kLanes<float>; ++lane) wide[lane] = widen(from[lane]);
  return wide;
}

template <class T>
KDK_FN void narrow_vector(T* to, const VecF& from) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, f16>)
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)from, 0));
#elif defined(__F16C__)
  if constexpr (std::is_same_v<T, f16>)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)from, 0));
#endif
  if constexpr (std::is_same_v<T, bf16>) {
    const VecU bits = bit_cast<VecU>(from);
    VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = rules::select(from == from, rounded, VecU{} + 0x7fc0);
    const VecH half = __builtin_convertvector(rounded, VecH);
    __builtin_memcpy(to, &half, sizeof half);
    return;
  }
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = narrow<T>(float(from[lane]));
}

// The last `count` < kLanes of a run; the lanes past it are zero (read) or not written.
template <class T>
KDK_FN VecF widen_part(const T* from, int count) {
#if defined(__AVX512F__)
  T lanes[kLanes<float>];
  const __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), half);
  return widen_vector(lanes);
#else
  VecF wide{};
  for (int lane = 0; lane < count; ++lane) wide[lane] = widen(from[lane]);
  return wide;
#endif
}
template <class T>
KDK_FN void narrow_part(T* to, const VecF& from, int count) {
#if defined(__AVX512F__)
  T lanes[kLanes<float>];
  narrow_vector(lanes, from);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
  _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), half);
#else
  for (int lane = 0; lane < count; ++lane) to[lane] = narrow<T>(float(from[lane]));
#endif
}

// Runs in scratch have room for whole vectors.
template <class T, class R>
KDK_FN void read_run(const T* from, int64_t stride, int64_t count, R* to, int64_t to_stride) {
  int64_t i = 0;
  if (stride == 1 && to_stride == 1) {
    if constexpr (kHalf<T> && std::is_same_v<R, float>) {
      for (; i + kLanes<R> <= count; i += kLanes<R>) store<R>(to + i, widen_vector(from + i));
      if (i < count) store<R>(to + i, widen_part(from + i, int(count - i)));
      return;
    }
    for (; i < count; ++i) to[i] = R(widen(from[i]));
  } else {
    for (; i < count; ++i) to[i * to_stride] = R(widen(from[i * stride]));
  }
}

template <class T, class R>
KDK_FN void write_run(T* to, int64_t stride, int64_t count, const R* from, int64_t from_stride) {
  int64_t i = 0;
  if (stride == 1 && from_stride == 1) {
    if constexpr (kHalf<T> && std::is_same_v<R, float>) {
      for (; i + kLanes<R> <= count; i += kLanes<R>) narrow_vector(to + i, load<R>(from + i));
      if (i < count) narrow_part(to + i, load<R>(from + i), int(count - i));
      return;
    }
    for (; i < count; ++i) to[i] = narrow<T>(from[i]);
  } else {
    for (; i < count; ++i) to[i * stride] = narrow<T>(from[i * from_stride]);
  }
}

constexpr int element_bytes(Scalar type) {
  return type == Scalar::f64 ? 8 : type == Scalar::f32 ? 4 : 2;
}
KDK_FN const char* address(const Rows& x, int64_t row) {
  return static_cast<const char*>(x.data) + x.offset(row) * element_bytes(x.type);
}

// Calls f with a typed pointer.
template <class F>
KDK_FN void with_type(const Rows& x, F&& f) {
  switch (x.type) {
    case Scalar::f64: return f(static_cast<double*>(x.data));
    case Scalar::f32: return f(static_cast<float*>(x.data));
    case Scalar::f16: return f(static_cast<f16*>(x.data));
    case Scalar::bf16: return f(static_cast<bf16*>(x.data));
  }
}

template <class R>
constexpr Scalar kScalar = std::is_same_v<R, float> ? Scalar::f32 : Scalar::f64;

// Whether a row can be used where it lies.
template <class R>
KDK_FN bool direct(const Rows& x) {
  return x.type == kScalar<R> && x.class_stride == 1;
}

// One row -> classes in a run.
template <class R>
inline void read_row(const Rows& x, int64_t row, int64_t classes, R* to) {
  with_type(x, [&](auto* data) KDK_LAMBDA {
    read_run(data + x.offset(row), x.class_stride, classes, to, 1);
  });
}
// Where a row lies in the working type; in scratch where it does not.
template <class R>
KDK_FN const R* row_in_place(const Rows& x, int64_t row, int64_t classes, R* scratch) {
  if (direct<R>(x)) return static_cast<const R*>(x.data) + x.offset(row);
  read_row(x, row, classes, scratch);
  return scratch;
}
template <class R>
inline void write_row(const Rows& x, int64_t row, int64_t classes, const R* from) {
  with_type(x, [&](auto* data) KDK_LAMBDA {
    write_run(data + x.offset(row), x.class_stride, classes, from, 1);
  });
}

// `count` rows -> lanes of one vector a class; lanes past `count` are zero.
template <class R>
inline void read_lanes(const Rows& x, int64_t row, int64_t count, int64_t classes, R* to) {
  constexpr int kW = kLanes<R>;
  with_type(x, [&](auto* data) KDK_LAMBDA {
    if (count == kW && x.adjacent(row, kW)) {
      auto* from = data + x.offset(row);
      for (int64_t c = 0; c < classes; ++c) read_run(from + c * x.class_stride, 1, kW, to + c * kW, 1);
      return;
    }
    if (count < kW) std::memset(to, 0, sizeof(R) * kW * classes);
    for (int64_t lane = 0; lane < count; ++lane)
      read_run(data + x.offset(row + lane), x.class_stride, classes, to + lane, kW);
  });
}
template <class R>
inline void write_lanes(const Rows& x, int64_t row, int64_t count, int64_t classes, const R* from) {
  constexpr int kW = kLanes<R>;
  with_type(x, [&](auto* data) KDK_LAMBDA {
    if (count == kW && x.adjacent(row, kW)) {
      auto* to = data + x.offset(row);
      for (int64_t c = 0; c < classes; ++c)
        write_run(to + c * x.class_stride, 1, kW, from + c * kW, 1);
      return;
    }
    for (int64_t lane = 0; lane < count; ++lane)
      write_run(data + x.offset(row + lane), x.class_stride, classes, from + lane, kW);
  });
}

// Rows whose classes are far apart, and whose neighbours are near.
KDK_FN bool across(const Rows& x) { return x.class_stride != 1 && x.stride[x.dims - 1] == 1; }

// Such rows are moved so many together, because what lies together in memory is; of so many classes at
// most, which then stay in cache; and of so many at most lanes are rows.
constexpr int64_t kSpan = 64, kSpanClasses = 1024, kLaneClasses = 4096;

// Calls f(g, rows) for each vector of rows, or, where all rows lie side by side, side_by_side(data) with a
// typed pointer to the first.
template <class R, class F, class G>
KDK_FN void by_vectors(const Rows& x, int64_t row, int64_t count, F&& f, G&& side_by_side) {
  constexpr int kW = kLanes<R>;
  if (count % kW == 0 && x.adjacent(row, count))
    return with_type(x, [&](auto* data) KDK_LAMBDA { side_by_side(data + x.offset(row)); });
  for (int64_t g = 0; g * kW < count; ++g) f(g, count - g * kW < kW ? count - g * kW : kW);
}

// Rows -> vectors of them, `apart` elements from one to the next; those that are not wanted are left out.
template <class R>
inline void read_vectors(const Rows& x, int64_t row, int64_t count, int64_t classes, R* to,
                         int64_t apart, const int* wanted) {
  constexpr int kW = kLanes<R>;
  constexpr int64_t kAhead = 8;  // classes: their distance is too large for the hardware to fetch ahead
  by_vectors<R>(
      x, row, count,
      [&](int64_t g, int64_t rows) KDK_LAMBDA {
        if (wanted[g]) read_lanes(x, row + g * kW, rows, classes, to + g * apart);
      },
      [&](const auto* from) KDK_LAMBDA {
        constexpr int64_t kLine = 64 / int64_t(sizeof *from);
        for (int64_t c = 0; c < classes; ++c, from += x.class_stride) {
          if (c + kAhead < classes)
            for (int64_t k = 0; k < count; k += kLine)
              __builtin_prefetch(from + kAhead * x.class_stride + k);
          for (int64_t g = 0; g * kW < count; ++g)
            if (wanted[g]) read_run(from + g * kW, 1, kW, to + g * apart + c * kW, 1);
        }
      });
}
template <class R>
inline void write_vectors(const Rows& x, int64_t row, int64_t count, int64_t classes, const R* from,
                          int64_t apart) {
  constexpr int kW = kLanes<R>;
  by_vectors<R>(
      x, row, count,
      [&](int64_t g, int64_t rows) KDK_LAMBDA {
        write_lanes(x, row + g * kW, rows, classes, from + g * apart);
      },
      [&](auto* to) KDK_LAMBDA {
        for (int64_t c = 0; c < classes; ++c, to += x.class_stride)
          for (int64_t g = 0; g * kW < count; ++g)
            write_run(to + g * kW, 1, kW, from + g * apart + c * kW, 1);
      });
}

}  // namespace kdkernels::KDK_ISA
