// Rows of the binary family, in the stages of row_kernel.h: nothing is normalised, so that the first
// stage widens half precision, the second does nothing, and the last is the only sweep.
#pragma once

#include "convert.h"
#include "row_kernel.h"

namespace kdkernels::KDK_ISA {

template <class Rule>
constexpr bool kBinary = Rule::family == Family::binary;

template <class Rule, class R>
KDK_FN void stage_one(RowState<ByClass<R>>& row, const RowProblem& problem,
                      const Temperature<R>& temperature, int64_t number, R* scratch_s,
                      R* scratch_t) {
  if constexpr (kBinary<Rule>) {
    row.s = row_in_place(problem.student, number, row.mode.classes, scratch_s);
    row.t = row_in_place(problem.teacher, number, row.mode.classes, scratch_t);
  } else {
    find_maxima<kTargetApart<Rule>>(row, problem, temperature, number, scratch_s, scratch_t);
  }
}
template <class Rule, class R>
KDK_FN void stage_one(RowState<ByRow<R>>& row, const RowProblem& problem,
                      const Temperature<R>& temperature) {
  if constexpr (!kBinary<Rule>) find_maxima<kTargetApart<Rule>>(row, problem, temperature);
}

template <class Rule, class M, class R = typename M::Real>
KDK_FN void stage_two(RowState<M>& row, const Temperature<R>& temperature) {
  if constexpr (!kBinary<Rule>)
    exponentiate<kTargetApart<Rule>, rules::PointwiseOf<Rule>::type::centred>(row, temperature);
}

// The gradient may lie where the student's logits do.
template <class Rule, bool kGradient, class M, class G, class R = typename M::Real>
KDK_FN typename M::S stage_three(RowState<M>& row, const RowProblem& problem,
                                 const Temperature<R>& temperature, const Sink<G, R>& sink) {
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
