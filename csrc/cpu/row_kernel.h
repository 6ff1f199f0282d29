// One row (or one vector of rows) of the divergence and target-decoupled families.
//
// Three stages over logits that stay in cache: maxima; exponentials and their sums; value and
// gradient. Each is a function of the row's state, so that a driver can run the first stage of a later
// row before the last of an earlier one and hide the latency of the reductions and logarithms between
// them. The exponentials are kept in scratch, so that each class costs two.
#pragma once

#include "../rules/contract.h"
#include "modes.h"
#include "problem.h"
#include "sources.h"

namespace kdkernels::KDK_ISA {

// Logits to fetch into cache while the last stage computes; nothing where `data` is null.
struct Ahead {
  const char* data = nullptr;
  int64_t bytes = 0;  // of an element

  template <class R>
  KDK_FN void fetch(int64_t step) const {
    __builtin_prefetch(data + step * kLanes<R> * bytes, 0, 2);
  }
};

// Mean and standard deviation (unbiased) of a row. The mean is centre + rest: rounded to one number it
// would be off by as much as the logits are, and a constant row would seem to vary.
template <class S>
struct Moments {
  S centre, rest, deviation;
};

// A row on its way through the stages. The first group is set by the driver.
template <class M, class R = typename M::Real>
struct RowState {
  using S = typename M::S;
  M mode;
  const R *s, *t;  // logits (after the first stage, where they had to be converted)
  R* exp_s;        // exponentials of the scaled logits; may be the row's gradient, or s
  R* exp_t;        // has room for whole vectors, as `gap` has
  R* gap;          // teacher's scaled logits minus the student's; may be t
  R* exp_hard;     // exponentials at temperature 1, where they are no power of exp_s
  S coefficient;   // multiplies d value / d logits
  S hard_coefficient;  // multiplies d cross-entropy / d logits
  S inverse_temperature;
  Ahead ahead_s{}, ahead_t{};  // the next row

  S max_s, max_t;        // origins of the exponentials
  S scale_s, scale_t;    // 1 / temperature, over the deviation if standardised
  Moments<S> moments_s;
  S spread_s;
  S target_s, target_t;  // scaled logits of the target
  S z_s, z_t;            // sums of the exponentials
  S pivot_gap;           // gap of the student's most likely class, for rules that are not centred
  S hard_target, z_hard;  // logit of the target and sum over the other classes, at temperature 1
  S log_sum;             // sum of the exponentials times their logarithms
  S hard_value{}, entropy{};  // of the last stage: cross-entropy of the target; entropy of q
};

// What does not change from row to row.
template <class R>
struct Temperature {
  R inverse;
  Exponential<R> exponential;
  bool of_row;    // the exponentials' factors differ by row
  bool hard, entropy;
  int squarings;  // which make the exponentials those at temperature 1; -1: they are no such power

  KDK_FN explicit Temperature(const RowProblem& problem)
      : inverse(R(1.0 / problem.temperature)),
        exponential(splat<R>(inverse)),
        of_row(problem.standardize || problem.row_temperature),
        hard(problem.hard != 0.0),
        entropy(problem.parts) {
    const double t = of_row ? 0.0 : problem.temperature;
    squarings = t == 1.0 ? 0 : t == 2.0 ? 1 : t == 4.0 ? 2 : -1;
  }
};

// The gradient of the target's cross-entropy at temperature 1: factor times the exponentials of the
// other classes, and minus their sum at the target, where 1 - probability would cancel.
template <class M, class R = typename M::Real>
struct HardTerm {
  const R* from = nullptr;  // null where there is none
  int squarings = 0;
  typename M::S of_target{};
  typename M::V factor{}, at_target{};

