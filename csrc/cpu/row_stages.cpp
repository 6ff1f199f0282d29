// The stages of a row that are the same for every rule; see row_stages.h. The build compiles this file once
// for each instruction set, with KDK_ISA (baseline, avx2, avx512), as it does rule.cpp.
#include "row_stages.h"

#include "convert.h"
#include "sources.h"

namespace kdkernels::KDK_ISA {

// Differences to the first logit give the centre, which is that logit where the row is constant;
// differences to the centre give the rest, so that a first logit far from the others does no harm.
template <class M, class R = typename M::Real>
KDK_FN Moments<typename M::S> moments(const M& mode, const R* x) {
  using V = typename M::V;
  using S = typename M::S;
  Moments<S> row{mode.first(x), S{}, S{}};
  const auto sums = [&](Blocked<V>& sum, Blocked<V>& squares) KDK_LAMBDA {
    const V centre = M::spread(row.centre);
    sweep(
        mode,
        [&](int64_t i, auto part) KDK_LAMBDA {
          constexpr bool kPart = decltype(part)::value;
          V d = mode.template get<kPart>(x, i, R(0)) - centre;
          if constexpr (kPart) d = mask_rest(mode, d);
          sum.add(d);
          squares.add(d * d);
        },
        [&]() KDK_LAMBDA {
          sum.flush();
          squares.flush();
        });
  };
  const R inverse = R(1.0 / double(mode.classes));
  Blocked<V> first, unused;
  sums(first, unused);
  row.centre += M::sum(first.total) * inverse;
  Blocked<V> sum, squares;
  sums(sum, squares);
  row.rest = M::sum(sum.total) * inverse;
  const S square = M::sum(squares.total) - M::sum(sum.total) * row.rest;
  row.deviation = square_root(S(square * R(1.0 / double(mode.classes - 1))));
  return row;
}

// Calls f with the source of a row's logits, which are at `at` after stage 1.
template <class R, class F>
KDK_FN void with_source(const Rows& x, int64_t row, int64_t classes, R* scratch, const R*& at,
                        F&& f) {
  if constexpr (std::is_same_v<R, float>) {
    at = scratch;
    if (x.class_stride == 1 && x.type == Scalar::bf16)
      return f(Widened<bf16>{static_cast<const bf16*>(x.data) + x.offset(row), scratch});
    if (x.class_stride == 1 && x.type == Scalar::f16)
      return f(Widened<f16>{static_cast<const f16*>(x.data) + x.offset(row), scratch});
  }
  at = row_in_place(x, row, classes, scratch);
  f(InPlace<R>{at});
}

// What follows from a row's maxima before stage 2 may overwrite the logits.
template <bool kDecoupled, class M, class R = typename M::Real>
KDK_FN void scale(RowState<M>& row, const RowProblem& problem, const Temperature<R>& temperature) {
  using S = typename M::S;
  if constexpr (kDecoupled) {  // no class but the target: any finite origin will do
    row.max_s = rules::select(row.max_s == -kInfinity<R>, S{}, row.max_s);
    row.max_t = rules::select(row.max_t == -kInfinity<R>, S{}, row.max_t);
  }
  row.scale_s = row.scale_t = row.inverse_temperature;
  if (problem.standardize) {
    row.moments_s = moments(row.mode, row.s);
    row.spread_s = row.moments_s.deviation + R(rules::kStandardizeEps);
    row.scale_s = row.scale_s / row.spread_s;
    row.scale_t = row.scale_t / (moments(row.mode, row.t).deviation + R(rules::kStandardizeEps));
  }
  if (temperature.hard)
    row.hard_target = rules::logit_or_nan(S(row.mode.pick_excluded(row.s))) - row.max_s;
  if constexpr (kDecoupled) {
    const S target_s = rules::logit_or_nan(S(row.mode.pick_excluded(row.s)));
    const S target_t = rules::logit_or_nan(S(row.mode.pick_excluded(row.t)));
    row.target_s = (target_s - row.max_s) * row.scale_s;
    row.target_t = (target_t - row.max_t) * row.scale_t;
  }
}

template <bool kDecoupled, class R>
void find_maxima(RowState<ByClass<R>>& row, const RowProblem& problem,
                 const Temperature<R>& temperature, int64_t number, R* scratch_s, R* scratch_t) {
  const int64_t classes = row.mode.classes;
  with_source<R>(problem.student, number, classes, scratch_s, row.s, [&](const auto& s) KDK_LAMBDA {
    with_source<R>(problem.teacher, number, classes, scratch_t, row.t, [&](const auto& t) KDK_LAMBDA {
      maxima<kDecoupled>(row.mode, s, t, row.max_s, row.max_t);
    });
  });
  scale<kDecoupled>(row, problem, temperature);
}

template <bool kDecoupled, class R>
void find_maxima(RowState<ByRow<R>>& row, const RowProblem& problem,
                 const Temperature<R>& temperature) {
  maxima<kDecoupled>(row.mode, InPlace<R>{row.s}, InPlace<R>{row.t}, row.max_s, row.max_t);
  scale<kDecoupled>(row, problem, temperature);
}

template <bool kDecoupled, bool kCentred, class M, class R>
void exponentiate(RowState<M>& row, const Temperature<R>& temperature) {
  using V = typename M::V;
  const R fill = -kInfinity<R>;
  const M mode = row.mode;
  const V origin_s = M::spread(row.max_s), origin_t = M::spread(row.max_t);
  const V factor_s = M::spread(row.scale_s), factor_t = M::spread(row.scale_t);
  const R *s = row.s, *t = row.t;
  R *const to_s = row.exp_s, *const to_t = row.exp_t, *const to_gap = row.gap;
  Exponential<R> exp_s = temperature.exponential, exp_t = exp_s;
  if (temperature.of_row) {
    exp_s = Exponential<R>(factor_s);
    exp_t = Exponential<R>(factor_t);
  }
  const bool hard = temperature.hard, entropy = temperature.entropy;
  const int squarings = temperature.squarings;
  R* const to_hard = row.exp_hard;
  const Exponential<R> exp_hard(splat<R>(R(1)));
  Blocked<V> sum_s, sum_t, sum_hard, sum_log;
  V pivot_gap = splat<R>(fill);
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        V a = mode.template get<kPart>(s, i, fill);
        V b = mode.template get<kPart>(t, i, fill);
        if constexpr (kDecoupled) {
          mode.exclude(i, a, fill);
          mode.exclude(i, b, fill);
        }
        a -= origin_s;
        b -= origin_t;
        const V e = exp_s(a), f = exp_t(b);
        mode.template put<kPart>(to_s, i, e);
        store<R>(to_t + i * kLanes<R>, f);
        const V gap = b * factor_t - a * factor_s;
        store<R>(to_gap + i * kLanes<R>, gap);
        if constexpr (!kCentred) pivot_gap = rules::select(a == V{}, gap, pivot_gap);
        sum_s.add(e);
        sum_t.add(f);
        if (hard) {
          V h = e;
          if (squarings < 0) h = exp_hard(a);
          for (int k = 0; k < squarings; ++k) h *= h;
          mode.exclude(i, h, R(0));
          if (squarings < 0) store<R>(to_hard + i * kLanes<R>, h);
          sum_hard.add(h);
        }
        if (entropy) sum_log.add(rules::select(e == V{}, V{}, V(e * (a * factor_s))));
      },
      [&]() KDK_LAMBDA {
        sum_s.flush();
        sum_t.flush();
        sum_hard.flush();
        sum_log.flush();
      });
  row.z_s = M::sum(sum_s.total);
  row.z_t = M::sum(sum_t.total);
  if (hard) row.z_hard = M::sum(sum_hard.total);
  if (entropy) row.log_sum = M::sum(sum_log.total);
  if constexpr (!kCentred) row.pivot_gap = M::max(pivot_gap);
}

