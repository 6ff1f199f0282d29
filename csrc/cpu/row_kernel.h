// One row (or one vector of rows) of the divergence and target-decoupled families.
//
// Three sweeps over logits that stay in cache: maxima; exponentials and their sums; value and
// gradient. The exponentials are kept in scratch, so that each class costs two. `standardize` adds the
// sweeps of its mean, deviation and projection.
#pragma once

#include "modes.h"
#include "problem.h"

namespace kdkernels::KDK_ISA {

// Where a row's intermediates go. `exp_s` may be the row's gradient, or where the student's logits are
// (`gap`: the teacher's) if those are not read again; exp_t and gap have room for whole vectors.
template <class R>
struct Workspace {
  R* exp_s;  // exponentials of the scaled logits
  R* exp_t;
  R* gap;  // teacher's scaled logits minus the student's
};

// What does not change from row to row.
template <class R>
struct Temperature {
  R inverse;
  Exponential<R> exponential;
  KDK_FN explicit Temperature(double temperature)
      : inverse(R(1.0 / temperature)), exponential(splat<R>(inverse)) {}
};

constexpr double kStandardizeEps = 1e-7;  // kdkernels/reference/_rows.py

// Zero in the lanes past the end of the row.
template <class M>
KDK_FN typename M::V mask_rest(const M& mode, const typename M::V& v) {
  using R = typename M::Real;
  return rules::select(lane_numbers<R>(0) < typename Simd<R>::Int(mode.rest()), v,
                       typename M::V{});
}

// Mean and standard deviation (unbiased) of a row.
template <class M, class R = typename M::Real>
KDK_FN void moments(const M& mode, const R* x, typename M::S& mean, typename M::S& deviation) {
  using V = typename M::V;
  Blocked<V> sum;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        sum.add(mode.template get<decltype(part)::value>(x, i, R(0)));
      },
      [&]() KDK_LAMBDA { sum.flush(); });
  mean = M::sum(sum.total) * R(1.0 / double(mode.classes));
  Blocked<V> squares;
  const V centre = M::spread(mean);
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        V d = mode.template get<kPart>(x, i, R(0)) - centre;
        if constexpr (kPart) d = mask_rest(mode, d);
        squares.add(d * d);
      },
      [&]() KDK_LAMBDA { squares.flush(); });
  deviation = square_root(typename M::S(M::sum(squares.total) * R(1.0 / double(mode.classes - 1))));
}

// Maxima of a row pair, two chains wide each to hide the latency.
template <bool kExclude, class M, class R = typename M::Real>
KDK_FN void maxima(const M& mode, const R* s, const R* t, typename M::S& max_s,
                   typename M::S& max_t) {
  using V = typename M::V;
  const R fill = -kInfinity<R>;
  V s0 = splat<R>(fill), s1 = s0, t0 = s0, t1 = s0;
  const auto fetch = [&](const R* x, int64_t i, auto part) KDK_LAMBDA {
    V v = mode.template get<decltype(part)::value>(x, i, fill);
    if constexpr (kExclude) mode.exclude(i, v, fill);
    return v;
  };
  const int64_t whole = mode.whole();
  int64_t i = 0;
  for (; i + 2 <= whole; i += 2) {
    s0 = maximum(s0, fetch(s, i, Part<false>{}));
    t0 = maximum(t0, fetch(t, i, Part<false>{}));
    s1 = maximum(s1, fetch(s, i + 1, Part<false>{}));
    t1 = maximum(t1, fetch(t, i + 1, Part<false>{}));
  }
  if (i < whole) {
    s0 = maximum(s0, fetch(s, i, Part<false>{}));
    t0 = maximum(t0, fetch(t, i, Part<false>{}));
  }
  if (mode.rest()) {
    s1 = maximum(s1, fetch(s, whole, Part<true>{}));
    t1 = maximum(t1, fetch(t, whole, Part<true>{}));
  }
  max_s = M::max(maximum(s0, s1));
  max_t = M::max(maximum(t0, t1));
}

