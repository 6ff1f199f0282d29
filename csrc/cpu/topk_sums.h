// The forward pass over a row against K ids: what its small logits and its cross-entropy need.
//
// It goes over a row in blocks that stay in the first cache. A block is converted to the working type, the
// classes that stand apart become -inf, and the maximum and the sum of exponentials of the others extend
// those of the row. The classes apart join in double afterwards, so that no sum is a difference of two.
#pragma once

#include "topk_row.h"

namespace kdkernels::KDK_ISA {

// A sum of exponentials, by its logarithm.
struct LogSum {
  double max = -std::numeric_limits<double>::infinity(), sum = 0.0;

  KDK_FN void add(double x, double weight = 1.0) {
    if (weight == 0.0 || (x == -std::numeric_limits<double>::infinity() && weight == weight)) return;
    if (x > max) {
      sum = sum * std::exp(max - x) + weight;
      max = x;
    } else {
      sum += weight * std::exp(x - max);
    }
  }
  KDK_FN double log() const { return sum == 0.0 ? max : max + std::log(sum); }
};

// Of the classes that do not stand apart: the largest logit, and sums of exp((z - max) / T), of
// exp(z - max), and of the former times z - max.
struct TopKSums {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0.0, hard = 0.0, moment = 0.0;
};

// Exponentials of a row's logits, each block's from an origin of its own; none where `values` is null.
template <class R>
struct Kept {
  R* values = nullptr;
  double* origins = nullptr;
  bool filled = false;  // by this row
};

// A logit for the classes apart, whose exponential is nothing in a sum with that of `max`. Of float it is
// 2^-100 of it: a result that underflows would take AVX-512's slow path.
template <class R>
KDK_FN R negligible(R max, double temperature) {
  const R gap = R(70.0 * (temperature > 1.0 ? temperature : 1.0));
  if (std::is_same_v<R, double> || !(max - (max - gap) > gap / 2)) return -kInfinity<R>;
  return max - gap;
}

template <class R, bool kHardSum, bool kMoment, bool kKeep = false, class T>
inline TopKSums add_blocks(const TopKRow<R>& row, const TopKScratch<R>& scratch, const T* z,
                           const Kept<R>& kept = {}) {
  using V = Vec<R>;
  constexpr int kW = kLanes<R>;
  constexpr R kNone = -kInfinity<R>;
  const double inverse = 1.0 / row.temperature;
  const Exponential<R> softened(splat<R>(R(inverse))), bare(splat<R>(R(1)));
  TopKSums of;
  R* const x = scratch.block;
  for (int64_t begin = 0, b = 0; begin < row.problem.classes; begin += kTopKBlock, ++b) {
    const int64_t rest = row.problem.classes - begin;
    const int64_t count = rest < kTopKBlock ? rest : kTopKBlock;
    const int64_t whole = count / kW, steps = (count + kW - 1) / kW;
    // Four maxima, because one would wait for itself.
    V tops[4] = {splat<R>(kNone), splat<R>(kNone), splat<R>(kNone), splat<R>(kNone)};
    int64_t step = 0;
    const auto copy = [&](int64_t at, V& top) KDK_LAMBDA {
      const V v = take<R>(z + begin + at * kW);
      store<R>(x + at * kW, v);
      top = maximum(top, v);
    };
    for (; step + 4 <= whole; step += 4)
      for (int k = 0; k < 4; ++k) copy(step + k, tops[k]);
    for (; step < whole; ++step) copy(step, tops[0]);
    if (whole < steps) {
      for (int64_t i = whole * kW; i < steps * kW; ++i)
        x[i] = i < count ? R(widen(z[begin + i])) : kNone;
      tops[0] = maximum(tops[0], load<R>(x + whole * kW));
    }
    const auto replace = [&](R value) KDK_LAMBDA {
      for (int64_t i = scratch.heads[b]; i < scratch.heads[b + 1]; ++i)
        x[scratch.apart[i] - begin] = value;
    };
    V top = maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]));
    // Where a class apart may be the largest, it is looked for again.
    if (double(reduce_max<R>(top)) > of.max) {
      replace(kNone);
      top = splat<R>(kNone);
      for (int64_t i = 0; i < steps; ++i) top = maximum(top, load<R>(x + i * kW));
    }
    const double largest = double(reduce_max<R>(top));
    if (largest > of.max) {
      if (of.max > -std::numeric_limits<double>::infinity()) {
        const double gap = of.max - largest, factor = std::exp(gap * inverse);
        of.moment = (of.moment + gap * of.sum) * factor;
        of.sum *= factor;
        of.hard *= std::exp(gap);
      }
      of.max = largest;
    }
    replace(negligible(R(of.max), row.temperature));
    const V origin = splat<R>(of.max == -std::numeric_limits<double>::infinity() ? R(0) : R(of.max));
    if constexpr (kKeep) kept.origins[b] = of.max;
    V sum{}, hard{}, moment{};
    for (int64_t i = 0; i < steps; ++i) {
      const V u = load<R>(x + i * kW) - origin, e = softened(u);
      if constexpr (kKeep) store<R>(kept.values + begin + i * kW, e);
      sum += e;
      if constexpr (kHardSum) hard += bare(u);
      if constexpr (kMoment) moment += rules::select(e == V{}, V{}, V(u * e));
    }
    of.sum += double(reduce_sum<R>(sum));
    if constexpr (kHardSum) of.hard += double(reduce_sum<R>(hard));
    if constexpr (kMoment) of.moment += double(reduce_sum<R>(moment));
  }
  return of;
}

