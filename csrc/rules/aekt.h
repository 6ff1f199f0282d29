// AEKT (reconstructed): alpha ratio^kappa TCKD + beta NCKD. Specification: kdkernels/reference/aekt.py.
#pragma once

#include "kd.h"

namespace kdkernels::rules::aekt {

struct Rule {
  static constexpr Family family = Family::decoupled;
  using Implicit = kd::Rule;

  // As in dkd.h, with the explicit term weighted by the teacher/student ratio, a constant.
  template <class F>
  KDK_FN static void explicit_term(const Options& options, const TwoPoint<F>& p,
                                   const TwoPoint<F>& q, F& value, F& slope, F& implicit_weight) {
    using R = scalar_t<F>;
    const R alpha = R(options.value[0]), beta = R(options.value[1]);
    const R kappa = R(options.value[2]), ratio_max = R(options.value[3]);
    const F none = broadcast<F>(-std::numeric_limits<R>::infinity());
    const F log_ratio = select(p.log_t == none, none, F(p.log_t - q.log_t));
    const F bounded = smaller(log_ratio, broadcast<F>(std::log(ratio_max)));
    // kappa = 0 is 1 even at a ratio of 0, as 0^0 is.
    const F weight = kappa == R(0) ? broadcast<F>(R(1)) : exponential(F(bounded * kappa));
    binary_kl(p, q, value, slope);
    value = weighted(weighted(value, weight), alpha);
    slope = slope * weight * alpha;
    implicit_weight = broadcast<F>(beta);
  }
};

}  // namespace kdkernels::rules::aekt
