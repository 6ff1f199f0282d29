// Rows of logits against K ids each (kdkernels/reference/topk.py).
//
// The forward pass goes over a row in blocks that stay in the first cache. A block is converted to the
// working type, the classes that stand apart (the ids, and the target of a cross-entropy) become -inf,
// and the maximum and the sum of exponentials of the others extend those of the row. The classes apart
// join in double afterwards, so that no sum is a difference of two.
//
// The backward pass sweeps once over the row as if nothing stood apart and patches those classes.
// Every block is read before it is written, and the classes apart before the first block. Where it follows
// the forward pass at once (topk_loss.h) and one exponential a class is enough, it finds them kept.
#pragma once

#include "convert.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {

constexpr int64_t kTopKBlock = 1024;

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

// A thread's scratch.
template <class R>
struct TopKScratch {
  R* block;       // a block, padded to whole vectors
  double* logits;  // those of the ids
  int64_t* apart;  // the classes that stand apart, by block
  int64_t* heads;  // where each block's begin in `apart`

  KDK_FN explicit TopKScratch(const TopKProblem& problem) {
    const int64_t blocks = problem.classes / kTopKBlock + 1, count = problem.k + 1;
    const int64_t bytes = sizeof(R) * (kTopKBlock + 64) + 8 * (2 * count + blocks + 2);
    block = static_cast<R*>(cpu::scratch(bytes));
    logits = reinterpret_cast<double*>(block + kTopKBlock + 64);
    apart = reinterpret_cast<int64_t*>(logits + count);
    heads = apart + count;
  }
};

// What a row is besides its logits.
template <class R>
struct TopKRow {
  const TopKProblem& problem;
  int64_t row, target;  // -1: no cross-entropy
  const int64_t* ids;
  double temperature;
  bool target_is_id = false;

  KDK_FN TopKRow(const TopKProblem& problem, int64_t row)
      : problem(problem),
        row(row),
        target(problem.hard ? problem.target[row] : -1),
        ids(problem.ids + row * problem.k),
        temperature(problem.row_temperature
                        ? double(static_cast<const R*>(problem.row_temperature)[row])
                        : problem.temperature) {
    for (int64_t k = 0; k < problem.k; ++k) target_is_id |= target >= 0 && ids[k] == target;
  }
  KDK_FN bool ignored() const {
    return problem.target && problem.target[row] == problem.ignore_index;
  }
  KDK_FN R* small() const { return static_cast<R*>(problem.small) + row * (problem.k + 1); }
  KDK_FN R& number(TopKNumber which) const {
    return static_cast<R*>(problem.numbers)[which * problem.rows + row];
  }
};

// Sorts the classes that stand apart by their blocks; false where an id is out of range or there twice.
template <class R>
inline bool set_apart(const TopKRow<R>& row, const TopKScratch<R>& scratch) {
  const TopKProblem& problem = row.problem;
  const int64_t blocks = problem.classes / kTopKBlock + 1;
  int64_t* const heads = scratch.heads;
  std::memset(heads, 0, sizeof(int64_t) * (blocks + 2));
  bool inside = true;
  const auto each = [&](auto&& f) KDK_LAMBDA {
    for (int64_t k = 0; k < problem.k; ++k)
      if (row.ids[k] != kAbsent) f(row.ids[k]);
    if (row.target >= 0 && !row.target_is_id) f(row.target);
  };
  each([&](int64_t id) KDK_LAMBDA {
    if (id < 0 || id >= problem.classes) inside = false;
    else ++heads[id / kTopKBlock + 2];
  });
  if (!inside) return false;
  for (int64_t b = 2; b < blocks + 2; ++b) heads[b] += heads[b - 1];
  each([&](int64_t id) KDK_LAMBDA { scratch.apart[heads[id / kTopKBlock + 1]++] = id; });
  for (int64_t b = 0; b < blocks; ++b) {
    if (heads[b + 1] - heads[b] < 2) continue;
    uint64_t seen[kTopKBlock / 64] = {};
    for (int64_t i = heads[b]; i < heads[b + 1]; ++i) {
      const int64_t at = scratch.apart[i] % kTopKBlock;
      const uint64_t bit = uint64_t(1) << (at % 64);
      if (seen[at / 64] & bit) return false;
      seen[at / 64] |= bit;
    }
  }
  return true;
}

