// DIST: Pearson correlation of rows and of columns. Specification: kdkernels/reference/dist.py.
#pragma once

#include "math.h"

namespace kdkernels::rules::dist {

struct Rule {
  static constexpr Family family = Family::correlation;
  static constexpr bool sigmoid = false;  // of softmaxes

  // 1 - rho from the centred sums of squares and products of a = q~ and b = p~ over a row or a
  // column, and the derivative as coefficients: d(1 - rho) / d q = of_p * b + of_q * a.
  template <class R>
  KDK_FN static R relation(R aa, R bb, R ab, R eps, R& of_p, R& of_q) {
    const R norm_a = root(aa), norm_b = root(bb), total = norm_a * norm_b + eps;
    // A constant has the correlation 0, whatever eps is; so has what underflows with it.
    const R inverse = total < 1024 * std::numeric_limits<R>::min() ? R(0) : quotient(R(1), total);
    const R rho = ab * inverse;
    // Of squares that are not normal numbers the derivative, of size 1 / aa, has no digits and may
    // overflow; infinity times what hardly varies would be NaN.
    const R on_a = rho * quotient(norm_b, norm_a) * inverse;
    const R largest = R(1) / (4 * std::numeric_limits<R>::min());
    const auto lost = (on_a > largest) | (on_a < -largest);
    of_p = lost ? R(0) : -inverse;
    of_q = lost | (norm_a == R(0)) ? R(0) : on_a;  // a norm's subgradient at 0
    return R(1) - rho;
  }
};

}  // namespace kdkernels::rules::dist
