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
  // m - q cancel where a = c and b = e; what remains of them is excess (q - p). A divergence of weight 0
  // costs nothing: the options are those of all classes, and the processor foresees the branch.
  template <class F>
  KDK_FN static void pointwise(const Options& options, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    using R = scalar_t<F>;
    const double* const given = options.value;
    const R of_p = R(given[0]), of_q = R(given[1]), a = R(given[2]), b = R(given[3]);
    const R excess = R(given[2] * given[1] - given[3] * given[0]);
    const F square = d * d;
    const auto near = square < R(0.0625);
    // Bounded, because a ratio that overflows belongs to a probability that is as good as 0.
    const F most = broadcast<F>(std::numeric_limits<R>::max() / R(4));
    F ratio{};  // p / m - 1
    value = F{};
    slope = F{};
    if (a != R(0)) {
      const F q_over_p = smaller(F(q / p), most);
      const F less_one = select(near, F(phi_series(d) * square - d), F(q_over_p - R(1))) * of_q;
      const F m_over_p = q_over_p * of_q + of_p;
      const F x = -logarithm_of(m_over_p, less_one);
      value = select(p == R(0), F{}, F(p * select(near, F(phi_series(x) * x * x), x) * a));
      ratio = select(p == R(0), broadcast<F>(R(-1)), F(-(less_one / m_over_p)));
    }
    if (b != R(0)) {
      const F p_over_q = smaller(F(p / q), most);
      const F less_one = select(near, F(phi_series(F(-d)) * square + d), F(p_over_q - R(1)));
      const F m_over_q = p_over_q * of_p + of_q;
      const F y = -logarithm_of(m_over_q, F(less_one * of_p));
      value = value + select(q == R(0), F{}, F(q * select(near, F(phi_series(y) * y * y), y) * b));
      slope = y * b;
      if (excess != R(0)) ratio = less_one / m_over_q * of_q;
    }
    if (excess != R(0)) {
      value = value + select(near, F{}, F((q - p) * excess));
      slope = slope - ratio * excess;
    }
    value = select(value < R(0), F{}, value);  // of numbers so small that their products are 0
    slope = select(q == R(0), F{}, F(q * slope));
  }
};

}  // namespace kdkernels::rules::mixture
