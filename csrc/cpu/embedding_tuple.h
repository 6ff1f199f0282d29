// Tuples of a batch from its two matrices of distances (REFILLED, stage 1), an anchor at a time.
//
// An anchor's tuples differ only in the positive: the exponentials of all its distances are computed
// once, and each positive takes masked sums of them. What an anchor contributes to the gradient lies
// in its own row, so nothing is shared between threads.
#pragma once

#include "convert.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {


template <class R>
struct Anchor {  // one row, padded to whole vectors
  int64_t steps;
  R *student, *teacher, *exp_s, *exp_t, *gap, *gradient;
  typename Simd<R>::Int* other;  // -1 where the class is another than the anchor's

  static constexpr int kArrays = 7;
  Anchor(int64_t batch) : steps((batch + kLanes<R> - 1) / kLanes<R>) {
    const int64_t stride = (steps * kLanes<R> + 63) / 64 * 64;
    R* base = static_cast<R*>(cpu::scratch(sizeof(R) * kArrays * stride));
    R** const arrays[] = {&student, &teacher, &exp_s, &exp_t, &gap, &gradient};
    for (R** array : arrays) {
      *array = base;
      base += stride;
    }
    other = reinterpret_cast<typename Simd<R>::Int*>(base);
  }

  // Lanes that are semi-hard negatives of a positive at this distance.
  KDK_FN typename Simd<R>::I semihard(int64_t step, const Vec<R>& positive,
                                      const Vec<R>& margin) const {
    typename Simd<R>::I mask;
    __builtin_memcpy(&mask, other + step * kLanes<R>, sizeof mask);
    const Vec<R> d = load<R>(student + step * kLanes<R>) - positive;
    return mask & (d > Vec<R>{}) & (d <= margin);
  }
};

// The exponentials of an anchor's distances less the origins (at least the smallest of those used).
template <class R>
KDK_FN void exponentials(const Anchor<R>& anchor, R inverse, R origin_s, R origin_t) {
  const Exponential<R> exponential(splat<R>(inverse));
  const Vec<R> from_s = splat<R>(origin_s), from_t = splat<R>(origin_t);
  for (int64_t step = 0; step < anchor.steps; ++step) {
    const int64_t at = step * kLanes<R>;
    const Vec<R> s = load<R>(anchor.student + at), t = load<R>(anchor.teacher + at);
    const Vec<R> x = from_s - s, y = from_t - t;
    // A distance below the origin belongs to no tuple; its exponential could overflow.
    store<R>(anchor.exp_s + at, exponential(rules::select(x > Vec<R>{}, Vec<R>{}, x)));
    store<R>(anchor.exp_t + at, exponential(rules::select(y > Vec<R>{}, Vec<R>{}, y)));
    store<R>(anchor.gap + at, Vec<R>((y - x) * inverse));
  }
}

// The smallest of the teacher's distances in a tuple.
template <class R>
inline R nearest(const Anchor<R>& anchor, int64_t positive, const Vec<R>& at, const Vec<R>& margin) {
  R least = anchor.teacher[positive];
  for (int64_t step = 0; step < anchor.steps; ++step) {
    const typename Simd<R>::I mask = anchor.semihard(step, at, margin);
    for (int lane = 0; lane < kLanes<R>; ++lane) {
      const R t = anchor.teacher[step * kLanes<R> + lane];
      if (mask[lane] && t < least) least = t;
    }
  }
  return least;
}

template <class R>
KDK_FN bool any(const typename Simd<R>::I& mask) {
  typename Simd<R>::Int found = 0;
  for (int lane = 0; lane < kLanes<R>; ++lane) found |= mask[lane];
  return found != 0;
}