// A vector of logits, and of the gradient.
template <class R, class T>
KDK_FN Vec<R> take(const T* from) {
  if constexpr (std::is_same_v<T, R>) return load<R>(from);
  if constexpr (kHalf<T> && std::is_same_v<R, float>) return widen_vector(from);
  Vec<R> v{};
  for (int lane = 0; lane < kLanes<R>; ++lane) v[lane] = R(widen(from[lane]));
  return v;
}
template <class R, class T>
KDK_FN void give(T* to, const Vec<R>& v) {
  if constexpr (std::is_same_v<T, R>) store<R>(to, v);
  else if constexpr (kHalf<T> && std::is_same_v<R, float>) narrow_vector(to, v);
  else
    for (int lane = 0; lane < kLanes<R>; ++lane) to[lane] = narrow<T>(v[lane]);
}

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

// a exp((z - top) / T - sum) of the rest, and b exp(z - origin - others), of all classes. Of the ids and of
// the target, which are written over, the exponents may be above 0, and what comes of them is anything.
// Logits `ahead` are fetched meanwhile.
template <class R, bool kHardTerm, class T>
inline void sweep_row(const TopKRow<R>& row, R* x, const T* z, T* to, double a, double b,
                      const T* ahead) {
  using V = Vec<R>;
  constexpr int kW = kLanes<R>;
  const Exponential<R> softened(splat<R>(R(1.0 / row.temperature))), bare(splat<R>(R(1)));
  const V origin = splat<R>(row.number(kOrigin)), others = splat<R>(row.number(kOthers));
  const V top = splat<R>(row.number(kRestTop));
  const V rest = splat<R>(R(double(row.number(kRestSum)) * row.temperature));
  const V of_rest = splat<R>(R(a)), of_hard = splat<R>(R(b));
  const auto gradient = [&](const V& logits) KDK_LAMBDA {
    V out = softened(logits - top - rest) * of_rest;
    if constexpr (kHardTerm) out += bare(logits - origin - others) * of_hard;
    return out;
  };
  const int64_t classes = row.problem.classes, whole = classes / kW * kW;
  if (ahead) {
    for (int64_t i = 0; i < whole; i += kW) {
      __builtin_prefetch(ahead + i, 0, 2);
      give<R>(to + i, gradient(take<R>(z + i)));
    }
  } else {
    for (int64_t i = 0; i < whole; i += kW) give<R>(to + i, gradient(take<R>(z + i)));
  }
  if (whole == classes) return;
  read_run(z + whole, 1, classes - whole, x, 1);
  store<R>(x, gradient(load<R>(x)));
  write_run(to + whole, 1, classes - whole, x, 1);
}

// a exp((z - top) / T - sum) of all classes, from the exponentials that the forward pass kept.
template <class R, class T>
inline void scale_kept(const TopKRow<R>& row, const Kept<R>& kept, T* to, double a, const T* ahead) {
  using V = Vec<R>;
  constexpr int kW = kLanes<R>;
  const double top = double(row.number(kRestTop)), sum = double(row.number(kRestSum));
  for (int64_t begin = 0, b = 0; begin < row.problem.classes; begin += kTopKBlock, ++b) {
    const int64_t rest = row.problem.classes - begin;
    const int64_t count = rest < kTopKBlock ? rest : kTopKBlock, whole = count / kW * kW;
    const V factor = splat<R>(R(a * std::exp((kept.origins[b] - top) / row.temperature - sum)));
    R* const from = kept.values + begin;
    for (int64_t i = 0; i < whole; i += kW) {
      if (ahead) __builtin_prefetch(ahead + begin + i, 0, 2);
      give<R>(to + begin + i, V(load<R>(from + i) * factor));
    }
    if (whole == count) continue;
    store<R>(from + whole, V(load<R>(from + whole) * factor));
    write_run(to + begin + whole, 1, count - whole, from + whole, 1);
  }
}

