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

}  // namespace kdkernels::KDK_ISA