// Whether any lane of a comparison of a row's numbers holds.
template <class I>
KDK_FN bool any_lane(const I& condition) {
  if constexpr (std::is_arithmetic_v<I>) {
    return condition;
  } else {
    bool any = false;
    for (unsigned lane = 0; lane < sizeof(I) / sizeof(condition[0]); ++lane)
      any |= condition[lane] != 0;
    return any;
  }
}

template <class M>
typename M::S log_ratio_of_sums(const RowState<M>& row, const typename M::S& inverse_s) {
  using R = typename M::Real;
  using V = typename M::V;
  using S = typename M::S;
  const S log_ratio = logarithm(S(row.z_t * inverse_s));
  const R most = R(1.125);
  const auto certain = (row.z_s < most) & (row.z_t < most) & (row.z_s >= R(1)) & (row.z_t >= R(1));
  if (!any_lane(certain)) return log_ratio;
  const M mode = row.mode;
  Blocked<V> rest_s, rest_t;
  const auto likeliest = splat<R>(R(0.5));
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        const V e = mode.template get<decltype(part)::value>(row.exp_s, i, R(0));
        const V f = load<R>(row.exp_t + i * kLanes<R>);
        rest_s.add(rules::select(e > likeliest, V{}, e));
        rest_t.add(rules::select(f > likeliest, V{}, f));
      },
      [&]() KDK_LAMBDA {
        rest_s.flush();
        rest_t.flush();
      });
  const S gap = (M::sum(rest_t.total) - M::sum(rest_s.total)) * inverse_s;
  return rules::select(certain, rules::logarithm_of_one_plus(gap), log_ratio);
}