template <class R, class T>
inline void backward_row(const TopKRow<R>& row, const TopKScratch<R>& scratch, const T* z, T* to,
                         const T* ahead = nullptr, const Kept<R>* kept = nullptr) {
  const TopKProblem& problem = row.problem;
  const double inverse = 1.0 / row.temperature, origin = double(row.number(kOrigin));
  const double others = double(row.number(kOthers)), rest = double(row.small()[problem.k]);
  const double none = -std::numeric_limits<double>::infinity();
  const R* const g = static_cast<const R*>(problem.small_upstream) + row.row * (problem.k + 1);
  double a = rest == none ? 0.0 : double(g[problem.k]) * inverse, b = 0.0, at_target = 0.0;
  if (row.target >= 0) {
    const double x = double(widen(z[row.target]));
    // The others' share is 1 - exp(-hard).
    b = double(static_cast<const R*>(problem.hard_upstream)[row.row]) *
        -std::expm1(-double(row.number(kHard)));
    const double of_rest = (x - double(row.number(kRestTop))) * inverse - double(row.number(kRestSum));
    at_target = (a == 0.0 ? 0.0 : a * std::exp(of_rest)) - b;
  }
  for (int64_t k = 0; k < problem.k; ++k) {
    const int64_t id = row.ids[k];
    if (id == kAbsent) continue;
    double value = double(g[k]) * inverse;
    if (id == row.target) value -= b;
    else if (b != 0.0) value += b * std::exp(double(widen(z[id])) - origin - others);
    scratch.logits[k] = value;
  }
  if (row.temperature == 1.0 && a != 0.0 && b != 0.0 && std::fabs(rest - others) < 40.0) {
    a += b * std::exp(rest - others);  // one exponential serves both
    b = 0.0;
  }
  if (b != 0.0) sweep_row<R, true>(row, scratch.block, z, to, a, others == none ? 0.0 : b, ahead);
  else if (a != 0.0 && kept && kept->filled) scale_kept(row, *kept, to, a, ahead);
  else if (a != 0.0) sweep_row<R, false>(row, scratch.block, z, to, a, b, ahead);
  else std::memset(to, 0, sizeof(T) * problem.classes);
  for (int64_t k = 0; k < problem.k; ++k)
    if (row.ids[k] != kAbsent) to[row.ids[k]] = narrow<T>(R(scratch.logits[k]));
  if (row.target >= 0 && !row.target_is_id) to[row.target] = narrow<T>(R(at_target));
}

KDK_FN void report(int64_t* bad, int64_t row) {
  int64_t first = __atomic_load_n(bad, __ATOMIC_RELAXED);
  while ((first == 0 || row + 1 < first) &&
         !__atomic_compare_exchange_n(bad, &first, row + 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <class R>
void run_topk_rows(const TopKProblem& problem, int64_t begin, int64_t end) {
  const TopKScratch<R> scratch(problem);
  const bool backward = problem.gradient.data != nullptr;
  with_type(problem.student, [&](auto* student) KDK_LAMBDA {
    using T = std::decay_t<decltype(*student)>;
    T* const gradient = static_cast<T*>(problem.gradient.data);
    for (int64_t i = begin; i < end; ++i) {
      const TopKRow<R> row(problem, i);
      const T* const z = student + problem.student.offset(i);
      if (backward) {
        T* const to = gradient + problem.gradient.offset(i);
        if (row.ignored()) std::memset(to, 0, sizeof(T) * problem.classes);
        else backward_row<R>(row, scratch, z, to);
      } else if (row.ignored()) {
        std::memset(row.small(), 0, sizeof(R) * (problem.k + 1));
        for (const auto which : {kOrigin, kOthers, kHard, kEntropy, kRestTop, kRestSum}) row.number(which) = R(0);
      } else if (set_apart(row, scratch)) {
        forward_row<R>(row, scratch, z);
      } else {
        report(problem.bad, i);
      }
    }
  });
}

template <class R>
void run_topk(const TopKProblem& problem, cpu::ParallelFor parallel_for) {
  parallel_for(
      problem.rows, 16384 / problem.classes + 1,
      [](void* opaque, int64_t begin, int64_t end) {
        run_topk_rows<R>(*static_cast<const TopKProblem*>(opaque), begin, end);
      },
      const_cast<TopKProblem*>(&problem));
}

}  // namespace kdkernels::KDK_ISA