  KDK_FN explicit operator bool() const { return from; }
  template <bool kPart>
  KDK_FN typename M::V get(const M& mode, int64_t step) const {
    typename M::V e = mode.template get<kPart>(from, step, R(0));
    for (int i = 0; i < squarings; ++i) e *= e;
    e *= factor;
    mode.replace(step, e, at_target);
    return e;
  }
};

// Zero in the lanes past the end of the row.
template <class M>
KDK_FN typename M::V mask_rest(const M& mode, const typename M::V& v) {
  using R = typename M::Real;
  return rules::select(lane_numbers<R>(0) < typename Simd<R>::Int(mode.rest()), v,
                       typename M::V{});
}

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

// Maxima of a row pair, two chains wide each to hide the latency.
template <bool kExclude, class M, class A, class B>
KDK_FN void maxima(const M& mode, const A& s, const B& t, typename M::S& max_s,
                   typename M::S& max_t) {
  using V = typename M::V;
  using R = typename M::Real;
  const R fill = -kInfinity<R>;
  V s0 = splat<R>(fill), s1 = s0, t0 = s0, t1 = s0;
  const auto fetch = [&](const auto& x, int64_t i, auto part) KDK_LAMBDA {
    V v = x.template get<decltype(part)::value>(mode, i, fill);
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

// Stage 1: maxima over the classes of the softmax, and the scale. `source_s` and `source_t` yield the
// logits, which are at row.s and row.t afterwards.
template <class Rule, class M, class A, class B, class R = typename M::Real>
KDK_FN void find_maxima(RowState<M>& row, const RowProblem& problem,
                        const Temperature<R>& temperature, const A& source_s, const B& source_t) {
  using S = typename M::S;
  constexpr bool kDecoupled = Rule::family == Family::decoupled;
  maxima<kDecoupled>(row.mode, source_s, source_t, row.max_s, row.max_t);
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
  // Before stage 2 may overwrite the logits.
  if (temperature.hard)
    row.hard_target = rules::logit_or_nan(S(row.mode.pick_excluded(row.s))) - row.max_s;
  if constexpr (kDecoupled) {
    const S target_s = rules::logit_or_nan(S(row.mode.pick_excluded(row.s)));
    const S target_t = rules::logit_or_nan(S(row.mode.pick_excluded(row.t)));
    row.target_s = (target_s - row.max_s) * row.scale_s;
    row.target_t = (target_t - row.max_t) * row.scale_t;
  }
}

// Stage 2: exponentials and their sums; and the gap of the class (any of them) at the student's maximum.
template <class Rule, class M, class R = typename M::Real>
KDK_FN void exponentiate(RowState<M>& row, const RowProblem& problem,
                         const Temperature<R>& temperature) {
  using V = typename M::V;
  constexpr bool kDecoupled = Rule::family == Family::decoupled;
  constexpr bool kCentred = rules::PointwiseOf<Rule>::type::centred;
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

// log(z_t / z_s). Where both rows are certain, the sums without the largest class keep the digits that
// 1 + x loses, and with them d of the likeliest class is exact, of which 1 - p is all that matters.
template <class M, class R = typename M::Real>
KDK_FN typename M::S log_ratio_of_sums(const RowState<M>& row, const typename M::S& inverse_s) {
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

// The pivot of a rule that is not centred; see csrc/rules/contract.h.
template <class Pointwise, class M, class R = typename M::Real>
KDK_FN typename M::S pivot(const RowState<M>& row, const Options& options,
                           const typename M::S& inverse_s, const typename M::S& log_z_ratio) {
  using S = typename M::S;
  const S q = inverse_s, d = row.pivot_gap - log_z_ratio, p = q * exponential(d);
  S value, slope;
  Pointwise::pointwise(options, p, q, d, value, slope);
  return rules::pivot_of(slope, q);
}

// The softmax's derivative takes the mean slope off: gradient -= pull * exp_s.
template <bool kDecoupled, class M, class R = typename M::Real>
KDK_FN void project(const RowState<M>& row, const Sink<R, R>& sink, const typename M::S& pull,
                    const typename M::V& at_target, const HardTerm<M>& hard) {
  using V = typename M::V;
  const M mode = row.mode;
  const V factor = M::spread(pull);
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        V out = mode.template get<kPart>(sink.to, i, R(0));
        out -= factor * mode.template get<kPart>(row.exp_s, i, R(0));
        if constexpr (kDecoupled) mode.set_excluded(i, out, at_target);
        if (hard) out += hard.template get<kPart>(mode, i);
        sink.template put<kPart>(mode, i, out);
      },
      [&]() KDK_LAMBDA {});
}

// The part of the gradient that flows through the student's deviation; then that of the cross-entropy,
// which reads the logits as they are.
template <class M, class R = typename M::Real>
KDK_FN void through_deviation(const RowState<M>& row, const Sink<R, R>& sink,
                              const HardTerm<M>& hard) {
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
        dot.add(mode.template get<kPart>(sink.to, i, R(0)) * d);
      },
      [&]() KDK_LAMBDA { dot.flush(); });
  const S deviation = row.moments_s.deviation;
  S pull = M::sum(dot.total) / (row.spread_s * deviation * R(mode.classes - 1));
  pull = rules::select(deviation == R(0), S{}, pull);
  const V factor = M::spread(pull);
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        V out = mode.template get<kPart>(sink.to, i, R(0));
        out -= factor * ((mode.template get<kPart>(row.s, i, R(0)) - centre) - rest);
        if (hard) out += hard.template get<kPart>(mode, i);
        sink.template put<kPart>(mode, i, out);
      },
      [&]() KDK_LAMBDA {});
}
// Where only the working type can be a sink, the others need not compile.
template <bool, class M, class T, class R = typename M::Real,
          class = std::enable_if_t<!std::is_same_v<T, R>>>
