// Rows of logits against K ids each (kdkernels/reference/topk.py), forward (topk_sums.h) and backward.
//
// The backward pass sweeps once over the row as if nothing stood apart and patches the classes that do.
// Every block is read before it is written, and the classes apart before the first block. Where it follows
// the forward pass at once (topk_loss.h) and one exponential a class is enough, it finds them kept.
#pragma once

#include "topk_sums.h"

namespace kdkernels::KDK_ISA {

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
