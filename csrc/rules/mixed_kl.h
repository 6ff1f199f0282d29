// w KL(p || q) + (1 - w) KL(q || p), 0 <= w <= 1; w = 0 is reverse KL. Specification:
// kdkernels/reference/mixed_kl.py.
#pragma once

#include "contract.h"

namespace kdkernels::rules::mixed_kl {

struct Rule {
  static constexpr Family family = Family::divergence;
  static constexpr bool centred = false;
  static constexpr bool cuda = false;  // Triton serves GPUs: a rule's CUDA kernels of its own cost too much

  template <class F>
  KDK_FN static void pointwise(const Options& options, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    using R = scalar_t<F>;
    const R forward = R(options.value[0]), reverse = R(1.0 - options.value[0]);
    value = F{};
    slope = F{};
    F of_p, of_q, gap;
    if (forward != R(0)) {  // the same for all classes: the processor foresees it
      kl_terms(p, q, d, of_p, gap);
      value = weighted(of_p, forward);
      slope = gap * forward;
    }
    if (reverse != R(0)) {
      kl_terms(q, p, F(-d), of_q, gap);
      value = value + weighted(of_q, reverse);
      slope = slope + select(q == R(0), F{}, F(-(q * d) * reverse));
    }
  }
};

}  // namespace kdkernels::rules::mixed_kl
