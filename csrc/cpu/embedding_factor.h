// Factors against the teacher's, a sample at a time (IE-KD): norms, then distances, then gradients,
// all while the sample is in cache. Both students share the sweeps, so the teacher is read once.
#pragma once

#include "convert.h"
#include "modes.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {


constexpr int64_t kFactorGrain = 16384;  // elements below which a second thread does not pay

template <class R>
struct Norm {
  R inverse;  // 1 / max(norm, eps)
  bool unit;  // whether the norm is at least eps, so that its derivative counts
};

template <class Rule, class R>
inline Norm<R> norm(const R* x, int64_t width, R squares) {
  double sum = double(squares), scale = 1.0;
  if (std::is_same_v<R, float> && !(sum > 1e-30 && sum < 1e30)) {  // the squares left float's range
    sum = 0.0;
    for (int64_t i = 0; i < width; ++i) sum += double(x[i]) * double(x[i]);
  }
  if (std::is_same_v<R, double> && sum > 1e300) {  // or double's, whose small squares eps covers
    sum = 0.0;
    scale = Rule::shrink;
    for (int64_t i = 0; i < width; ++i) sum += (double(x[i]) * scale) * (double(x[i]) * scale);
  }
  const double length = std::sqrt(sum);
  const bool small = length < Rule::eps * scale;  // NaN is not small
  return {R(small ? 1.0 / Rule::eps : scale / length), !small};
}

// Where a sample's gradient is written: in place, or in scratch.
template <class R>
inline R* place_of(const Rows& x, int64_t row, R* scratch) {
  return direct<R>(x) ? static_cast<R*>(x.data) + x.offset(row) : scratch;
}

template <class Rule, class R, bool kCosine>
double factor_sample(const FactorProblem& problem, int64_t row, R* scratch, int64_t stride) {
  using V = Vec<R>;
  const int64_t width = problem.width;
  const ByClass<R> mode{width};
  const R* const a = row_in_place(problem.inheritance, row, width, scratch);
  const R* const e = row_in_place(problem.exploration, row, width, scratch + stride);
  const R* const t = row_in_place(problem.teacher, row, width, scratch + 2 * stride);

  Blocked<V> aa, ee, tt;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const V x = mode.template get<kPart>(a, i, R(0));
        const V y = mode.template get<kPart>(e, i, R(0));
        const V z = mode.template get<kPart>(t, i, R(0));
        aa.add(x * x);
        ee.add(y * y);
        tt.add(z * z);
      },
      [&]() KDK_LAMBDA {
        aa.flush();
        ee.flush();
        tt.flush();
      });
  const Norm<R> norm_a = norm<Rule>(a, width, reduce_sum<R>(aa.total));
  const Norm<R> norm_e = norm<Rule>(e, width, reduce_sum<R>(ee.total));
  const Norm<R> norm_t = norm<Rule>(t, width, reduce_sum<R>(tt.total));

  // Normalised elements are rounded, or equal ones would differ by the rounding of one of them.
  const V scale_a = splat<R>(norm_a.inverse), scale_e = splat<R>(norm_e.inverse);
  const V scale_t = splat<R>(norm_t.inverse);
  Blocked<V> sum_a, sum_e, dot_a, dot_e;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const V x = rounded(V(mode.template get<kPart>(a, i, R(0)) * scale_a));
        const V y = rounded(V(mode.template get<kPart>(e, i, R(0)) * scale_e));
        const V z = rounded(V(mode.template get<kPart>(t, i, R(0)) * scale_t));
        V term, direction;
        Rule::template element<kCosine>(x, z, term, direction);
        sum_a.add(term);
        dot_a.add(direction * x);
        Rule::template element<kCosine>(y, z, term, direction);
        sum_e.add(term);
        dot_e.add(direction * y);
      },
      [&]() KDK_LAMBDA {
        sum_a.flush();
        sum_e.flush();
        dot_a.flush();
        dot_e.flush();
      });
  const R p_a = reduce_sum<R>(dot_a.total), p_e = reduce_sum<R>(dot_e.total);
  R value_a, value_e, sign_a, sign_e;
  Rule::template sample<kCosine>(true, norm_a.unit && norm_t.unit, reduce_sum<R>(sum_a.total), p_a,
                                 value_a, sign_a);
  Rule::template sample<kCosine>(false, norm_e.unit && norm_t.unit, reduce_sum<R>(sum_e.total), p_e,
                                 value_e, sign_e);

  const auto gradient = [&](const Rows& place, const R* from, const Norm<R>& n, R projection,
                            double weight, R sign, R* held) KDK_LAMBDA {
    if (!place.data) return;
    R* const to = place_of(place, row, held);
    const R factor = R(weight) * sign * n.inverse;
    const V outer = splat<R>(factor), scale = splat<R>(n.inverse);
    const V pull = splat<R>(n.unit ? factor * projection : R(0));
    sweep(
        mode,
        [&](int64_t i, auto part) KDK_LAMBDA {
          constexpr bool kPart = decltype(part)::value;
          const V x = rounded(V(mode.template get<kPart>(from, i, R(0)) * scale));
          const V z = rounded(V(mode.template get<kPart>(t, i, R(0)) * scale_t));
          V term, direction;
          Rule::template element<kCosine>(x, z, term, direction);
          mode.template put<kPart>(to, i, V(outer * direction - pull * x));
        },
        [&]() KDK_LAMBDA {});
    if (to == held) write_row(place, row, width, to);
  };
  gradient(problem.inheritance_gradient, a, norm_a, p_a, problem.inheritance_weight, sign_a,
           scratch + 3 * stride);
  gradient(problem.exploration_gradient, e, norm_e, p_e, problem.exploration_weight, sign_e,
           scratch + 4 * stride);
  return problem.inheritance_weight * double(value_a) + problem.exploration_weight * double(value_e);
}

template <class Rule, class R>
void run_factors(const FactorProblem& problem, cpu::ParallelFor parallel_for) {
  const int64_t grain = kFactorGrain / problem.width + 1;
  parallel_for(
      problem.samples, grain,
      [](void* opaque, int64_t begin, int64_t end) {
        const FactorProblem& p = *static_cast<const FactorProblem*>(opaque);
        const bool in_place = direct<R>(p.inheritance) && direct<R>(p.exploration) &&
                              direct<R>(p.teacher) &&
                              (!p.inheritance_gradient.data || direct<R>(p.inheritance_gradient)) &&
                              (!p.exploration_gradient.data || direct<R>(p.exploration_gradient));
        const int64_t stride = in_place ? 0 : (p.width + 127) / 64 * 64;
        R* scratch = static_cast<R*>(cpu::scratch(sizeof(R) * 5 * stride + 64));
        for (int64_t row = begin; row < end; ++row)
          p.loss[row] = p.cosine ? factor_sample<Rule, R, true>(p, row, scratch, stride)
                                 : factor_sample<Rule, R, false>(p, row, scratch, stride);
      },
      const_cast<FactorProblem*>(&problem));
}

}  // namespace kdkernels::KDK_ISA
