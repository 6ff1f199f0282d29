// Sixteen bytes of a row at a time, and single elements of any dtype.
#pragma once

#include <cstring>

#include "../problem.h"
#include "device.cuh"

namespace kdkernels::cuda {

template <class T>
constexpr int kPack = 16 / int(sizeof(T));  // elements in 16 bytes

template <class T>
struct alignas(16) Pack {
  T x[kPack<T>];
};
template <class T>
KDK_DEVICE Pack<T> as_pack(const Bits16& bits) {
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}
template <class T>
KDK_DEVICE Bits16 as_bits(const Pack<T>& pack) {
  Bits16 bits;
  memcpy(&bits, &pack, sizeof bits);
  return bits;
}
template <class T>
KDK_DEVICE T lowest() {
  return narrow<T>(-INFINITY);
}
template <class T>
KDK_DEVICE Bits16 filled(T x) {
  Pack<T> pack;
  KDK_UNROLL
  for (int k = 0; k < kPack<T>; ++k) pack.x[k] = x;
  return as_bits(pack);
}
template <class T>
KDK_DEVICE void exclude_element(Bits16& bits, int64_t which) {
  Pack<T> pack = as_pack<T>(bits);
  KDK_UNROLL
  for (int k = 0; k < kPack<T>; ++k)
    if (k == which) pack.x[k] = lowest<T>();
  bits = as_bits(pack);
}

// 16 bytes of each side; what the sources with packs do with them.
template <class T>
struct PackPair {
  Bits16 s, t;

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    KDK_UNROLL
    for (int k = 0; k < kPack<T>; ++k) f(element<T>(s, k), element<T>(t, k));
  }
  template <class F>
  KDK_DEVICE Bits16 map(const F& f) const {
    Pack<T> g;
    KDK_UNROLL
    for (int k = 0; k < kPack<T>; ++k) g.x[k] = narrow<T>(f(element<T>(s, k), element<T>(t, k)));
    return as_bits(g);
  }
  KDK_DEVICE void exclude(int64_t which) {
    exclude_element<T>(s, which);
    exclude_element<T>(t, which);
  }
};

// Maxima of packs, kept packed: two elements an instruction where T has 2 bytes.
template <class T>
struct PackMaxima {
  PackPair<T> most{filled<T>(lowest<T>()), filled<T>(lowest<T>())};

  KDK_DEVICE void add(const PackPair<T>& pack) {
    most.s = larger<T>(most.s, pack.s);
    most.t = larger<T>(most.t, pack.t);
  }
  KDK_DEVICE void join(float (&origin)[2]) const {
    origin[0] = larger(origin[0], largest(most.s));
    origin[1] = larger(origin[1], largest(most.t));
  }

 private:
  KDK_DEVICE static float largest(Bits16 x) {  // folded while an instruction takes two elements
    x = larger<T>(x, Bits16{{x.word[2], x.word[3], x.word[0], x.word[1]}});
    x = larger<T>(x, Bits16{{x.word[1], x.word[0], x.word[3], x.word[2]}});
    return sizeof(T) == 2 ? larger(element<T>(x, 0), element<T>(x, 1)) : element<T>(x, 0);
  }
};

// `count` elements that begin so many bytes beside a multiple of 16: `head` of them, then whole packs, then the
// tail.
template <class T>
struct Extent {
  int count, head, packed;  // elements

  KDK_DEVICE Extent(int beside, int count) : count(count), head((16 - beside) % 16 / int(sizeof(T))) {
    if (head > count) head = count;
    packed = (count - head) / kPack<T> * kPack<T>;
  }
  KDK_DEVICE static int beside(const T* from) { return int(reinterpret_cast<uintptr_t>(from) & 15); }
  // The edges, head and tail, are fewer than two packs: element `which` of them, -1 where there is none.
  KDK_DEVICE int edge(int which) const {
    const int at = which < head ? which : which + packed;
    return at < count ? at : -1;
  }
  // So many elements of the whole packs are the ones from `begin` to `end` of them.
  KDK_DEVICE int within(int begin, int end) const {
    const int many = (packed < end ? packed : end) - begin;
    return many > 0 ? many : 0;
  }
};

// Row `row` of a pair whose classes are adjacent, T on both sides.
template <class T>
struct RowPointers {
  const T *s, *t;
  T* g;  // null where no gradient is wanted

  template <class Problem>
  KDK_DEVICE RowPointers(const Problem& problem, int64_t row)
      : RowPointers(problem, row, [row](const Rows& x) { return x.offset(row); }) {}
  template <class Problem, class Offset>
  KDK_DEVICE RowPointers(const Problem& problem, int64_t row, const Offset& offset)
      : s(static_cast<const T*>(problem.student.data) + offset(problem.student)),
        t(static_cast<const T*>(problem.teacher.data) + offset(problem.teacher)),
        g(problem.gradient.data && row < problem.rows
              ? static_cast<T*>(problem.gradient.data) + offset(problem.gradient)
              : nullptr) {}

  KDK_DEVICE float student(int64_t c) const { return widen(s[c]); }
  KDK_DEVICE float teacher(int64_t c) const { return widen(t[c]); }
};

// An element of any dtype as R.
template <class R>
KDK_DEVICE R load_element(const Rows& x, int64_t at) {
  switch (x.type) {
    case Scalar::f64: return R(static_cast<const double*>(x.data)[at]);
    case Scalar::f32: return R(static_cast<const float*>(x.data)[at]);
    case Scalar::f16: return R(widen(static_cast<const f16*>(x.data)[at]));
    default: return R(widen(static_cast<const bf16*>(x.data)[at]));
  }
}
template <class R>
KDK_DEVICE void store_element(const Rows& x, int64_t at, R value) {
  switch (x.type) {
    case Scalar::f64: static_cast<double*>(x.data)[at] = double(value); break;
    case Scalar::f32: static_cast<float*>(x.data)[at] = float(value); break;
    case Scalar::f16: static_cast<f16*>(x.data)[at] = narrow<f16>(float(value)); break;
    default: static_cast<bf16*>(x.data)[at] = narrow<bf16>(float(value)); break;
  }
}

}  // namespace kdkernels::cuda
