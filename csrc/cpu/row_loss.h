// All rows of a problem: which rows a thread takes, where their logits lie, masks and coefficients.
#pragma once

#include "convert.h"
#include "row_kernel.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {

using cpu::RowProblem;

constexpr int64_t kGrain = 16384;        // classes below which a second thread does not pay
constexpr int64_t kLaneClasses = 4096;   // most classes for which rows share vectors

template <class R>
KDK_FN int64_t padded(int64_t classes) {
  return (classes + 63) / 64 * 64 + 64;
}

// A thread's scratch, `count` values each.
template <class R>
struct Scratch {
  R *student, *teacher, *gradient, *exp_s, *exp_t, *gap;

  // Arrays whose content is dead by the time another is written share memory: the exponentials and
  // the gradient take the place of the logits, unless the rule reads those again.
  KDK_FN Scratch(int64_t count, bool logits_read_again) {
    const int arrays = logits_read_again ? 6 : 3;
    R* base = static_cast<R*>(cpu::scratch(sizeof(R) * arrays * count));
    student = base;
    teacher = base + count;
    exp_t = base + 2 * count;
    gradient = logits_read_again ? base + 3 * count : student;
    exp_s = logits_read_again ? base + 4 * count : student;
    gap = logits_read_again ? base + 5 * count : teacher;
  }
  KDK_FN Workspace<R> workspace() const { return {exp_s, exp_t, gap}; }
};

template <class Rule>
KDK_FN bool reads_logits_again(const RowProblem& problem) {
  return problem.standardize || !PointwiseOf<Rule>::type::centred;
}

template <class R>
KDK_FN R row_factor(const RowProblem& problem, int64_t row) {
  const R upstream = problem.upstream ? static_cast<const R*>(problem.upstream)[row] : R(1);
  return R(problem.scale) * upstream;
}

template <class Rule, class R>
void rows_by_class(const RowProblem& problem, int64_t begin, int64_t end) {
  const int64_t classes = problem.classes;
  const bool again = reads_logits_again<Rule>(problem);
  const Scratch<R> scratch(padded<R>(classes), again);
  const Temperature<R> temperature(problem.temperature);
  const bool wants_gradient = problem.gradient.data != nullptr;
  const bool direct_s = direct<R>(problem.student), direct_t = direct<R>(problem.teacher);
  const bool direct_g = direct<R>(problem.gradient);
  R* const loss = static_cast<R*>(problem.loss);
  ByClass<R> mode{classes};
  for (int64_t row = begin; row < end; ++row) {
    R* gradient = scratch.gradient;
    if (wants_gradient && direct_g)
      gradient = static_cast<R*>(problem.gradient.data) + problem.gradient.offset(row);
    if (problem.target && problem.target[row] == problem.ignore_index) {
      loss[row] = R(0);
      if (!wants_gradient) continue;
      std::memset(gradient, 0, sizeof(R) * classes);
      if (!direct_g) write_row(problem.gradient, row, classes, gradient);
      continue;
    }
    if (problem.target) mode.excluded = problem.target[row];
    const R* s = scratch.student;
    const R* t = scratch.teacher;
    if (direct_s) s = static_cast<const R*>(problem.student.data) + problem.student.offset(row);
    else read_row(problem.student, row, classes, scratch.student);
    if (direct_t) t = static_cast<const R*>(problem.teacher.data) + problem.teacher.offset(row);
    else read_row(problem.teacher, row, classes, scratch.teacher);
    const R factor = row_factor<R>(problem, row);
    Workspace<R> work = scratch.workspace();
    if (wants_gradient && direct_g && !again) work.exp_s = gradient;
    if (wants_gradient) {
      loss[row] = run_row<Rule, true>(mode, problem, s, t, gradient, work, temperature, factor);
      if (!direct_g) write_row(problem.gradient, row, classes, gradient);
    } else {
      loss[row] = run_row<Rule, false>(mode, problem, s, t, gradient, work, temperature, factor);
    }
    loss[row] *= R(problem.scale);
  }
}

template <class Rule, class R>
void rows_by_row(const RowProblem& problem, int64_t begin, int64_t end) {
  constexpr int kW = kLanes<R>;
  const int64_t classes = problem.classes;
  const Scratch<R> scratch(classes * kW + 64, reads_logits_again<Rule>(problem));
  const Temperature<R> temperature(problem.temperature);
  const bool wants_gradient = problem.gradient.data != nullptr;
  R* const loss = static_cast<R*>(problem.loss);
  ByRow<R> mode{classes};
  for (int64_t row = begin; row < end; row += kW) {
    const int count = int(end - row < kW ? end - row : kW);
    Vec<R> factor{};
    typename Simd<R>::I ignored{};
    for (int lane = 0; lane < count; ++lane) {
      factor[lane] = row_factor<R>(problem, row + lane);
      if (!problem.target) continue;
      const int64_t target = problem.target[row + lane];
      ignored[lane] = target == problem.ignore_index ? -1 : 0;
      mode.excluded[lane] = typename Simd<R>::Int(ignored[lane] ? 0 : target);
    }
    for (int lane = count; lane < kW; ++lane) mode.excluded[lane] = 0;
    read_lanes(problem.student, row, count, classes, scratch.student);
    read_lanes(problem.teacher, row, count, classes, scratch.teacher);
    Vec<R> value;
    if (wants_gradient) {
      value = run_row<Rule, true>(mode, problem, scratch.student, scratch.teacher,
                                  scratch.gradient, scratch.workspace(), temperature,
                                  factor);
      if (problem.target) {
        for (int64_t c = 0; c < classes; ++c) {
          const Vec<R> out = load<R>(scratch.gradient + c * kW);
          store<R>(scratch.gradient + c * kW, rules::select(ignored, Vec<R>{}, out));
        }
      }
      write_lanes(problem.gradient, row, count, classes, scratch.gradient);
    } else {
      value = run_row<Rule, false>(mode, problem, scratch.student, scratch.teacher,
                                   scratch.gradient, scratch.workspace(), temperature,
                                  factor);
    }
    value = rules::select(ignored, Vec<R>{}, Vec<R>(value * R(problem.scale)));
    for (int lane = 0; lane < count; ++lane) loss[row + lane] = value[lane];
  }
}

template <class Rule, class R>
void run_rows(const RowProblem& problem, cpu::ParallelFor parallel_for) {
  struct Context {
    const RowProblem& problem;
    int64_t unit;  // rows that a task takes together
  };
  const Rows& student = problem.student;
  const bool by_row = student.class_stride != 1 && student.stride[student.dims - 1] == 1 &&
                      problem.classes <= kLaneClasses;
  Context context{problem, by_row ? kLanes<R> : 1};
  const int64_t units = (problem.rows + context.unit - 1) / context.unit;
  const int64_t grain = kGrain / (problem.classes * context.unit) + 1;
  parallel_for(
      units, grain,
      [](void* opaque, int64_t first, int64_t last) {
        const Context& c = *static_cast<const Context*>(opaque);
        const int64_t begin = first * c.unit;
        const int64_t end = last * c.unit < c.problem.rows ? last * c.unit : c.problem.rows;
        if (c.unit == 1) rows_by_class<Rule, R>(c.problem, begin, end);
        else rows_by_row<Rule, R>(c.problem, begin, end);
      },
      &context);
}

}  // namespace kdkernels::KDK_ISA
