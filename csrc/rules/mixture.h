// a KL(p || m) + b KL(q || m) with the mixture m = c p + e q, c + e = 1 and both > 0: Jensen-Shannon
// and both skew divergences. Options: c, e, a, b. Specification: kdkernels/reference/mixture.py.
#pragma once

#include "contract.h"

namespace kdkernels::rules::mixture {

struct Rule {
  static constexpr Family family = Family::divergence;
  static constexpr bool centred = false;
  static constexpr bool cuda = false;  // Triton serves GPUs: a rule's CUDA kernels of its own cost too much

  // x = log(p / m) and y = log(q / m), each from the ratio of p and q, so that neither is the difference
  // of larger ones. Both divergences are sums of terms >= 0, p (m / p - 1 + x), whose parts m - p and
  // m - q cancel where a = c and b = e; what remains of them is excess (q - p).
  template <class F>
  KDK_FN static void pointwise(const Options& options, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    using R = scalar_t<F>;
    const double* const given = options.value;
    const R of_p = R(given[0]), of_q = R(given[1]), a = R(given[2]), b = R(given[3]);
    const R excess = R(given[2] * given[1] - given[3] * given[0]);
    const F square = d * d;
    const auto near = square < R(0.0625);
    // Bounded, because one that overflows belongs to a probability that is as good as 0.
    const F most = broadcast<F>(std::numeric_limits<R>::max() / R(4));
    const F p_over_q = smaller(F(p / q), most), q_over_p = smaller(F(q / p), most);
    const F less_one = select(near, F(phi_series(F(-d)) * square + d), F(p_over_q - R(1)));
    const F inverse_less_one = select(near, F(-(less_one * q_over_p)), F(q_over_p - R(1)));
    const F x = -logarithm_of(F(q_over_p * of_q + of_p), F(inverse_less_one * of_q));
    const F y = -logarithm_of(F(p_over_q * of_p + of_q), F(less_one * of_p));
    const F of_x = select(near, F(phi_series(x) * x * x), x), of_y = select(near, F(phi_series(y) * y * y), y);
    value = select(p == R(0), F{}, F(p * of_x * a)) + select(q == R(0), F{}, F(q * of_y * b));
    value = value + select(near, F{}, F((q - p) * excess));
    value = select(value < R(0), F{}, value);  // of numbers so small that their products are 0
    // p / m - 1, which is 1 / c - 1 at most.
    const F ratio = less_one / (less_one * of_p + R(1)) * of_q;
    slope = select(q == R(0), F{}, F(q * (y * b - ratio * excess)));
  }
};

}  // namespace kdkernels::rules::mixture
