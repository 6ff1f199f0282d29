// The last stage of a row (or of one vector of rows) of the divergence and target-decoupled families, which
// is a rule's own; row_stages.h has the others.
#pragma once

#include "../rules/contract.h"
#include "row_stages.h"
#include "sources.h"

namespace kdkernels::KDK_ISA {

// Whether the softmax is that of the classes other than the target.
template <class Rule>
constexpr bool kTargetApart = Rule::family == Family::decoupled;

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

// Entropy where the target stands apart: that of the pair, and that of the others by their share.
template <class M, class R = typename M::Real>
KDK_FN typename M::S entropy_of(const RowState<M>& row, const rules::TwoPoint<typename M::S>& q) {
  using S = typename M::S;
  const S of_target = rules::select(q.t == R(0), S{}, S(q.t * q.log_t));
  const S of_others = rules::select(q.n == R(0), S{}, S(q.n * (q.log_n - entropy_of(row))));
  return -of_target - of_others;
}

// Stage 3: the value (bare), and the gradient times the row's coefficient into `sink`. Rules that need
// more than one sweep for the gradient (`reads_logits_again`) have a sink in the working type.
template <class Rule, bool kGradient, class M, class G, class R = typename M::Real>
KDK_FN typename M::S finish(RowState<M>& row, const RowProblem& problem,
                            const Temperature<R>& temperature, const Sink<G, R>& sink) {
  using V = typename M::V;
  using S = typename M::S;
  using Pointwise = typename rules::PointwiseOf<Rule>::type;
  static_assert(rules::keeps_contract<Rule>());
  const M mode = row.mode;
  const R *const from_s = row.exp_s, *const from_t = row.exp_t, *const from_gap = row.gap;
  const Ahead ahead_s = row.ahead_s, ahead_t = row.ahead_t;
  S inverse_s = R(1) / row.z_s, inverse_t = R(1) / row.z_t;
  const HardTerm<M> hard = hard_term(row, temperature);
  // It joins the gradient in the last sweep.
  const bool hard_now = hard && Pointwise::centred && !problem.standardize;

  S value{}, explicit_slope{}, implicit_weight = rules::broadcast<S>(R(1));
  S implicit_slope = implicit_weight;
  if constexpr (kTargetApart<Rule>) {
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
          if constexpr (kTargetApart<Rule> && Pointwise::centred) {
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
  if constexpr (kTargetApart<Rule>) {
    // 0 * inf would be NaN where the term is absent.
    value += rules::select(row.z_t == R(0), S{}, rules::weighted(divergence, implicit_weight));
  } else {
    value = divergence;
  }
  if constexpr (kGradient) {
    constexpr bool kWorking = std::is_same_v<G, R>;  // only there is the gradient read again
    if constexpr (kWorking && !Pointwise::centred) {
      const S pull = g * (implicit_slope * M::sum(slopes.total) + explicit_slope);
      project<kTargetApart<Rule>>(row, sink.to, S(pull * inverse_s), g_explicit,
                                  problem.standardize ? HardTerm<M>{} : hard);
    }
    if constexpr (kTargetApart<Rule>) {
      S at_target = g * explicit_slope;
      if (hard && !problem.standardize) at_target += hard.of_target;
      mode.finish_excluded(sink, at_target);
    }
    if constexpr (kWorking)
      if (problem.standardize) through_deviation(row, sink.to, hard);
  }
  return value;
}

}  // namespace kdkernels::KDK_ISA
