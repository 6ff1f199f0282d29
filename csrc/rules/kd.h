// KD: KL(p || q) of the softened distributions. Specification: kdkernels/reference/kd.py.
#pragma once

#include "contract.h"

namespace kdkernels::rules::kd {

struct Rule {
  static constexpr Family family = Family::divergence;
  static constexpr bool centred = true;

  template <class F>
  KDK_FN static void pointwise(const Options&, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    kl_terms(p, q, d, value, slope);
  }
};

}  // namespace kdkernels::rules::kd
