// Rows whose classes are far apart and whose neighbours are near (NCHW): lanes are rows.
#pragma once

#include "convert.h"
#include "row_scratch.h"

namespace kdkernels::KDK_ISA {

// Rows begin to end, lanes across the rows; those of a span are read and written together, so that what
// lies together in memory is moved together.
template <class Rule, class R>
void rows_by_row(const RowProblem& problem, int64_t begin, int64_t end) {
  constexpr int kW = kLanes<R>, kMost = kSpan / kW;
  const int64_t classes = problem.classes, span = classes <= kSpanClasses ? kSpan : kW;
  const Scratch<R> scratch(classes * kW + 64, int(span / kW), reads_logits_again<Rule>(problem));
  const int64_t apart = scratch.student(1) - scratch.student(0);
  const Temperature<R> temperature(problem);
  RowState<ByRow<R>> state;
  state.mode.classes = classes;
  for (int64_t first = begin; first < end; first += span) {
    const int64_t rows = end - first < span ? end - first : span;
    int counted[kMost] = {};  // rows of each vector that are not ignored; it is not read where there are none
    for (int64_t row = 0; row < rows; ++row)
      counted[row / kW] += !problem.target || problem.target[first + row] != problem.ignore_index;
    read_vectors(problem.student, first, rows, classes, scratch.student(0), apart, counted);
    read_vectors(problem.teacher, first, rows, classes, scratch.teacher(0), apart, counted);
    for (int set = 0; set * kW < rows; ++set) {
      const int64_t row = first + set * kW;
      const int count = int(end - row < kW ? end - row : kW);
      const Sink<R, R> sink{scratch.gradient(set)};
      if (!counted[set]) {
        for (int lane = 0; lane < count; ++lane)
          put_values<R>(problem, row + lane, R(0), R(0), R(0));
        if (problem.gradient.data) std::memset(sink.to, 0, sizeof(R) * kW * classes);
        continue;
      }
      typename Simd<R>::I ignored{};
      Vec<R> weight{}, hard_weight{};
      scratch.give(state, set, 0);
      state.s = scratch.student(set);
      state.t = scratch.teacher(set);
      state.coefficient = state.hard_coefficient = Vec<R>{};
      state.inverse_temperature = splat<R>(temperature.inverse);
      state.mode.excluded = typename Simd<R>::I{};
      for (int lane = 0; lane < count; ++lane) {
        const RowFactors<R> factors(problem, temperature, row + lane);
        weight[lane] = factors.value;
        hard_weight[lane] = factors.hard;
        state.coefficient[lane] = factors.value * factors.upstream;
        state.hard_coefficient[lane] = factors.hard * factors.upstream;
        state.inverse_temperature[lane] = factors.inverse_temperature;
        if (!problem.target) continue;
        const int64_t target = problem.target[row + lane];
        ignored[lane] = target == problem.ignore_index ? -1 : 0;
        state.mode.excluded[lane] = typename Simd<R>::Int(ignored[lane] ? 0 : target);
      }
      stage_one<Rule>(state, problem, temperature);
      stage_two<Rule>(state, temperature);
      Vec<R> value;
      if (problem.gradient.data) {
        value = stage_three<Rule, true>(state, problem, temperature, sink);
        if (counted[set] < count) {
          for (int64_t c = 0; c < classes; ++c) {
            const Vec<R> out = load<R>(sink.to + c * kW);
            store<R>(sink.to + c * kW, rules::select(ignored, Vec<R>{}, out));
          }
        }
      } else {
        value = stage_three<Rule, false>(state, problem, temperature, sink);
      }
      value = rules::select(ignored, Vec<R>{}, rules::weighted(value, weight));
      Vec<R> hard{}, entropy{};
      if (temperature.hard)
        hard = rules::select(ignored, hard, rules::weighted(state.hard_value, hard_weight));
      if (temperature.entropy) entropy = rules::select(ignored, entropy, state.entropy);
      for (int lane = 0; lane < count; ++lane)
        put_values<R>(problem, row + lane, value[lane], hard[lane], entropy[lane]);
    }
    if (problem.gradient.data)
      write_vectors(problem.gradient, first, rows, classes, scratch.gradient(0), apart);
  }
}

}  // namespace kdkernels::KDK_ISA
