// The toy rule on the classes other than the target, next to an explicit term that is not symmetric.
// Specification: tests/toy.py.
#pragma once

#include "toy.h"

namespace kdkernels::rules::toy_decoupled {

struct Rule {
  static constexpr Family family = Family::decoupled;
  using Implicit = toy::Rule;

  // Options as the toy's. (a + e) KL of the two points, which weigh the rest with b + c.
  template <class F>
  KDK_FN static void explicit_term(const Options& options, const TwoPoint<F>& p,
                                   const TwoPoint<F>& q, F& value, F& slope, F& implicit_weight) {
    using R = scalar_t<F>;
    binary_kl(p, q, value, slope);
    value = value * R(options.value[0] + options.value[3]);
    slope = slope * R(options.value[0] + options.value[3]);
    implicit_weight = broadcast<F>(R(options.value[1] + options.value[2]));
  }
};

}  // namespace kdkernels::rules::toy_decoupled
