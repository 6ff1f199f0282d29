// One row of the divergence and target-decoupled families, whoever walks it and wherever it lies.
//
// With k = 1 / temperature, a = s - max s, b = t - max t:
//   q = exp(k a) / Z_s,  p = exp(k b) / Z_t,  log p - log q = k (b - a) - log(Z_t / Z_s),
// which is exact near p = q: the gap b - a is taken before anything is rounded by a factor. A rule's
// value and slope follow (csrc/rules/contract.h); the gradient by the logits is k (slope - q sum(slope)).
// Rules whose slopes sum to 0, and rows without standardisation, need no sweep for that sum. Other rules
// look for the student's most likely class in the first sweep, and take its slope per q off all others.
//
// Half logits leave half the time for a class: there 1 / Z goes into the exponent, which rounds q by
// some 1e-6, far below the gradient's rounding.
#pragma once

#include <type_traits>

#include "../rules/contract.h"
#include "groups.cuh"
#include "sources.cuh"
#include "task.h"
#include "totals.cuh"

namespace kdkernels::cuda {

using rules::logarithm;

template <class R>
struct RowValue {
  R once;       // the same in all threads
  R of_classes;  // summed over the classes
};

// Which rows a thread's group takes, what they weigh, and where their values go.
template <class Rule, class R>
class RowLoop {
 public:
  static constexpr bool kDecoupled = Rule::family == Family::decoupled;

  KDK_DEVICE explicit RowLoop(const RowTask& task)
      : task_(task), k_(R(1.0 / task.problem.temperature)), weight_(R(task.problem.scale)) {
    if (!task.counts && !task.count) return;
    // A lane adds every 32nd part, counted by the kernel before, or looks at every 32nd row.
    int64_t valid[1] = {0};
    const int lane = thread_index() % kWarp;
    if (task.counts) {
      for (int part = lane; part < task.parts; part += kWarp) valid[0] += task.counts[part];
    } else {
      for (int64_t row = lane; row < task.problem.rows; row += kWarp)
        valid[0] += task.problem.target[row] != task.problem.ignore_index;
    }
    reduce_lanes<Sum>(valid, kWarp);
    weight_ /= R(valid[0] > 0 ? valid[0] : 1);
  }

  struct Row {
    bool valid;
    int64_t target;
    R weight;    // of the value; NaN where the target is no class
    R upstream;  // the gradient's factor next to it
    R k;         // 1 / temperature
  };

  KDK_DEVICE Row row(int64_t index) const {
    const RowProblem& problem = task_.problem;
    Row row{index < problem.rows, 0, weight_, R(1), k_};
    if (!row.valid) return row;
    if (problem.row_temperature)
      row.k = R(1) / static_cast<const R*>(problem.row_temperature)[index];
    if (problem.token_weight) row.weight *= static_cast<const R*>(problem.token_weight)[index];
    if (problem.target) {
      row.target = problem.target[index];
      row.valid = row.target != problem.ignore_index;
      if (kDecoupled && (row.target < 0 || row.target >= problem.classes)) {
        row.target = 0;
        row.weight = R(NAN);
      }
    }
    if (problem.upstream)
      row.upstream = static_cast<const R*>(problem.upstream)[index * task_.upstream_stride];
    return row;
  }

  // Called by all threads of the row's group, of which one is the first.
  KDK_DEVICE void keep(int64_t index, const Row& row, const RowValue<R>& value, bool first) {
    if (!row.valid) {
      if (first && task_.problem.loss && index < task_.problem.rows) losses()[index] = R(0);
      return;
    }
    if (!task_.problem.loss) {
      total_ += double(
          rules::weighted(first ? value.once + value.of_classes : value.of_classes, row.weight));
    } else if (first) {
      losses()[index] = rules::weighted(value.once + value.of_classes, row.weight);
    }
  }

  // The sum of all values; all threads of the grid call it.
  KDK_DEVICE void finish() {
    if (task_.partials) add_up<R>(total_, task_.partials, task_.ticket, task_.total);
  }

 private:
  KDK_DEVICE R* losses() const { return static_cast<R*>(task_.problem.loss); }

