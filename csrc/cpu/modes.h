// How a row lies in the lanes of a vector; the traversals are written once for both.
//
//   ByClass  lanes are consecutive classes of one row; per-row terms are scalars.
//   ByRow    lanes are different rows, one class at a time (dense (N, C, H, W) logits, whose classes
//            are far apart); per-row terms are vectors and nothing is reduced across lanes.
//
// Both walk `steps()` vectors; `sweep` calls a body for each and `flush` every 64, so that sums are
// kept in blocks and their rounding error does not grow with the number of classes.
#pragma once

#include "simd.h"

namespace kdkernels::KDK_ISA {

constexpr int64_t kFlush = 64;

template <class R>
struct ByClass {
  using Real = R;
  using V = Vec<R>;
  using S = R;

  int64_t classes;
  int64_t excluded = -1;  // the target class, where it stands apart

  int64_t whole() const { return classes / kLanes<R>; }
  int rest() const { return int(classes % kLanes<R>); }

  template <bool kPart>
  KDK_FN V get(const R* p, int64_t step, R fill) const {
    if constexpr (kPart) return load_part<R>(p + step * kLanes<R>, rest(), fill);
    return load<R>(p + step * kLanes<R>);
  }
  template <bool kPart>
  KDK_FN void put(R* p, int64_t step, const V& v) const {
    if constexpr (kPart) return store_part<R>(p + step * kLanes<R>, v, rest());
    store<R>(p + step * kLanes<R>, v);
  }
  // The lanes of this step that are the excluded class get `fill`.
  KDK_FN void exclude(int64_t step, V& v, R fill) const {
    if (__builtin_expect(step == excluded / kLanes<R> && excluded >= 0, 0))
      v[excluded % kLanes<R>] = fill;
  }
  KDK_FN void replace(int64_t step, V& v, const V& value) const {
    if (__builtin_expect(step == excluded / kLanes<R> && excluded >= 0, 0))
      v[excluded % kLanes<R>] = value[0];
  }
  KDK_FN void set_excluded(int64_t, V&, const V&) const {}  // see finish_excluded
  template <class Sink>
  KDK_FN void finish_excluded(const Sink& gradient, const S& value) const {
    gradient.set(excluded, value);
  }
  KDK_FN S pick_excluded(const R* p) const { return p[excluded]; }
  KDK_FN S first(const R* p) const { return p[0]; }
  // Numbers of the classes, of which there is one each.
  KDK_FN static V of_class(const R* numbers, int64_t step) {
    return load<R>(numbers + step * kLanes<R>);
  }
  KDK_FN static V spread(const S& s) { return splat<R>(s); }
  KDK_FN static S first_of(const V& v) { return v[0]; }
  KDK_FN static S sum(const V& v) { return reduce_sum<R>(v); }
  KDK_FN static S max(const V& v) { return reduce_max<R>(v); }
};

template <class R>
struct ByRow {
  using Real = R;
  using V = Vec<R>;
  using S = V;
  using I = typename Simd<R>::I;

  int64_t classes;
  I excluded{};  // the target class of each lane's row

  int64_t whole() const { return classes; }
  int rest() const { return 0; }

  template <bool>
  KDK_FN V get(const R* p, int64_t step, R) const {
    return load<R>(p + step * kLanes<R>);
  }
  template <bool>
  KDK_FN void put(R* p, int64_t step, const V& v) const {
    store<R>(p + step * kLanes<R>, v);
  }
  KDK_FN I is_excluded(int64_t step) const { return excluded == typename Simd<R>::Int(step); }
  KDK_FN void exclude(int64_t step, V& v, R fill) const {
    v = rules::select(is_excluded(step), splat<R>(fill), v);
  }
  KDK_FN void replace(int64_t step, V& v, const V& value) const {
    v = rules::select(is_excluded(step), value, v);
  }
  KDK_FN void set_excluded(int64_t step, V& v, const V& value) const { replace(step, v, value); }
  template <class Sink>
  KDK_FN void finish_excluded(const Sink&, const S&) const {}
  KDK_FN S pick_excluded(const R* p) const {
    S s{};
    for (int lane = 0; lane < kLanes<R>; ++lane) s[lane] = p[excluded[lane] * kLanes<R> + lane];
    return s;
  }
  KDK_FN S first(const R* p) const { return load<R>(p); }
  KDK_FN static V of_class(const R* numbers, int64_t step) { return splat<R>(numbers[step]); }
  KDK_FN static V spread(const S& s) { return s; }
  KDK_FN static S first_of(const V& v) { return v; }
  KDK_FN static S sum(const V& v) { return v; }
  KDK_FN static S max(const V& v) { return v; }
};

template <bool kPart>
struct Part {
  static constexpr bool value = kPart;
};

template <class M, class Body, class Flush>
KDK_FN void sweep(const M& mode, Body&& body, Flush&& flush) {
  const int64_t whole = mode.whole();
  for (int64_t begin = 0; begin < whole; begin += kFlush) {
    const int64_t end = begin + kFlush < whole ? begin + kFlush : whole;
    for (int64_t step = begin; step < end; ++step) body(step, Part<false>{});
    flush();
  }
  if (mode.rest()) {
    body(whole, Part<true>{});
    flush();
  }
}

// Zero in the lanes past the end of the row.
template <class M>
KDK_FN typename M::V mask_rest(const M& mode, const typename M::V& v) {
  using R = typename M::Real;
  return rules::select(lane_numbers<R>(0) < typename Simd<R>::Int(mode.rest()), v,
                       typename M::V{});
}

// A sum kept in blocks.
template <class V>
struct Blocked {
  V block{}, total{};
  KDK_FN void add(const V& v) { block += v; }
  KDK_FN void flush() {
    total += block;
    block = V{};
  }
};

}  // namespace kdkernels::KDK_ISA
