// IE-KD: similarity of normalised factors. Specification: kdkernels/reference/iekd.py.
#pragma once

#include "math.h"

namespace kdkernels::rules::iekd {

struct Rule {
  static constexpr Family family = Family::factor;
  static constexpr double eps = 1e-12;  // lower bound of a norm
  static constexpr double shrink = 0x1p-600;  // what a double is multiplied by whose square is none

  // One element of the normalised factors x and t: the term of the sample's sum V, and the direction
  // u whose projection P = sum u x the gradient needs. L1: |x - t| and its sign; cosine: (x - t)^2 / 2
  // (1 - cos without cancellation) and t, so that P is the cosine.
  template <bool kCosine, class F>
  KDK_FN static void element(const F& x, const F& t, F& term, F& direction) {
    using R = scalar_t<F>;
    const F d = x - t;
    if constexpr (kCosine) {
      term = R(0.5) * d * d;
      direction = t;
    } else {
      const F one = broadcast<F>(R(1));
      term = select(d < F{}, F(-d), d);
      direction = select(d > F{}, one, F{}) - select(d < F{}, one, F{});
    }
  }

  // A sample: its value, and the sign that multiplies the projected direction in the gradient. `unit`:
  // both vectors have norm 1 (a norm below eps leaves a shorter one).
  template <bool kCosine, class R>
  KDK_FN static void sample(bool inherits, bool unit, R sum, R projection, R& value, R& sign) {
    if constexpr (!kCosine) {
      sign = inherits ? R(1) : R(-1);
      value = sign * sum;
    } else if (inherits) {
      sign = R(-1);
      value = unit ? sum : R(1) - projection;
    } else {
      sign = R(projection > R(0)) - R(projection < R(0));
      value = projection < R(0) ? -projection : projection;
    }
  }
};

}  // namespace kdkernels::rules::iekd
