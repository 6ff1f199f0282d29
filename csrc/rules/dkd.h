// DKD: alpha TCKD + beta NCKD. Specification: kdkernels/reference/dkd.py.
#pragma once

#include "kd.h"

namespace kdkernels::rules::dkd {

struct Rule {
  static constexpr Family family = Family::decoupled;
  using Implicit = kd::Rule;  // the divergence on the classes other than the target

  // The explicit term of one row, from the two-point distributions of teacher and student: its value,
  // its slope d value / d (student's log-odds of the target), and the weight of the implicit term.
  template <class F>
  KDK_FN static void explicit_term(const Options& options, const TwoPoint<F>& p,
                                   const TwoPoint<F>& q, F& value, F& slope, F& implicit_weight) {
    using R = scalar_t<F>;
    const R alpha = R(options.value[0]), beta = R(options.value[1]);
    binary_kl(p, q, value, slope);
    value = weighted(value, alpha);
    slope = slope * alpha;
    implicit_weight = broadcast<F>(beta);
  }
};

}  // namespace kdkernels::rules::dkd
