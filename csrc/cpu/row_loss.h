// All rows of a problem: which rows a thread takes, where their logits lie, masks and coefficients.
#pragma once

#include "binary.h"
#include "convert.h"
#include "row_kernel.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {


constexpr int64_t kGrain = 16384;        // classes below which a second thread does not pay
constexpr int64_t kLaneClasses = 4096;   // most classes for which rows share vectors

template <class R>
KDK_FN int64_t padded(int64_t classes) {
  return (classes + 63) / 64 * 64 + 64;
}

constexpr int64_t kPipelined = 512;      // most classes for which rows go through the stages abreast
constexpr int kAbreast = 3;
constexpr int64_t kFetched = 4096;       // fewest classes for which the next row is fetched ahead
constexpr int64_t kDealt = 1 << 19;      // classes that a thread takes at a time of a large problem
constexpr int64_t kShares = 16;          // fewest parts that a large problem is dealt in

// A thread's scratch, `count` values each, for `sets` rows at once.
template <class R>
struct Scratch {
  static constexpr int kArrays = 7;
  R* base;
  int64_t count;
  bool logits_read_again;

  KDK_FN Scratch(int64_t count, int sets, bool logits_read_again)
      : base(static_cast<R*>(cpu::scratch(sizeof(R) * kArrays * count * sets))),
        count(count),
        logits_read_again(logits_read_again) {}

  // Arrays whose content is dead by the time another is written share memory: the exponentials and
  // the gradient take the place of the logits, unless the rule reads those again.
  KDK_FN R* student(int set) const { return base + (kArrays * set) * count; }
  KDK_FN R* teacher(int set) const { return base + (kArrays * set + 1) * count; }
  KDK_FN R* gradient(int set) const {
    return logits_read_again ? base + (kArrays * set + 3) * count : student(set);
  }
  template <class M>
  KDK_FN void give(RowState<M>& row, int set) const {
    R* const own = base + kArrays * set * count;
    row.exp_t = own + 2 * count;
    row.exp_s = logits_read_again ? own + 4 * count : student(set);
    row.gap = logits_read_again ? own + 5 * count : teacher(set);
    row.exp_hard = own + 6 * count;
  }
};

template <class Rule>
KDK_FN bool reads_logits_again(const RowProblem& problem) {
  if constexpr (kBinary<Rule>) return false;
  else return problem.standardize || !rules::PointwiseOf<Rule>::type::centred;
}

// A row's number, or that of all rows.
template <class R>
KDK_FN R of_row(const void* numbers, int64_t row, R otherwise) {
  return numbers ? static_cast<const R*>(numbers)[row] : otherwise;
}

// What multiplies a row's divergence and its cross-entropy, and 1 / temperature.
template <class R>
struct RowFactors {
  R value, hard, upstream, inverse_temperature;

  KDK_FN RowFactors(const RowProblem& problem, const Temperature<R>& temperature, int64_t row)
      : value(R(problem.scale) * of_row<R>(problem.token_weight, row, R(1))),
        hard(R(problem.hard) * of_row<R>(problem.hard_token_weight, row, R(1))),
        upstream(of_row<R>(problem.upstream, row, R(1))),
        inverse_temperature(problem.row_temperature
                                ? R(1) / of_row<R>(problem.row_temperature, row, R(1))
                                : temperature.inverse) {}
};

// The values of a row of the loss and of its parts.
template <class R>
KDK_FN void put_values(const RowProblem& problem, int64_t row, R value, R hard, R entropy) {
  static_cast<R*>(problem.loss)[row] = value + hard;
  if (!problem.parts) return;
  R* const parts = static_cast<R*>(problem.parts);
  parts[row] = value;
  parts[problem.rows + row] = hard;
  parts[2 * problem.rows + row] = entropy;
}

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
    scratch.give(state, set);
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

// Rows begin to end, lanes across the rows.
template <class Rule, class R>
void rows_by_row(const RowProblem& problem, int64_t begin, int64_t end) {
  constexpr int kW = kLanes<R>;
  const int64_t classes = problem.classes;
  const Scratch<R> scratch(classes * kW + 64, 1, reads_logits_again<Rule>(problem));
  const Temperature<R> temperature(problem);
  RowState<ByRow<R>> state;
  scratch.give(state, 0);
  state.mode.classes = classes;
  state.s = scratch.student(0);
  state.t = scratch.teacher(0);
  const Sink<R, R> sink{scratch.gradient(0)};
  for (int64_t row = begin; row < end; row += kW) {
    const int count = int(end - row < kW ? end - row : kW);
    typename Simd<R>::I ignored{};
    Vec<R> weight{}, hard_weight{};
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
    read_lanes(problem.student, row, count, classes, scratch.student(0));
    read_lanes(problem.teacher, row, count, classes, scratch.teacher(0));
    stage_one<Rule>(state, problem, temperature);
    stage_two<Rule>(state, temperature);
    Vec<R> value;
    if (problem.gradient.data) {
      value = stage_three<Rule, true>(state, problem, temperature, sink);
      if (problem.target) {
        for (int64_t c = 0; c < classes; ++c) {
          const Vec<R> out = load<R>(sink.to + c * kW);
          store<R>(sink.to + c * kW, rules::select(ignored, Vec<R>{}, out));
        }
      }
      write_lanes(problem.gradient, row, count, classes, sink.to);
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
  const Rows& student = problem.student;
  const bool by_row = student.class_stride != 1 && student.stride[student.dims - 1] == 1 &&
                      problem.classes <= kLaneClasses;
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
