// Sigmoid KD: the sum over classes of KL(p || q) of two-point distributions. Specification:
// kdkernels/reference/sigmoid_kd.py.
#pragma once

#include "contract.h"

namespace kdkernels::rules::sigmoid_kd {

struct Rule {
  static constexpr Family family = Family::binary;
  static constexpr bool cuda = false;  // Triton serves GPUs: a rule's CUDA kernels of its own cost too much

  // Of the outcome that the student finds rarer, q <= 1/2, with log-odds x and y of student and teacher:
  //   KL = p g - log((1 + e^y) / (1 + e^x)),  g = y - x.
  // Unless g is large that is p phi(log p/q) + (1 - p) phi(log (1-p)/(1-q)), whose terms are >= 0.
  template <class F>
  KDK_FN static void pointwise(const Options&, const F& s, const F& t, const F& gap, F& value,
                               F& slope) {
    using R = scalar_t<F>;
    const F one = broadcast<F>(R(1));
    const auto likely = s > R(0);
    const F x = select(likely, F(-s), s), y = select(likely, F(-t), t);
    const F g = select(likely, F(-gap), gap);
    const auto above = y > R(0);
    const F b = exponential(x), a = exponential(select(above, F(-y), y));
    const F of_student = one / (b + R(1)), of_teacher = one / (a + R(1));
    const F rare = a * of_teacher, q = b * of_student;
    const F p = select(above, of_teacher, rare), others = select(above, rare, of_teacher);

    const auto near = g * g < R(4);
    const F grown = exponential_less_one(select(near, g, F{}));
    const F z = select(near, F(q * grown), F((a - b) * of_student));
    const F w = of_student * grown / (grown + R(1));  // 1 - q / p, as z is (1 - q) / (1 - p) - 1
    F log, over, under, of_p;
    logarithm_terms(F(one - w), F(-w), log, over, of_p);
    // log is log((1 + e^y) / (1 + e^x)), less y where that is above 0 and not near x.
    logarithm_terms(F(z + R(1)), z, log, over, under);

    // y may be infinite where the weight that it has is 0.
    const F certain = -(p * x) - select(rare == R(0), F{}, F(rare * y));
    const F unsure = select(p == R(0), F{}, F(p * g));
    const F far = select(above, certain, unsure) - log;
    value = select(near, F(p * of_p + others * under), far);
    value = select(z == z, value, z);  // NaN
    const F difference = select(near, F(-(p * w)), F(q - p));
    slope = select(likely, F(-difference), difference);
  }
};

}  // namespace kdkernels::rules::sigmoid_kd
