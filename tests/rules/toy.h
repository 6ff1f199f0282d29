// A rule of no use but to the tests, which run it on every traversal of every backend: not centred, with
// every option in use, and with exp and log of its own. Specification: tests/toy.py.
//
//   a KL(q || p) + b KL(p || q) + c sum log(1 + (q - p)^2) + e sum (exp(p) - exp(q) - (p - q) exp(q))
#pragma once

#include "../../csrc/rules/contract.h"

namespace kdkernels::rules::toy {

struct Rule {
  static constexpr Family family = Family::divergence;
  static constexpr bool centred = false;

  template <class F>
  KDK_FN static void pointwise(const Options& options, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    using R = scalar_t<F>;
    const R a = R(options.value[0]), b = R(options.value[1]);
    const R c = R(options.value[2]), e = R(options.value[3]);
    F forward, gap, reverse, unused;
    kl_terms(p, q, d, forward, gap);
    kl_terms(q, p, F(-d), reverse, unused);
    const F square = gap * gap, growth = exponential(q);
    const F bend = select(square < R(0.0625), F(phi_series(gap) * square),
                          F(exponential_less_one(F(-gap)) + gap));
    value = reverse * a + forward * b + logarithm_of_one_plus(square) * c + growth * bend * e;
    slope = select(q == R(0), F{}, F(-(q * d))) * a + gap * b +
            q * gap * (R(2) * c / (square + R(1)) + growth * e);
  }
};

}  // namespace kdkernels::rules::toy
