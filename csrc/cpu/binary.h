// Rows of the binary family, in the stages of row_kernel.h: nothing is normalised, so that the first
// stage widens half precision, the second does nothing, and the last is the only sweep.
#pragma once

#include "row_kernel.h"

namespace kdkernels::KDK_ISA {

template <class Rule>
constexpr bool kBinary = Rule::family == Family::binary;

template <class Rule, class M, class A, class B, class R = typename M::Real>
KDK_FN void stage_one(RowState<M>& row, const RowProblem& problem, const Temperature<R>& temperature,
                      const A& source_s, const B& source_t) {
  if constexpr (kBinary<Rule>) {
    const M mode = row.mode;
    sweep(
        mode,
        [&](int64_t i, auto part) KDK_LAMBDA {
          constexpr bool kPart = decltype(part)::value;
          if constexpr (!std::is_same_v<A, InPlace<R>>)
            (void)source_s.template get<kPart>(mode, i, R(0));
          if constexpr (!std::is_same_v<B, InPlace<R>>)
            (void)source_t.template get<kPart>(mode, i, R(0));
        },
        [&]() KDK_LAMBDA {});
  } else {
    find_maxima<Rule>(row, problem, temperature, source_s, source_t);
  }
}

template <class Rule, class M, class R = typename M::Real>
KDK_FN void stage_two(RowState<M>& row, const RowProblem& problem,
                      const Temperature<R>& temperature) {
  if constexpr (!kBinary<Rule>) exponentiate<Rule>(row, problem, temperature);
}

// The gradient may lie where the student's logits do.
template <class Rule, bool kGradient, class M, class Sink, class R = typename M::Real>
KDK_FN typename M::S stage_three(RowState<M>& row, const RowProblem& problem,
                                 const Temperature<R>& temperature, const Sink& sink) {
  if constexpr (kBinary<Rule>) {
    using V = typename M::V;
    using S = typename M::S;
    static_assert(rules::keeps_contract<Rule>());
    const M mode = row.mode;
    const R *const student = row.s, *const teacher = row.t;
    const V k = M::spread(row.inverse_temperature);
    const V factor = M::spread(S(row.coefficient * row.inverse_temperature));
    Blocked<V> total;
    sweep(
        mode,
        [&](int64_t i, auto part) KDK_LAMBDA {
          constexpr bool kPart = decltype(part)::value;
          const V s = mode.template get<kPart>(student, i, R(0));
          const V t = mode.template get<kPart>(teacher, i, R(0));
          V value, slope;
          Rule::pointwise(problem.options, V(s * k), V(t * k), V((t - s) * k), value, slope);
          total.add(value);
          if constexpr (kGradient) sink.template put<kPart>(mode, i, V(slope * factor));
        },
        [&]() KDK_LAMBDA { total.flush(); });
    return M::sum(total.total);
  } else {
    return finish<Rule, kGradient>(row, problem, temperature, sink);
  }
}

}  // namespace kdkernels::KDK_ISA