template <class Rule, class R>
void run_anchor(const TupleProblem& problem, int64_t row, const Anchor<R>& anchor) {
  using V = Vec<R>;
  using I = typename Simd<R>::I;
  const int64_t batch = problem.batch;
  const R inverse = R(1.0 / problem.temperature);
  const V margin = splat<R>(R(problem.margin));
  const R* const s = static_cast<const R*>(problem.student) + row * batch;
  const R* const t = static_cast<const R*>(problem.teacher) + row * batch;
  R largest = R(0);
  bool has_positive = false;
  for (int64_t i = 0; i < anchor.steps * kLanes<R>; ++i) {
    const bool inside = i < batch;
    anchor.student[i] = inside ? s[i] : R(0);
    anchor.teacher[i] = inside ? t[i] : R(0);
    anchor.gradient[i] = R(0);
    anchor.other[i] = inside && problem.target[i] != problem.target[row] ? -1 : 0;
    has_positive |= inside && i != row && !anchor.other[i];
    largest = maximum(maximum(largest, anchor.student[i]), anchor.teacher[i]);
  }
  double value = 0.0;
  int64_t tuples = 0;
  // Where exponentials relative to distance 0 could underflow, each tuple has its own origins.
  const bool own = largest * inverse > R(std::is_same_v<R, float> ? 60 : 600);
  if (has_positive && !own) exponentials(anchor, inverse, R(0), R(0));
  for (int64_t p = 0; has_positive && p < batch; ++p) {
    if (p == row || anchor.other[p]) continue;
    const V positive = splat<R>(anchor.student[p]);
    if (own) exponentials(anchor, inverse, anchor.student[p], nearest(anchor, p, positive, margin));
    V e{}, f{};
    I found{};
    for (int64_t step = 0; step < anchor.steps; ++step) {
      const I mask = anchor.semihard(step, positive, margin);
      found |= mask;
      e += rules::select(mask, load<R>(anchor.exp_s + step * kLanes<R>), V{});
      f += rules::select(mask, load<R>(anchor.exp_t + step * kLanes<R>), V{});
    }
    if (!any<R>(found)) continue;
    ++tuples;
    const R sum_s = reduce_sum<R>(e) + anchor.exp_s[p], sum_t = reduce_sum<R>(f) + anchor.exp_t[p];
    const R scale_s = R(1) / sum_s, scale_t = R(1) / sum_t, shift = std::log(sum_t * scale_s);
    V total{};
    for (int64_t step = 0; step < anchor.steps; ++step) {
      const int64_t at = step * kLanes<R>;
      const I mask = anchor.semihard(step, positive, margin);
      V term, slope;
      Rule::member(V(load<R>(anchor.exp_t + at) * scale_t), V(load<R>(anchor.exp_s + at) * scale_s),
                   V(load<R>(anchor.gap + at) - shift), term, slope);
      total += rules::select(mask, term, V{});
      store<R>(anchor.gradient + at,
               V(load<R>(anchor.gradient + at) + rules::select(mask, slope, V{})));
    }
    R term, slope;
    Rule::member(R(anchor.exp_t[p] * scale_t), R(anchor.exp_s[p] * scale_s),
                 R(anchor.gap[p] - shift), term, slope);
    value += double(reduce_sum<R>(total) + term);
    anchor.gradient[p] += slope;
  }
  problem.loss[row] = value;
  problem.tuples[row] = tuples;
  if (!problem.gradient) return;
  R* const out = static_cast<R*>(problem.gradient) + row * batch;
  for (int64_t i = 0; i < batch; ++i) out[i] = -inverse * anchor.gradient[i];
}

template <class Rule, class R>
void run_tuples(const TupleProblem& problem, cpu::ParallelFor parallel_for) {
  const int64_t grain = 16384 / (problem.batch * 4) + 1;
  parallel_for(
      problem.batch, grain,
      [](void* opaque, int64_t begin, int64_t end) {
        const TupleProblem& p = *static_cast<const TupleProblem*>(opaque);
        const Anchor<R> anchor(p.batch);
        for (int64_t row = begin; row < end; ++row) run_anchor<Rule, R>(p, row, anchor);
      },
      const_cast<TupleProblem*>(&problem));
}

}  // namespace kdkernels::KDK_ISA
