// Generalised Jensen-Shannon divergence, 0 < beta < 1. Specification: kdkernels/reference/jsd.py.
#pragma once

#include "contract.h"

namespace kdkernels::rules::jsd {

struct Rule {
  static constexpr Family family = Family::divergence;
  static constexpr bool centred = false;
  static constexpr bool cuda = false;  // Triton serves GPUs: a rule's CUDA kernels of its own cost too much

  // beta p log(p / m) + (1 - beta) q log(q / m) with m = beta p + (1 - beta) q, each logarithm from the
  // ratio of p and q, so that neither is the difference of larger ones.
  template <class F>
  KDK_FN static void pointwise(const Options& options, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    using R = scalar_t<F>;
    const R of_p = R(options.value[0]), of_q = R(1.0 - options.value[0]);
    const F square = d * d;
    const auto near = square < R(0.0625);
    // Bounded, because one that overflows belongs to a probability that is as good as 0.
    const F most = broadcast<F>(std::numeric_limits<R>::max() / R(4));
    const F p_over_q = smaller(F(p / q), most), q_over_p = smaller(F(q / p), most);
    const F less_one = select(near, F(phi_series(F(-d)) * square + d), F(p_over_q - R(1)));
    const F inverse_less_one = select(near, F(-(less_one * q_over_p)), F(q_over_p - R(1)));
    const F x = -logarithm_of(F(q_over_p * of_q + of_p), F(inverse_less_one * of_q));
    const F y = -logarithm_of(F(p_over_q * of_p + of_q), F(less_one * of_p));
    // Near p = q by terms >= 0, p (m / p - 1 + x), whose parts m - p and m - q cancel in the sum.
    const F of_x = select(near, F(phi_series(x) * x * x), x), of_y = select(near, F(phi_series(y) * y * y), y);
    value = select(p == R(0), F{}, F(p * of_x * of_p)) + select(q == R(0), F{}, F(q * of_y * of_q));
    value = select(value < R(0), F{}, value);  // of numbers so small that their products are 0
    slope = select(q == R(0), F{}, F(q * y * of_q));
  }
};

}  // namespace kdkernels::rules::jsd