  const RowTask& task_;
  R k_, weight_;
  double total_ = 0;
};

// Mean and standard deviation (unbiased) of a row. The mean is centre + rest: rounded to one number it
// would be off by as much as the logits are.
template <class R>
struct Moments {
  R centre, rest, deviation;
  KDK_DEVICE R from_mean(R x) const { return (x - centre) - rest; }
};

// Differences to the first class give the centre, which is that logit where the row is constant;
// differences to the centre give the rest, so that a first logit far from the others does no harm.
template <class R, class Source, class Group>
KDK_DEVICE void moments(const Source& source, Group& group, R classes, Moments<R>& of_s,
                        Moments<R>& of_t) {
  R sum[2] = {0, 0};
  const R first_s = source.student(0), first_t = source.teacher(0);
  source.each_class([&](int64_t, R s, R t) {
    sum[0] += s - first_s;
    sum[1] += t - first_t;
  });
  group.template reduce<Sum>(sum);
  of_s.centre = first_s + sum[0] / classes;
  of_t.centre = first_t + sum[1] / classes;
  R sums[4] = {0, 0, 0, 0};  // of the differences, and of their squares
  source.each_class([&](int64_t, R s, R t) {
    const R a = s - of_s.centre, b = t - of_t.centre;
    sums[0] += a;
    sums[1] += b;
    sums[2] += a * a;
    sums[3] += b * b;
  });
  group.template reduce<Sum>(sums);
  of_s.rest = sums[0] / classes;
  of_t.rest = sums[1] / classes;
  of_s.deviation = std::sqrt((sums[2] - sums[0] * of_s.rest) / (classes - 1));
  of_t.deviation = std::sqrt((sums[3] - sums[1] * of_t.rest) / (classes - 1));
}

// The logits of the student's most likely class (any of them), found in the sweep that sums; -inf where
// the row has none. Rules that are centred do not look.
template <class R, bool kWanted>
struct Likeliest {
  R student = -R(INFINITY), teacher = -R(INFINITY);

  KDK_DEVICE void look(R s, R t) {
    if constexpr (kWanted) {
      teacher = s > student ? t : teacher;
      student = larger(student, s);
    }
  }
  // Of this thread's classes before, of the group's after.
  template <class Group>
  KDK_DEVICE void join(Group& group) {
    R most[1] = {student};
    group.template reduce<Max>(most);
    R its[1] = {student == most[0] ? teacher : -R(INFINITY)};
    group.template reduce<Max>(its);
    student = most[0];
    teacher = its[0];
  }
};

// An origin of the row, and sums of 2^(k (x - origin)): the maxima where the row is in registers. A long row
// is not swept for them: a thread begins at its first classes, unless they are masked or the sum becomes
// large, and fuses the product with the difference, k x - fl(k origin); what that rounding did, the same
// factor for all of a thread's classes, is taken out of the sums. A group that has to meet does so once.
template <class R, class Source, class Group, class Look>
KDK_DEVICE void sum_exponentials(const Source& source, Group& group, const R (&k)[2], R (&origin)[2],
                                 R (&z)[2], Look& likeliest) {
  if constexpr (Source::kLong) {
    source.find_first(origin);
    if (origin[0] == -R(INFINITY) || origin[1] == -R(INFINITY)) source.find_maxima(origin);
    KDK_UNROLL_BY(1)
    for (int attempt = 0; attempt < 2; ++attempt) {
      R factor[2], at[2];
      KDK_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (origin[i] == -R(INFINITY)) origin[i] = R(0);
        factor[i] = bounded_factor(origin[i], k[i]);
        at[i] = product(origin[i], factor[i]);
        z[i] = 0;
      }
      source.each([&](R s, R t) {
        z[0] += power_of_two(multiply_add(s, factor[0], -at[0]));
        z[1] += power_of_two(multiply_add(t, factor[1], -at[1]));
        likeliest.look(s, t);
      });
      KDK_UNROLL
      for (int i = 0; i < 2; ++i) z[i] *= unrounded(multiply_add(origin[i], factor[i], -at[i]));
      // Larger exponents than these would be rounded too much, or overflow.
      if (z[0] <= R(4096) && z[1] <= R(4096)) break;
      origin[0] = origin[1] = -R(INFINITY);
      source.find_maxima(origin);
    }
    KDK_UNROLL
    for (int i = 0; i < 2; ++i) origin[i] = z[i] == R(0) ? -R(INFINITY) : origin[i];
  } else {
    source.find_maxima(origin);
    if constexpr (!Group::kShares) group.template reduce<Max>(origin);
    // Of a thread without classes, or with masked ones only, the sum is 0 whatever the origin.
    const R from[2] = {origin[0] == -R(INFINITY) ? R(0) : origin[0],
                       origin[1] == -R(INFINITY) ? R(0) : origin[1]};
    source.each([&](R s, R t) {
      z[0] += power_of_two((s - from[0]) * k[0]);
      z[1] += power_of_two((t - from[1]) * k[1]);
      likeliest.look(s, t);
    });
  }
  if constexpr (Group::kShares) group.reduce_exponentials(origin, z, k);
  else group.template reduce<Sum>(z);
}

