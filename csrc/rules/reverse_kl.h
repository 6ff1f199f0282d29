// Reverse KL: KL(q || p) of the softened distributions. Specification: kdkernels/reference/reverse_kl.py.
#pragma once

#include "contract.h"

namespace kdkernels::rules::reverse_kl {

struct Rule {
  static constexpr Family family = Family::divergence;
  static constexpr bool centred = false;
  static constexpr bool cuda = false;  // Triton serves GPUs: a rule's CUDA kernels of its own cost too much

  template <class F>
  KDK_FN static void pointwise(const Options&, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    using R = scalar_t<F>;
    F gap;
    kl_terms(q, p, F(-d), value, gap);
    slope = select(q == R(0), F{}, F(-(q * d)));
  }
};

}  // namespace kdkernels::rules::reverse_kl
