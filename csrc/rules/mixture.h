// a KL(p || m) + b KL(q || m) with the mixture m = c p + e q, c + e = 1 and both > 0: Jensen-Shannon
// and both skew divergences. Options: c, e, a, b. Specification: kdkernels/reference/mixture.py.
#pragma once

#include "contract.h"

namespace kdkernels::rules::mixture {

// Both divergences are sums of terms >= 0, p log(p / m) - (p - m) and the like with q. With
// delta = (p - q) / m, which is exact near equality, they are m (x log x - (x - 1)) of the ratios
// x = p / m = 1 + e delta and x = q / m = 1 - c delta: one quotient serves all. The slope per q is
//   b log(q / m) - e (a e - b c) delta  =  -b (x - 1 - log x) - (a e^2 + b c^2) delta,  x = q / m.
// Where x is near 1 the second form has terms that do not cancel however small a share is; far from it
// the first one has.
//
// What depends on the options alone is the same for all classes, and the processor foresees the branch.
struct Rule {
  static constexpr Family family = Family::divergence;
  static constexpr bool centred = false;
  static constexpr bool cuda = false;  // Triton serves GPUs: a rule's CUDA kernels of its own cost too much

  template <class F>
  KDK_FN static void pointwise(const Options& options, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    const double *const given = options.value, share = 1.0 / 16.0;
    const bool balanced = given[0] == given[2] && given[1] == given[3];
    if (balanced && given[0] >= share && given[1] >= share)
      jensen_shannon(options, p, q, d, value, slope);
    else general(options, p, q, d, value, slope);
  }

 private:
  // 1 / m, which stays finite where m underflows.
  template <class F>
  KDK_FN static F inverse(const F& m) {
    using R = scalar_t<F>;
    const F least = broadcast<F>(std::numeric_limits<R>::min());
    return R(1) / select(m < least, least, m);  // NaN stays
  }

  template <class F>
  KDK_FN static void general(const Options& options, const F& p, const F& q, const F& d, F& value,
                             F& slope) {
    using R = scalar_t<F>;
    const double* const given = options.value;
    // A ratio of 1 / share, and that times its logarithm, must not overflow.
    const R least = std::numeric_limits<R>::min() * R(1024);
    const R of_p = given[0] > least ? R(given[0]) : least;
    const R of_q = given[1] > least ? R(given[1]) : least;
    const R a = R(given[2]), b = R(given[3]);
    F unused, gap;  // q - p
    kl_terms(p, q, d, unused, gap);
    const F m = p * of_p + q * of_q, inverse_m = inverse(m);
    const F delta = -gap * inverse_m;
    value = F{};
    slope = delta * -R(given[2] * given[1] * given[1] + given[3] * given[0] * given[0]);
    F log, over, under;
    if (a != R(0)) {
      logarithm_terms(F(p * inverse_m), F(delta * of_q), log, over, unused);
      value = over * a;
    }
    if (b != R(0)) {
      const F z = delta * -of_p;
      logarithm_terms(F(q * inverse_m), z, log, over, under);
      value = value + over * b;
      const R excess = R(given[1] * (given[2] * given[1] - given[3] * given[0]));
      slope = select(z * z < R(0.0625), F(slope - under * b), F(log * b - delta * excess));
    }
    value = m * value;
    value = select(value < R(0), F{}, value);  // of numbers so small that they are no ratios
    slope = q * slope;
  }

  // Jensen-Shannon with shares of which neither is small, by one logarithm: that of the larger
  // probability, from which the smaller one's differs by |d|. With w the smaller one's share of m,
  //   value = w KL's term of (smaller || larger) - m (z - log(1 + z)),  z = larger / m - 1,
  // of which the second part is w times the first near equality.
  template <class F>
  KDK_FN static void jensen_shannon(const Options& options, const F& p, const F& q, const F& d, F& value,
                                    F& slope) {
    using R = scalar_t<F>;
    const R of_p = R(options.value[0]), of_q = R(options.value[1]);
    const auto teacher_larger = p > q;
    const F larger = select(teacher_larger, p, q), smaller = select(teacher_larger, q, p);
    const F below = select(teacher_larger, F(-d), d);
    const F share = select(teacher_larger, broadcast<F>(of_q), broadcast<F>(of_p));
    F divergence, gap, log, unused, under;
    kl_terms(smaller, larger, below, divergence, gap);
    const F m = p * of_p + q * of_q, inverse_m = inverse(m);
    logarithm_terms(F(larger * inverse_m), F(gap * inverse_m * share), log, unused, under);
    value = divergence * share - m * under;
    value = select(value < R(0), F{}, value);  // of numbers so small that they are no ratios
    log = log + m * R(0);  // NaN
    slope = select(q == R(0), F{}, F(q * of_q * select(teacher_larger, F(log + below), log)));
  }
};

}  // namespace kdkernels::rules::mixture