// The value of one row, and its gradient into the source. The sum over classes is that of all where the
// rows' values are wanted, else of this thread's, which saves a reduction a row. kGeneral sources know
// the class of each element and serve standardisation.
template <class Rule, class R, bool kGeneral, class Source, class Group>
KDK_DEVICE RowValue<R> process_row(const RowProblem& problem, const typename RowLoop<Rule, R>::Row& row,
                         R target_s, R target_t, Source& source, Group& group) {
  using Pointwise = typename rules::PointwiseOf<Rule>::type;
  constexpr bool kDecoupled = Rule::family == Family::decoupled;
  static_assert(rules::keeps_contract<Rule>());
  const R infinity = R(INFINITY);

  R k_s = row.k, k_t = k_s;
  Moments<R> of_s{R(0), R(0), R(1)};
  R spread_s = 1;
  if constexpr (kGeneral) {
    if (problem.standardize) {
      Moments<R> of_t;
      moments(source, group, R(problem.classes), of_s, of_t);
      spread_s = of_s.deviation + R(rules::kStandardizeEps);
      k_s = k_s / spread_s;
      k_t = k_t / (of_t.deviation + R(rules::kStandardizeEps));
    }
  }
  if constexpr (kDecoupled) source.exclude(row.target);

  constexpr bool kHalf = Source::kHalf;
  const R two_s = k_s * R(kLog2E), two_t = k_t * R(kLog2E), two[2] = {two_s, two_t};
  R origin[2] = {-infinity, -infinity}, z[2] = {0, 0};
  Likeliest<R, !Pointwise::centred> likeliest;
  sum_exponentials(source, group, two, origin, z, likeliest);
  if constexpr (kDecoupled) {  // no class but the target: any finite origin will do
    for (int k = 0; k < 2; ++k) origin[k] = origin[k] == -infinity ? R(0) : origin[k];
  }
  R inverse_s = R(1) / z[0], inverse_t = R(1) / z[1];

  R value = 0, explicit_slope = 0, implicit_weight = 1;
  if constexpr (kDecoupled) {
    inverse_s = z[0] == R(0) ? R(0) : inverse_s;
    inverse_t = z[1] == R(0) ? R(0) : inverse_t;
    // Log-odds of the other classes against the target.
    const R odds_s = logarithm(z[0]) - (target_s - origin[0]) * k_s;
    const R odds_t = logarithm(z[1]) - (target_t - origin[1]) * k_t;
    Rule::explicit_term(problem.options, rules::two_point<R>(odds_t), rules::two_point<R>(odds_s),
                        value, explicit_slope, implicit_weight);
    // A teacher without other classes has no implicit term.
    implicit_weight = z[1] == R(0) ? R(0) : implicit_weight;
  }

  const R log_z_ratio = logarithm(z[0] == R(0) ? R(0) : z[1] / z[0]);
  const R shift_s = kHalf && z[0] != R(0) ? logarithm(z[0]) * R(kLog2E) : R(0);
  const R shift_t = kHalf && z[1] != R(0) ? logarithm(z[1]) * R(kLog2E) : R(0);
  const R g = row.weight * row.upstream * k_s;
  // Of a student without other classes the implicit term is infinite, and its gradient is 0.
  const R g_implicit = kDecoupled && z[0] == R(0) ? R(0) : g * implicit_weight;
  const R g_explicit = g * explicit_slope;
  R pivot = 0;
  const auto terms = [&](R s, R t, R& q, R& v, R& slope) {
    const R a = s - origin[0], b = t - origin[1];
    R p;
    if constexpr (kHalf) {
      q = power_of_two(multiply_add(a, two_s, -shift_s));
      p = power_of_two(multiply_add(b, two_t, -shift_t));
    } else {
      q = power_of_two(a * two_s) * inverse_s;
      p = power_of_two(b * two_t) * inverse_t;
    }
    const R gap = kGeneral && problem.standardize ? product(b, k_t) - product(a, k_s)
                                                  : (b - a) * k_s;
    Pointwise::pointwise(problem.options, p, q, R(gap - log_z_ratio), v, slope);
    if constexpr (!Pointwise::centred) slope -= q * pivot;
  };

  R pull = 0, along = 0;
  if constexpr (!Pointwise::centred) {
    if (problem.gradient.data) {
      R q, v, slope;
      likeliest.join(group);
      terms(likeliest.student, likeliest.teacher, q, v, slope);
      pivot = rules::pivot_of(slope, q);
    }
  }
  if constexpr (!kGeneral && !Pointwise::centred) {
    if (problem.gradient.data) {
      R sum[1] = {0};
      source.each([&](R s, R t) {
        R q, v, slope;
        terms(s, t, q, v, slope);
        sum[0] += slope;
      });
      group.template reduce<Sum>(sum);
      pull = g_implicit * sum[0];
    }
  }
  if constexpr (kGeneral) {
    if (problem.gradient.data && (problem.standardize || !Pointwise::centred)) {
      // Of slope, slope (s - mean), q (s - mean), over the classes of the softmax.
      R sums[3] = {0, 0, 0};
      source.each([&](R s, R t) {
        R q, v, slope;
        terms(s, t, q, v, slope);
        sums[0] += slope;
        sums[1] += slope * of_s.from_mean(s);
        sums[2] += q * of_s.from_mean(s);
      });
      group.template reduce<Sum>(sums);
      pull = Pointwise::centred ? R(0) : g_implicit * sums[0];
      if (problem.standardize && of_s.deviation != R(0)) {
        along = g_implicit * sums[1] - (pull + g_explicit) * sums[2];
        if constexpr (kDecoupled) along += g_explicit * of_s.from_mean(target_s);
        along /= spread_s * of_s.deviation * R(problem.classes - 1);
      }
    }
  }

  R divergence[1] = {0};
  if (row.valid) {
    const auto gradient = [&](R s, R t) {
      R q, v, slope;
      terms(s, t, q, v, slope);
      divergence[0] += v;
      R out = slope * g_implicit;
      if constexpr (kDecoupled || kGeneral || !Pointwise::centred) out -= (pull + g_explicit) * q;
      if (kGeneral && problem.standardize) out -= along * of_s.from_mean(s);  // s may be -inf
      return out;
    };
    source.emit(gradient);
    if constexpr (kDecoupled) {
      const R pulled = kGeneral && problem.standardize ? along * of_s.from_mean(target_s) : R(0);
      source.put(row.target, g_explicit - pulled);
    }
  } else {
    source.clear();
  }
  if (problem.loss) group.template reduce<Sum>(divergence);
  if constexpr (!kDecoupled) return {R(0), divergence[0]};
  // 0 * inf would be NaN where the term is absent.
  return {value, z[1] == R(0) ? R(0) : rules::weighted(divergence[0], implicit_weight)};
}

