// DKD: alpha TCKD + beta NCKD. Specification: kdkernels/reference/dkd.py.
#pragma once

#include "kd.h"

namespace kdkernels::rules::dkd {

struct Rule {
  static constexpr Family family = Family::decoupled;
  using Implicit = kd::Rule;  // the divergence on the classes other than the target

  // The explicit term of one row from log p_t, log(1 - p_t), log q_t, log(1 - q_t): its value, its
  // slope d value / d (student's log-odds of the target), and the weight of the implicit term.
  template <class F>
  KDK_FN static void explicit_term(const Options& options, const F& log_p_t, const F& log_p_n,
                                   const F& log_q_t, const F& log_q_n, F& value, F& slope,
                                   F& implicit_weight) {
    using R = scalar_t<F>;
    const R alpha = R(options.value[0]), beta = R(options.value[1]);
    binary_kl(log_p_t, log_p_n, log_q_t, log_q_n, value, slope);
    value = value * alpha;
    slope = slope * alpha;
    implicit_weight = broadcast<F>(beta);
  }
};

}  // namespace kdkernels::rules::dkd