KDK_FN void project(const RowState<M>&, const Sink<T, R>&, const typename M::S&,
                    const typename M::V&, const HardTerm<M>&) {}
template <class M, class T, class R = typename M::Real,
          class = std::enable_if_t<!std::is_same_v<T, R>>>
KDK_FN void through_deviation(const RowState<M>&, const Sink<T, R>&, const HardTerm<M>&) {}

// Cross-entropy of the target at temperature 1, from the log-odds of the other classes against it.
template <class M, class R = typename M::Real>
KDK_FN HardTerm<M> hard_term(RowState<M>& row, const Temperature<R>& temperature) {
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

// Entropy of the classes of the softmax, from sum e log e.
template <class M, class R = typename M::Real>
KDK_FN typename M::S entropy_of(const RowState<M>& row) {
  using S = typename M::S;
  const S entropy = logarithm(row.z_s) - row.log_sum / row.z_s;
  return rules::select(row.z_s == R(0), S{}, entropy);
}
// Likewise where the target stands apart: that of the pair, and that of the others by their share.
template <class M, class R = typename M::Real>
KDK_FN typename M::S entropy_of(const RowState<M>& row, const rules::TwoPoint<typename M::S>& q) {
  using S = typename M::S;
  const S of_target = rules::select(q.t == R(0), S{}, S(q.t * q.log_t));
  const S of_others = rules::select(q.n == R(0), S{}, S(q.n * (q.log_n - entropy_of(row))));
  return -of_target - of_others;
}

// Stage 3: the value (bare), and the gradient times the row's coefficient into `sink`. Rules that need
// more than one sweep for the gradient (`reads_logits_again`) have a sink in the working type.
template <class Rule, bool kGradient, class M, class Sink, class R = typename M::Real>
KDK_FN typename M::S finish(RowState<M>& row, const RowProblem& problem,
                            const Temperature<R>& temperature, const Sink& sink) {
  using V = typename M::V;
  using S = typename M::S;
  using Pointwise = typename rules::PointwiseOf<Rule>::type;
  static_assert(rules::keeps_contract<Rule>());
  constexpr bool kDecoupled = Rule::family == Family::decoupled;
  const M mode = row.mode;
  const R *const from_s = row.exp_s, *const from_t = row.exp_t, *const from_gap = row.gap;
  const Ahead ahead_s = row.ahead_s, ahead_t = row.ahead_t;
  S inverse_s = R(1) / row.z_s, inverse_t = R(1) / row.z_t;
  const HardTerm<M> hard = hard_term(row, temperature);
  // It joins the gradient in the last sweep.
  const bool hard_now = hard && Pointwise::centred && !problem.standardize;

  S value{}, explicit_slope{}, implicit_weight = rules::broadcast<S>(R(1));
  S implicit_slope = implicit_weight;
  if constexpr (kDecoupled) {
    inverse_s = rules::select(row.z_s == R(0), S{}, inverse_s);
    inverse_t = rules::select(row.z_t == R(0), S{}, inverse_t);
    // Log-odds of the other classes against the target.
    const S odds_s = logarithm(row.z_s) - row.target_s;
    const S odds_t = logarithm(row.z_t) - row.target_t;
    const auto of_q = two_point<R>(odds_s);
    Rule::explicit_term(problem.options, two_point<R>(odds_t), of_q, value, explicit_slope,
                        implicit_weight);
    if (temperature.entropy) row.entropy = entropy_of(row, of_q);
    // A teacher without other classes has no implicit term.
    implicit_weight = rules::select(row.z_t == R(0), S{}, implicit_weight);
    // Of a student without them the term is infinite, and its gradient is 0.
    implicit_slope = rules::select(row.z_s == R(0), S{}, implicit_weight);
  } else {
    if (temperature.entropy) row.entropy = entropy_of(row);
  }

  S log_ratio;
  if constexpr (Pointwise::centred) log_ratio = logarithm(S(row.z_t * inverse_s));
  else log_ratio = log_ratio_of_sums(row, inverse_s);
  const V log_z_ratio = M::spread(log_ratio);
  V pivoted{};
  if constexpr (!Pointwise::centred)
    pivoted = M::spread(pivot<Pointwise>(row, problem.options, inverse_s, log_ratio));
  const V q_factor = M::spread(inverse_s), p_factor = M::spread(inverse_t);
  const S g = row.coefficient * row.scale_s;
  const V g_implicit = M::spread(S(g * implicit_slope));
  const V g_explicit = M::spread(S(g * explicit_slope));
  Blocked<V> total, slopes;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        if (!kPart && ahead_s.data) {
          ahead_s.template fetch<R>(i);
          ahead_t.template fetch<R>(i);
        }
        const V q = mode.template get<kPart>(from_s, i, R(0)) * q_factor;
        const V p = load<R>(from_t + i * kLanes<R>) * p_factor;
        const V d = load<R>(from_gap + i * kLanes<R>) - log_z_ratio;
        V v, slope;
        Pointwise::pointwise(problem.options, p, q, d, v, slope);
        total.add(v);
        if constexpr (!Pointwise::centred) {
          slope -= q * pivoted;
          slopes.add(slope);
        }
        if constexpr (kGradient) {
          V out = slope * g_implicit;
          if constexpr (kDecoupled && Pointwise::centred) {
            out -= g_explicit * q;
            mode.set_excluded(i, out, g_explicit);
          }
          if (hard_now) out += hard.template get<kPart>(mode, i);
          sink.template put<kPart>(mode, i, out);
        }
      },
      [&]() KDK_LAMBDA {
        total.flush();
        slopes.flush();
      });
  const S divergence = M::sum(total.total);
  if constexpr (kDecoupled) {
    // 0 * inf would be NaN where the term is absent.
    value += rules::select(row.z_t == R(0), S{}, rules::weighted(divergence, implicit_weight));
  } else {
    value = divergence;
  }
  if constexpr (kGradient) {
    if constexpr (!Pointwise::centred) {
      const S pull = g * (implicit_slope * M::sum(slopes.total) + explicit_slope);
      project<kDecoupled>(row, sink, S(pull * inverse_s), g_explicit,
                          problem.standardize ? HardTerm<M>{} : hard);
    }
    if constexpr (kDecoupled) {
      S at_target = g * explicit_slope;
      if (hard && !problem.standardize) at_target += hard.of_target;
      mode.finish_excluded(sink, at_target);
    }
    if (problem.standardize) through_deviation(row, sink, hard);
  }
  return value;
}

}  // namespace kdkernels::KDK_ISA