// All rows of a block's groups, one row a group at a time: rows start + offset, start + step + offset...
// `start` is the same for all threads that synchronise with each other. make_source(index, valid) returns the
// row's source; one that fetches ahead is also told the next row.
template <class Rule, class R, bool kGeneral, class Group, class MakeSource>
KDK_DEVICE void walk_rows(const RowTask& task, Group& group, int64_t start, int64_t offset,
                          int64_t step, const MakeSource& make_source) {
  constexpr bool kAhead = std::is_invocable_v<MakeSource, int64_t, bool, int64_t, bool>;
  RowLoop<Rule, R> loop(task);
  for (int64_t base = start; base < task.problem.rows; base += step) {
    const int64_t index = base + offset;
    const auto row = loop.row(index);
    auto source = [&] {
      if constexpr (kAhead)
        return make_source(index, row.valid, index + step, loop.row(index + step).valid);
      else return make_source(index, row.valid);
    }();
    R target_s = 0, target_t = 0;
    if (RowLoop<Rule, R>::kDecoupled && row.valid) {
      target_s = rules::logit_or_nan(R(source.student(row.target)));
      target_t = rules::logit_or_nan(R(source.teacher(row.target)));
    }
    const RowValue<R> value =
        process_row<Rule, R, kGeneral>(task.problem, row, target_s, target_t, source, group);
    loop.keep(index, row, value, group.rank() == 0);
  }
  loop.finish();
}

}  // namespace kdkernels::cuda