template <class R, class T>
inline void forward_row(const TopKRow<R>& row, const TopKScratch<R>& scratch, const T* z,
                        Kept<R>* kept = nullptr) {
  const TopKProblem& problem = row.problem;
  const bool hard_sum = row.target >= 0 && row.temperature != 1.0;
  TopKSums of;
  if (kept) kept->filled = !hard_sum && !problem.entropy && (problem.rest || row.target >= 0);
  if (kept && kept->filled) of = add_blocks<R, false, false, true>(row, scratch, z, *kept);
  else if (hard_sum && problem.entropy) of = add_blocks<R, true, true>(row, scratch, z);
  else if (hard_sum) of = add_blocks<R, true, false>(row, scratch, z);
  else if (problem.entropy) of = add_blocks<R, false, true>(row, scratch, z);
  else if (problem.rest || row.target >= 0) of = add_blocks<R, false, false>(row, scratch, z);
  if (!hard_sum) of.hard = of.sum;

  double largest = of.max;
  const auto logit = [&](int64_t id) KDK_LAMBDA {
    const double x = double(widen(z[id]));
    if (x > largest) largest = x;
    return x;
  };
  for (int64_t k = 0; k < problem.k; ++k)
    if (row.ids[k] != kAbsent) scratch.logits[k] = logit(row.ids[k]);
  const double at_target = row.target >= 0 ? logit(row.target) : 0.0;
  const double origin = largest == -std::numeric_limits<double>::infinity() ? 0.0 : largest;

  const double inverse = 1.0 / row.temperature, shift = of.max - origin;
  // From its own largest logit, which may be far below the row's.
  double rest_top = of.max, rest_sum = of.sum;
  if (row.target >= 0 && !row.target_is_id && at_target > rest_top) {
    rest_sum = 1.0 + (of.sum == 0.0 ? 0.0 : of.sum * std::exp((rest_top - at_target) * inverse));
    rest_top = at_target;
  } else if (row.target >= 0 && !row.target_is_id && !(at_target == -kInfinity<double>)) {
    rest_sum += std::exp((at_target - rest_top) * inverse);
  }
  LogSum others, all;  // at temperature 1, and with the classes apart
  all.add((rest_top - origin) * inverse, rest_sum);
  double moment = of.sum == 0.0 ? 0.0 : (of.moment + shift * of.sum) * std::exp(shift * inverse);
  const auto add_moment = [&](double x) KDK_LAMBDA {
    const double e = std::exp(x * inverse);
    if (e != 0.0) moment += x * e;
  };
  if (row.target >= 0) others.add(shift, of.hard);
  if (row.target >= 0 && !row.target_is_id && problem.entropy) add_moment(at_target - origin);
  R* const small = row.small();
  for (int64_t k = 0; k < problem.k; ++k) {
    small[k] = -kInfinity<R>;
    if (row.ids[k] == kAbsent) continue;
    const double x = scratch.logits[k] - origin;
    small[k] = R(x / row.temperature);
    if (row.target >= 0 && row.ids[k] != row.target) others.add(x);
    if (!problem.entropy) continue;
    all.add(x * inverse);
    add_moment(x);
  }
  const double none = -std::numeric_limits<double>::infinity();
  const double rest_log = rest_sum == 0.0 ? none : std::log(rest_sum);
  const bool some = problem.rest && rest_log != none;
  small[problem.k] = some ? R((rest_top - origin) * inverse + rest_log) : -kInfinity<R>;
  row.number(kRestTop) = some ? R(rest_top) : R(0);
  row.number(kRestSum) = some ? R(rest_log) : R(0);
  row.number(kOrigin) = R(origin);
  row.number(kOthers) = row.target < 0 ? R(0) : R(others.log());
  row.number(kHard) =
      row.target < 0 ? R(0) : R(-rules::two_point(others.log() - (at_target - origin)).log_t);
  const double total = all.log();
  row.number(kEntropy) = problem.entropy ? R(total - moment * inverse / std::exp(total)) : R(0);
}

}  // namespace kdkernels::KDK_ISA
