// All rows of a problem: which rows a thread takes, where their logits lie, masks and coefficients.
#pragma once

#include "row_lanes.h"

namespace kdkernels::KDK_ISA {

constexpr int64_t kGrain = 16384;        // classes below which a second thread does not pay

template <class R>
KDK_FN int64_t padded(int64_t classes) {
  return (classes + 63) / 64 * 64 + 64;
}

constexpr int64_t kPipelined = 512;      // most classes for which rows go through the stages abreast
constexpr int kAbreast = 3;
constexpr int64_t kFetched = 4096;       // fewest classes for which the next row is fetched ahead
constexpr int64_t kDealt = 1 << 19;      // classes that a thread takes at a time of a large problem
constexpr int64_t kShares = 16;          // fewest parts that a large problem is dealt in

// Rows begin to end, lanes along the classes. T is the gradient's type where it can be written where
// it lies, else R (and then each row goes through scratch); void where none is wanted.
template <class Rule, class R, class T>
void rows_by_class(const RowProblem& problem, int64_t begin, int64_t end) {
  using G = std::conditional_t<std::is_void_v<T>, R, T>;
  constexpr bool kGradient = !std::is_void_v<T>;
  const int64_t classes = problem.classes;
  const bool again = reads_logits_again<Rule>(problem);
  const bool in_place = kGradient && problem.gradient.class_stride == 1 &&
                        (problem.gradient.type == kScalar<R> || !std::is_same_v<G, R>);
  const int abreast = classes <= kPipelined ? kAbreast : 1;
  const Scratch<R> scratch(padded<R>(classes), abreast, again);
  const Temperature<R> temperature(problem);
  RowState<ByClass<R>> states[kAbreast];

  const auto ignored = [&](int64_t row) KDK_LAMBDA {
    return problem.target && problem.target[row] == problem.ignore_index;
  };
  const auto sink = [&](int64_t row) KDK_LAMBDA {
    if constexpr (!kGradient) return Sink<G, R>{nullptr};
    else if (!in_place) return Sink<G, R>{reinterpret_cast<G*>(scratch.gradient(row % abreast))};
    return Sink<G, R>{static_cast<G*>(problem.gradient.data) + problem.gradient.offset(row)};
  };
  const auto start = [&](int64_t row) KDK_LAMBDA {
    const int set = int(row % abreast);
    RowState<ByClass<R>>& state = states[set];
    state.mode = ByClass<R>{classes, problem.target ? problem.target[row] : -1};
    const RowFactors<R> factors(problem, temperature, row);
    state.coefficient = factors.value * factors.upstream;
    state.hard_coefficient = factors.hard * factors.upstream;
    state.inverse_temperature = factors.inverse_temperature;
    if (classes >= kFetched) {
      int64_t next = row + 1;  // what is ignored is not fetched either
      while (next < end && ignored(next)) ++next;
      state.ahead_s = state.ahead_t = {};
      if (next < end) {
        state.ahead_s = {address(problem.student, next), element_bytes(problem.student.type)};
        state.ahead_t = {address(problem.teacher, next), element_bytes(problem.teacher.type)};
      }
    }
    scratch.give(state, set, set);
    if constexpr (kGradient && std::is_same_v<G, R>)
      if (in_place && !again) state.exp_s = sink(row).to;
    stage_one<Rule>(state, problem, temperature, row, scratch.student(set), scratch.teacher(set));
  };
  const auto end_row = [&](int64_t row) KDK_LAMBDA {
    const Sink<G, R> to = sink(row);
    if (ignored(row)) {
      put_values<R>(problem, row, R(0), R(0), R(0));
      if constexpr (kGradient) std::memset(to.to, 0, sizeof(G) * classes);
    } else {
      RowState<ByClass<R>>& state = states[row % abreast];
      const R value = stage_three<Rule, kGradient>(state, problem, temperature, to);
      const RowFactors<R> factors(problem, temperature, row);
      put_values<R>(problem, row, rules::weighted(value, factors.value),
                    temperature.hard ? rules::weighted(state.hard_value, factors.hard) : R(0),
                    state.entropy);
    }
    if constexpr (kGradient && std::is_same_v<G, R>)
      if (!in_place) write_row(problem.gradient, row, classes, to.to);
  };

  const int64_t lag = abreast / 2;  // rows between one stage and the next
  for (int64_t row = begin; row < end + 2 * lag; ++row) {
    if (row < end && !ignored(row)) start(row);
    const int64_t second = row - lag, third = row - 2 * lag;
    if (second >= begin && second < end && !ignored(second))
      stage_two<Rule>(states[second % abreast], temperature);
    if (third >= begin) end_row(third);
  }
}

template <class Rule, class R>
void rows_by_class(const RowProblem& problem, int64_t begin, int64_t end) {
  const Rows& gradient = problem.gradient;
  if (!gradient.data) return rows_by_class<Rule, R, void>(problem, begin, end);
  if constexpr (std::is_same_v<R, float>) {
    if (gradient.class_stride == 1 && !reads_logits_again<Rule>(problem)) {
      if (gradient.type == Scalar::bf16) return rows_by_class<Rule, R, bf16>(problem, begin, end);
      if (gradient.type == Scalar::f16) return rows_by_class<Rule, R, f16>(problem, begin, end);
    }
  }
  rows_by_class<Rule, R, R>(problem, begin, end);
}

// A thread takes rows begin to end, in units of `unit` rows.
template <class Rule, class R>
void take_rows(const RowProblem& problem, int64_t unit, int64_t first, int64_t last) {
  const int64_t begin = first * unit;
  const int64_t end = last * unit < problem.rows ? last * unit : problem.rows;
  if (unit == 1) rows_by_class<Rule, R>(problem, begin, end);
  else rows_by_row<Rule, R>(problem, begin, end);
}

template <class Rule, class R>
void run_rows(const RowProblem& problem, cpu::ParallelFor parallel_for) {
  struct Context {
    const RowProblem& problem;
    int64_t unit;   // rows that a task takes together
    int64_t units;
    int64_t share;  // units that are dealt at a time, or 0
    int64_t next;   // unit to be dealt
  };
  const bool by_row = across(problem.student) && problem.classes <= kLaneClasses;
  const int64_t unit = by_row ? kLanes<R> : 1;
  Context context{problem, unit, (problem.rows + unit - 1) / unit, 0, 0};
  // Ignored rows come in runs and cores are shared, so equal parts of a large problem would end at
  // different times: whoever is done takes the next rows.
  if (problem.rows * problem.classes >= 2 * kDealt) {
    const int64_t most = kDealt / (problem.classes * unit), part = context.units / kShares;
    context.share = most < part ? most : part;
    if (context.share < 1) context.share = 1;
  }
  if (!context.share) {
    const int64_t grain = kGrain / (problem.classes * unit) + 1;
    return parallel_for(
        context.units, grain,
        [](void* opaque, int64_t first, int64_t last) {
          const Context& c = *static_cast<const Context*>(opaque);
          take_rows<Rule, R>(c.problem, c.unit, first, last);
        },
        &context);
  }
  parallel_for(
      (context.units + context.share - 1) / context.share, 1,
      [](void* opaque, int64_t, int64_t) {
        Context& c = *static_cast<Context*>(opaque);
        for (;;) {
          const int64_t first = __atomic_fetch_add(&c.next, c.share, __ATOMIC_RELAXED);
          if (first >= c.units) return;
          const int64_t last = first + c.share < c.units ? first + c.share : c.units;
          take_rows<Rule, R>(c.problem, c.unit, first, last);
        }
      },
      &context);
}

}  // namespace kdkernels::KDK_ISA
