// Where stage 1 takes logits from, and where the gradient goes, in the tensor's own type: half
// precision is converted on the way, so that it costs no pass of its own.
#pragma once

#include "convert.h"
#include "modes.h"

namespace kdkernels::KDK_ISA {

// Logits in the working type, read where they lie.
template <class R>
struct InPlace {
  const R* from;

  template <bool kPart, class M>
  KDK_FN typename M::V get(const M& mode, int64_t step, R fill) const {
    return mode.template get<kPart>(from, step, fill);
  }
};

// A run of half-precision logits, left in the working type at `to` as well.
template <class T>
struct Widened {
  const T* from;
  float* to;

  template <bool kPart, class M>
  KDK_FN VecF get(const M& mode, int64_t step, float fill) const {
    constexpr int kW = kLanes<float>;
    if constexpr (kPart) {
      const VecF v = widen_part(from + step * kW, mode.rest());
      store<float>(to + step * kW, v);
      return rules::select(lane_numbers<float>(0) < mode.rest(), v, splat<float>(fill));
    } else {
      const VecF v = widen_vector(from + step * kW);
      store<float>(to + step * kW, v);
      return v;
    }
  }
};

// A row of the gradient, in the working type R or in half precision.
template <class T, class R>
struct Sink {
  T* to;

  template <bool kPart, class M>
  KDK_FN void put(const M& mode, int64_t step, const typename M::V& v) const {
    if constexpr (std::is_same_v<T, R>) {
      mode.template put<kPart>(to, step, v);
    } else if constexpr (kPart) {
      narrow_part(to + step * kLanes<R>, v, mode.rest());
    } else {
      narrow_vector(to + step * kLanes<R>, v);
    }
  }
  KDK_FN void set(int64_t index, R value) const {
    if constexpr (std::is_same_v<T, R>) to[index] = value;
    else to[index] = narrow<T>(value);
  }
};

// Maxima of a row pair, two chains wide each to hide the latency.
template <bool kExclude, class M, class A, class B>
KDK_FN void maxima(const M& mode, const A& s, const B& t, typename M::S& max_s,
                   typename M::S& max_t) {
  using V = typename M::V;
  using R = typename M::Real;
  const R fill = -kInfinity<R>;
  V s0 = splat<R>(fill), s1 = s0, t0 = s0, t1 = s0;
  const auto fetch = [&](const auto& x, int64_t i, auto part) KDK_LAMBDA {
    V v = x.template get<decltype(part)::value>(mode, i, fill);
    if constexpr (kExclude) mode.exclude(i, v, fill);
    return v;
  };
  const int64_t whole = mode.whole();
  int64_t i = 0;
  for (; i + 2 <= whole; i += 2) {
    s0 = maximum(s0, fetch(s, i, Part<false>{}));
    t0 = maximum(t0, fetch(t, i, Part<false>{}));
    s1 = maximum(s1, fetch(s, i + 1, Part<false>{}));
    t1 = maximum(t1, fetch(t, i + 1, Part<false>{}));
  }
  if (i < whole) {
    s0 = maximum(s0, fetch(s, i, Part<false>{}));
    t0 = maximum(t0, fetch(t, i, Part<false>{}));
  }
  if (mode.rest()) {
    s1 = maximum(s1, fetch(s, whole, Part<true>{}));
    t1 = maximum(t1, fetch(t, whole, Part<true>{}));
  }
  max_s = M::max(maximum(s0, s1));
  max_t = M::max(maximum(t0, t1));
}

}  // namespace kdkernels::KDK_ISA
