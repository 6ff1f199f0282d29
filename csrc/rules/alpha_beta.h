// The alpha-beta divergence. Options: alpha, beta, both in [0, 1], at least 1/2 together. Specification:
// kdkernels/reference/alpha_beta.py.
#pragma once

#include "contract.h"

namespace kdkernels::rules::alpha_beta {

struct Rule {
  static constexpr Family family = Family::divergence;
  static constexpr bool centred = false;
  static constexpr bool cuda = false;  // Triton serves GPUs: a rule's CUDA kernels of its own cost too much

  // With X the larger probability to the power alpha + beta, x = |d|, and a the exponent of the smaller
  // one, b the other's: value = X f(x), all terms of which are positive, however small a or b is.
  template <class F>
  KDK_FN static void pointwise(const Options& options, const F& p, const F& q, const F& d, F& value,
                               F& slope) {
    using R = scalar_t<F>;
    const R alpha = R(options.value[0]), beta = R(options.value[1]);
    const R sum = R(options.value[0] + options.value[1]);
    const auto of_student = d < R(0);  // q is the larger
    const F a = select(of_student, broadcast<F>(alpha), broadcast<F>(beta));
    const F b = select(of_student, broadcast<F>(beta), broadcast<F>(alpha));
    const F x = select(of_student, F(-d), d);
    const F larger = select(of_student, q, p);
    const F scale = sum == R(1) ? larger : exponential(F(logarithm(larger) * sum));
    const F y = select(a == R(0), F{}, F(a * x)), z = select(b == R(0), F{}, F(b * x));
    const F decay = exponential(F(-y));
    const auto lost = decay == R(0);
    const F by_a = R(1) / select(a == R(0), broadcast<F>(R(1)), a);
    const F by_b = R(1) / select(b == R(0), broadcast<F>(R(1)), b);
    const F rise = -exponential_less_one(F(-y)), fall = -exponential_less_one(F(-z));
    // 1 - (1 + y) exp(-y) and phi(z), of which nothing is left near 0.
    const F first = select(y < R(0.25), F(y * y * (R(1) - (y + R(1)) * phi_series(y))),
                           F(rise - select(lost, F{}, F(y * decay))));
    const F second = select(z < R(0.25), F(z * z * phi_series(z)), F(z - fall));
    const F f_first = select(a == R(0), F{}, F(first * by_a));
    const F f_second = select((b == R(0)) | lost, F{}, F(second * by_b * decay));
    const F f = (f_first + f_second) * (R(1) / sum);
    const auto none = larger == R(0);
    value = select(none, F{}, F(scale * f));
    // d value / d log q: scale (1 - exp(-a x)) / a of the larger student, else minus what follows.
    const F own = select(a == R(0), x, F(rise * by_a)), others = select(b == R(0), x, F(fall * by_b));
    const F fallen = select(lost, F{}, F(-(others * decay)));
    slope = select(none, F{}, F(scale * select(of_student, own, fallen)));
  }
};

}  // namespace kdkernels::rules::alpha_beta
