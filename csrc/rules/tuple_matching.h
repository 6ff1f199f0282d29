// REFILLED's tuple matching: KL between softmaxes over a tuple. Specification:
// kdkernels/reference/refilled.py.
#pragma once

#include "math.h"

namespace kdkernels::rules::tuple_matching {

struct Rule {
  static constexpr Family family = Family::tuple;

  // One member of a tuple, with d = log p - log q: its part of KL(p || q), and q - p
  // (of any d where p = 0).
  template <class F>
  KDK_FN static void member(const F& p, const F& q, const F& d, F& value, F& slope) {
    kl_terms(p, q, d, value, slope);
  }
};

}  // namespace kdkernels::rules::tuple_matching