// The divergence that a rule sums over classes.
template <class Rule, bool kDecoupled = Rule::family == Family::decoupled>
struct PointwiseOf {
  using type = Rule;
};
template <class Rule>
struct PointwiseOf<Rule, true> {
  using type = typename Rule::Implicit;
};

// Value of a row; writes its gradient times `coefficient` where kGradient.
// `coefficient` multiplies d value / d logits; the value is returned bare.
template <class Rule, bool kGradient, class M, class R = typename M::Real>
KDK_FN typename M::S run_row(const M& mode, const cpu::RowProblem& problem, const R* s, const R* t,
                             R* gradient, const Workspace<R>& work,
                             const Temperature<R>& temperature, const typename M::S& coefficient) {
  using V = typename M::V;
  using S = typename M::S;
  constexpr bool kDecoupled = Rule::family == Family::decoupled;
  const R kMinusInfinity = -kInfinity<R>;

  // Sweep 1: maxima over the classes of the softmax.
  S max_s, max_t;
  maxima<kDecoupled>(mode, s, t, max_s, max_t);
  if constexpr (kDecoupled) {  // no class but the target: any finite origin will do
    max_s = rules::select(max_s == kMinusInfinity, S{}, max_s);
    max_t = rules::select(max_t == kMinusInfinity, S{}, max_t);
  }

  S scale_s = rules::broadcast<S>(temperature.inverse), scale_t = scale_s;
  S mean_s{}, deviation_s{}, spread_s{};
  if (problem.standardize) {
    S mean_t{}, deviation_t{};
    moments(mode, s, mean_s, deviation_s);
    moments(mode, t, mean_t, deviation_t);
    spread_s = deviation_s + R(kStandardizeEps);
    scale_s = scale_s / spread_s;
    scale_t = scale_t / (deviation_t + R(kStandardizeEps));
  }

  // Relative to the maxima, and before sweep 2 may overwrite the logits.
  S target_s{}, target_t{};
  if constexpr (kDecoupled) {
    target_s = (mode.pick_excluded(s) - max_s) * scale_s;
    target_t = (mode.pick_excluded(t) - max_t) * scale_t;
  }

  // Sweep 2: exponentials and their sums.
  const V origin_s = M::spread(max_s), origin_t = M::spread(max_t);
  const V factor_s = M::spread(scale_s), factor_t = M::spread(scale_t);
  Exponential<R> exp_s = temperature.exponential, exp_t = exp_s;
  if (problem.standardize) {
    exp_s = Exponential<R>(factor_s);
    exp_t = Exponential<R>(factor_t);
  }
  Blocked<V> sum_s, sum_t;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        V a = mode.template get<kPart>(s, i, kMinusInfinity);
        V b = mode.template get<kPart>(t, i, kMinusInfinity);
        if constexpr (kDecoupled) {
          mode.exclude(i, a, kMinusInfinity);
          mode.exclude(i, b, kMinusInfinity);
        }
        a -= origin_s;
        b -= origin_t;
        const V e = exp_s(a), f = exp_t(b);
        mode.template put<kPart>(work.exp_s, i, e);
        store<R>(work.exp_t + i * kLanes<R>, f);
        store<R>(work.gap + i * kLanes<R>, V(b * factor_t - a * factor_s));
        sum_s.add(e);
        sum_t.add(f);
      },
      [&]() KDK_LAMBDA {
        sum_s.flush();
        sum_t.flush();
      });
  const S z_s = M::sum(sum_s.total), z_t = M::sum(sum_t.total);
  S inverse_s = R(1) / z_s, inverse_t = R(1) / z_t;

  S value{}, explicit_slope{}, implicit_weight = rules::broadcast<S>(R(1));
  if constexpr (kDecoupled) {
    inverse_s = rules::select(z_s == R(0), S{}, inverse_s);
    inverse_t = rules::select(z_t == R(0), S{}, inverse_t);
    // Log-odds of the other classes against the target.
    const S odds_s = logarithm(z_s) - target_s;
    const S odds_t = logarithm(z_t) - target_t;
    Rule::explicit_term(problem.options, two_point<R>(odds_t), two_point<R>(odds_s), value,
                        explicit_slope, implicit_weight);
    // A teacher without other classes has no implicit term.
    implicit_weight = rules::select(z_t == R(0), S{}, implicit_weight);
  }

  // Sweep 3: value, and the gradient in the same sweep where the slopes of a row sum to zero.
  using Pointwise = typename PointwiseOf<Rule>::type;
  const V log_ratio = M::spread(logarithm(S(z_t * inverse_s)));
  const V q_factor = M::spread(inverse_s), p_factor = M::spread(inverse_t);
  const S g = coefficient * scale_s;
  const V g_implicit = M::spread(S(g * implicit_weight));
  const V g_explicit = M::spread(S(g * explicit_slope));
  Blocked<V> total, slopes;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const V q = mode.template get<kPart>(work.exp_s, i, R(0)) * q_factor;
        const V f = load<R>(work.exp_t + i * kLanes<R>);
        const V p = f * p_factor;
        V d = load<R>(work.gap + i * kLanes<R>) - log_ratio;
        d = rules::select(f == R(0), V{}, d);  // -inf - -inf, where both are masked
        V v, slope;
        Pointwise::pointwise(problem.options, p, q, d, v, slope);
        total.add(v);
        if constexpr (!Pointwise::centred) slopes.add(slope);
        if constexpr (kGradient) {
          V out = slope * g_implicit;
          if constexpr (kDecoupled && Pointwise::centred) {
            out -= g_explicit * q;
            mode.set_excluded(i, out, g_explicit);
          }
          mode.template put<kPart>(gradient, i, out);
        }
      },
      [&]() KDK_LAMBDA {
        total.flush();
        slopes.flush();
      });
  const S divergence = M::sum(total.total);
  if constexpr (kDecoupled) {
    // 0 * inf would be NaN where the term is absent.
    value += rules::select(z_t == R(0), S{}, S(implicit_weight * divergence));
  } else {
    value = divergence;
  }

  if constexpr (kGradient && !Pointwise::centred) {  // project on the tangent of the softmax
    const V pull = M::spread(S(g * (implicit_weight * M::sum(slopes.total) + explicit_slope)));
    sweep(
        mode,
        [&](int64_t i, auto part) KDK_LAMBDA {
          constexpr bool kPart = decltype(part)::value;
          V out = mode.template get<kPart>(gradient, i, R(0));
          out -= pull * (mode.template get<kPart>(work.exp_s, i, R(0)) * q_factor);
          if constexpr (kDecoupled) mode.set_excluded(i, out, g_explicit);
          mode.template put<kPart>(gradient, i, out);
        },
        [&]() KDK_LAMBDA {});
  }
  if constexpr (kGradient && kDecoupled) mode.finish_excluded(gradient, S(g * explicit_slope));

  if (kGradient && problem.standardize) {  // through the student's deviation
    Blocked<V> dot;
    const V centre = M::spread(mean_s);
    sweep(
        mode,
        [&](int64_t i, auto part) KDK_LAMBDA {
          constexpr bool kPart = decltype(part)::value;
          V d = mode.template get<kPart>(s, i, R(0)) - centre;
          if constexpr (kPart) d = mask_rest(mode, d);
          dot.add(mode.template get<kPart>(gradient, i, R(0)) * d);
        },
        [&]() KDK_LAMBDA { dot.flush(); });
    S pull = M::sum(dot.total) / (spread_s * deviation_s * R(mode.classes - 1));
    pull = rules::select(deviation_s == R(0), S{}, pull);
    const V factor = M::spread(pull);
    sweep(
        mode,
        [&](int64_t i, auto part) KDK_LAMBDA {
          constexpr bool kPart = decltype(part)::value;
          V out = mode.template get<kPart>(gradient, i, R(0));
          out -= factor * (mode.template get<kPart>(s, i, R(0)) - centre);
          mode.template put<kPart>(gradient, i, out);
        },
        [&]() KDK_LAMBDA {});
  }
  return value;
}

}  // namespace kdkernels::KDK_ISA