template <class M, class R>
HardTerm<M> hard_term(RowState<M>& row, const Temperature<R>& temperature) {
  using S = typename M::S;
  if (!temperature.hard) return {};
  const auto share = two_point<R>(S(logarithm(row.z_hard) - row.hard_target));
  row.hard_value = -share.log_t;
  const S others = row.hard_coefficient * share.n;
  HardTerm<M> term;
  term.from = temperature.squarings < 0 ? row.exp_hard : row.exp_s;
  term.squarings = temperature.squarings;
  term.factor = M::spread(rules::select(row.z_hard == R(0), S{}, S(others / row.z_hard)));
  term.of_target = -others;
  term.at_target = M::spread(term.of_target);
  return term;
}

template <class M>
typename M::S entropy_of(const RowState<M>& row) {
  using R = typename M::Real;
  using S = typename M::S;
  const S entropy = logarithm(row.z_s) - row.log_sum / row.z_s;
  return rules::select(row.z_s == R(0), S{}, entropy);
}

// The gradient changed by `change`, in the last sweep over it, in which the cross-entropy's joins.
template <class M, class Change, class R = typename M::Real>
KDK_FN void end_gradient(const M& mode, R* gradient, const HardTerm<M>& hard, Change&& change) {
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        typename M::V out = mode.template get<kPart>(gradient, i, R(0));
        change(i, part, out);
        if (hard) out += hard.template get<kPart>(mode, i);
        mode.template put<kPart>(gradient, i, out);
      },
      [&]() KDK_LAMBDA {});
}

template <bool kDecoupled, class M, class R>
void project(const RowState<M>& row, R* gradient, const typename M::S& pull,
             const typename M::V& at_target, const HardTerm<M>& hard) {
  using V = typename M::V;
  const M mode = row.mode;
  const V factor = M::spread(pull);
  end_gradient(mode, gradient, hard, [&](int64_t i, auto part, V& out) KDK_LAMBDA {
    out -= factor * mode.template get<decltype(part)::value>(row.exp_s, i, R(0));
    if constexpr (kDecoupled) mode.set_excluded(i, out, at_target);
  });
}

template <class M, class R>
void through_deviation(const RowState<M>& row, R* gradient, const HardTerm<M>& hard) {
  using V = typename M::V;
  using S = typename M::S;
  const M mode = row.mode;
  Blocked<V> dot;
  const V centre = M::spread(row.moments_s.centre), rest = M::spread(row.moments_s.rest);
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        V d = (mode.template get<kPart>(row.s, i, R(0)) - centre) - rest;
        if constexpr (kPart) d = mask_rest(mode, d);
        dot.add(mode.template get<kPart>(gradient, i, R(0)) * d);
      },
      [&]() KDK_LAMBDA { dot.flush(); });
  const S deviation = row.moments_s.deviation;
  S pull = M::sum(dot.total) / (row.spread_s * deviation * R(mode.classes - 1));
  pull = rules::select(deviation == R(0), S{}, pull);
  const V factor = M::spread(pull);
  end_gradient(mode, gradient, hard, [&](int64_t i, auto part, V& out) KDK_LAMBDA {
    constexpr bool kPart = decltype(part)::value;
    out -= factor * ((mode.template get<kPart>(row.s, i, R(0)) - centre) - rest);
  });
}

// All of them, for rows in the order of memory and across the lanes.
#define KDK_STAGES_OF_DECOUPLED(M, kDecoupled)                                                     \
  template void exponentiate<kDecoupled, true>(RowState<M>&, const Temperature<M::Real>&);         \
  template void exponentiate<kDecoupled, false>(RowState<M>&, const Temperature<M::Real>&);        \
  template void project<kDecoupled>(const RowState<M>&, M::Real*, const M::S&, const M::V&,        \
                                    const HardTerm<M>&);
#define KDK_STAGES(M)                                                                              \
  KDK_STAGES_OF_DECOUPLED(M, false)                                                                \
  KDK_STAGES_OF_DECOUPLED(M, true)                                                                 \
  template M::S log_ratio_of_sums(const RowState<M>&, const M::S&);                                \
  template HardTerm<M> hard_term(RowState<M>&, const Temperature<M::Real>&);                       \
  template M::S entropy_of(const RowState<M>&);                                                    \
  template void through_deviation(const RowState<M>&, M::Real*, const HardTerm<M>&);
#define KDK_MAXIMA(R, kDecoupled)                                                                  \
  template void find_maxima<kDecoupled>(RowState<ByClass<R>>&, const RowProblem&,                  \
                                        const Temperature<R>&, int64_t, R*, R*);                   \
  template void find_maxima<kDecoupled>(RowState<ByRow<R>>&, const RowProblem&,                    \
                                        const Temperature<R>&);
KDK_STAGES(ByClass<float>)
KDK_STAGES(ByClass<double>)
KDK_STAGES(ByRow<float>)
KDK_STAGES(ByRow<double>)
KDK_MAXIMA(float, false)
KDK_MAXIMA(float, true)
KDK_MAXIMA(double, false)
KDK_MAXIMA(double, true)

}  // namespace kdkernels::KDK_ISA
