// DIST: Pearson correlation of rows and of columns. Specification: kdkernels/reference/dist.py.
#pragma once

#include "math.h"

namespace kdkernels::rules::dist {

struct Rule {
  static constexpr Family family = Family::correlation;

  // 1 - rho from the centred sums of squares and products of a = q~ and b = p~ over a row or a
  // column, and the derivative as coefficients: d(1 - rho) / d q = of_p * b + of_q * a.
  template <class R>
  KDK_FN static R relation(R aa, R bb, R ab, R eps, R& of_p, R& of_q) {
    const R norm_a = root(aa), norm_b = root(bb), total = norm_a * norm_b + eps;
    // A constant has the correlation 0, whatever eps is; so has what underflows with it.
    const R inverse = total < 1024 * std::numeric_limits<R>::min() ? R(0) : quotient(R(1), total);
    const R rho = ab * inverse;
    of_p = -inverse;
    of_q = norm_a == R(0) ? R(0) : rho * quotient(norm_b, norm_a) * inverse;  // a norm's subgradient at 0
    return R(1) - rho;
  }
};

}  // namespace kdkernels::rules::dist
