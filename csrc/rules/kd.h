// KD: KL(p || q) of the softened distributions. Specification: kdkernels/reference/kd.py.
#pragma once

#include "math.h"

namespace kdkernels::rules::kd {

struct Rule {
  static constexpr Family family = Family::divergence;
  // Whether the slopes of a row sum to zero by construction, so that the gradient needs no second
  // sweep to project them.
  static constexpr bool centred = true;

  // value and slope = d value / d log q of one class, from p, q and d = log p - log q
  // (of any value where p = 0).
  template <class F>
  KDK_FN static void pointwise(const Options&, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    kl_terms(p, q, d, value, slope);
  }
};

}  // namespace kdkernels::rules::kd
