// Total variation: half the sum of |p - q|. Specification: kdkernels/reference/tv.py. With an option
// other than 0 the value alone: the overlap, the sum of min(p, q), which is 1 less that, with its digits
// where it is small (acceptance_loss; what the contract says of p = q is not for it).
#pragma once

#include "contract.h"

namespace kdkernels::rules::tv {

struct Rule {
  static constexpr Family family = Family::divergence;
  static constexpr bool centred = false;
  static constexpr bool cuda = false;  // Triton serves GPUs: a rule's CUDA kernels of its own cost too much

  template <class F>
  KDK_FN static void pointwise(const Options& options, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    using R = scalar_t<F>;
    if (options.value[0] != 0) {  // the same for all classes: the processor foresees it
      value = select(p < q, p, q);
      slope = F{};
      return;
    }
    F unused, gap;  // q - p, exact where both are nearly equal
    kl_terms(p, q, d, unused, gap);
    value = select(gap < R(0), F(-gap), gap) * R(0.5);  // NaN stays
    // Closer than that, the sign would be that of a rounding error.
    const F equal = q * (R(16) * std::numeric_limits<R>::epsilon());
    const auto more = gap > equal, less = gap < -equal;
    slope = select(more, F(q * R(0.5)), select(less, F(q * R(-0.5)), F(gap * R(0))));
  }
};

}  // namespace kdkernels::rules::tv
