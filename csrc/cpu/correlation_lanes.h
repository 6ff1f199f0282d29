// The correlation family on rows whose classes are far apart and whose neighbours are near (NCHW): lanes
// are rows, so that nothing is transposed. A tile is some vectors of rows, the classes of each vector one
// after the other.
#pragma once

#include "correlation_columns.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {

KDK_FN bool rows_are_lanes(const CorrelationProblem& problem) {
  return across(problem.student) && across(problem.teacher) &&
         (!problem.gradient.data || across(problem.gradient)) && problem.classes <= kLaneClasses;
}

// Rows of both tensors. Vectors of which no row counts are not read.
template <class R>
struct LaneTile {
  static constexpr int kW = kLanes<R>;

  const CorrelationProblem& problem;
  int64_t apart;  // elements from a vector of rows to the next
  R *student, *teacher;
  int64_t row = 0, count = 0;
  int64_t counted = 0, first = 0;  // rows that count, and the first of them
  int groups = 0;                  // vectors
  int counts[kSpan / kW];          // rows of each that count
  typename Simd<R>::I masks[kSpan / kW];

  KDK_FN explicit LaneTile(const CorrelationContext<R>& c)
      : problem(c.problem), apart((c.problem.classes + 2) * kW) {
    const int64_t size = apart * ((c.tile + kW - 1) / kW);
    student = static_cast<R*>(cpu::scratch(sizeof(R) * 2 * size));
    teacher = student + size;
  }

  void read(int64_t begin, int64_t end) {
    row = begin;
    count = end - begin;
    groups = int((count + kW - 1) / kW);
    counted = 0;
    for (int g = 0; g < groups; ++g) {
      masks[g] = typename Simd<R>::I{};
      counts[g] = 0;
      for (int64_t i = g * kW; i < (g + 1) * kW && i < count; ++i) {
        if (!problem.counts(row + i)) continue;
        if (!counted) first = i;
        masks[g][i - g * kW] = -1;
        ++counts[g];
        ++counted;
      }
    }
    if (!counted) return;
    read_vectors(problem.student, row, count, problem.classes, student, apart, counts);
    read_vectors(problem.teacher, row, count, problem.classes, teacher, apart, counts);
  }

  // The gradient, which lies where the student was; zeros of the rows that do not count.
  void write() {
    const int64_t size = problem.classes * kW;
    for (int g = 0; g < groups; ++g) {
      R* const to = student + g * apart;
      if (!counts[g]) std::memset(to, 0, sizeof(R) * size);
      else if (counts[g] < kW)
        for (int64_t i = 0; i < size; i += kW)
          store<R>(to + i, rules::select(masks[g], load<R>(to + i), Vec<R>{}));
    }
    write_vectors(problem.gradient, row, count, problem.classes, student, apart);
  }
};

// The sum of each vector: one in each lane.
template <class R>
KDK_FN Vec<R> sum_each(Vec<R> (&x)[kLanes<R>]) {
  transpose_square<R, kLanes<R>>(x);
#pragma GCC unroll 8
  for (int half = kLanes<R> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// Column moments of a tile, merged into the chunk's moments of `before` rows; as of merge_tile.
template <class R>
void merge_lanes(const LaneTile<R>& tile, int64_t before, R* moments, int64_t stride) {
  using V = Vec<R>;
  constexpr int kW = kLanes<R>;
  const int64_t classes = tile.problem.classes, apart = tile.apart;
  const int64_t origin = tile.first / kW * apart + tile.first % kW;
  const R inverse = R(1.0 / double(tile.counted));
  for (int64_t i = 0; i < classes; i += kW) {
    const int some = int(classes - i < kW ? classes - i : kW);
    V sums[kMoments][kW] = {}, m[kMoments], first_q{}, first_p{};
    // Calls f(j, a, b) with what is left of class i + j of all rows that count, zeros of others.
    const auto each = [&](const V& from_q, const V& from_p, auto&& f) KDK_LAMBDA {
      for (int j = 0; j < some; ++j) {
        const R *const q = tile.student + (i + j) * kW, *const p = tile.teacher + (i + j) * kW;
        const V less_q = splat<R>(from_q[j]), less_p = splat<R>(from_p[j]);
        for (int g = 0; g < tile.groups; ++g)
          f(j, rules::select(tile.masks[g], V(load<R>(q + g * apart) - less_q), V{}),
            rules::select(tile.masks[g], V(load<R>(p + g * apart) - less_p), V{}));
      }
    };
    for (int j = 0; j < some; ++j) {
      first_q[j] = tile.student[origin + (i + j) * kW];
      first_p[j] = tile.teacher[origin + (i + j) * kW];
    }
    each(first_q, first_p, [&](int j, const V& a, const V& b) KDK_LAMBDA {
      sums[kMeanQ][j] += a;
      sums[kMeanP][j] += b;
    });
    m[kMeanQ] = first_q + sum_each<R>(sums[kMeanQ]) * inverse;
    m[kMeanP] = first_p + sum_each<R>(sums[kMeanP]) * inverse;
    each(m[kMeanQ], m[kMeanP], [&](int j, const V& a, const V& b) KDK_LAMBDA {
      sums[kQQ][j] += a * a;
      sums[kPP][j] += b * b;
      sums[kQP][j] += a * b;
    });
    for (int k : {kQQ, kPP, kQP}) m[k] = sum_each<R>(sums[k]);
    join<R>(m, tile.counted, before, moments, stride, i);
  }
}

template <class Rule, class R>
void relate_lanes(const CorrelationContext<R>& c, int64_t chunk) {
  constexpr int kW = kLanes<R>;
  const CorrelationProblem& problem = c.problem;
  const ByRow<R> mode{problem.classes};
  const int64_t end = c.end_of(chunk);
  LaneTile<R> tile(c);
  R* const moments = c.moments + chunk * kMoments * c.stride;
  int64_t before = 0;
  for (int64_t row = chunk * c.chunk_rows; row < end; row += c.tile) {
    tile.read(row, end - row < c.tile ? end : row + c.tile);
    for (int g = 0; g < tile.groups; ++g) {
      Vec<R> value{};
      if (tile.counts[g]) {
        R *const q = tile.student + g * tile.apart, *const p = tile.teacher + g * tile.apart;
        RowTerms<Vec<R>>& terms = c.template terms<Vec<R>>(row / kW + g);
        value = rules::select(tile.masks[g], relate_row<Rule>(mode, problem, q, p, q, p, terms), value);
      }
      R* const loss = static_cast<R*>(problem.loss) + row + g * kW;
      for (int lane = 0; lane < kW && row + g * kW + lane < end; ++lane) loss[lane] = value[lane];
    }
    if (tile.counted) merge_lanes(tile, before, moments, c.stride);
    before += tile.counted;
  }
  c.counts[chunk] = before;
}

template <class Rule, class R>
void differentiate_lanes(const CorrelationContext<R>& c, int64_t begin, int64_t end) {
  const ByRow<R> mode{c.problem.classes};
  LaneTile<R> tile(c);
  for (int64_t row = begin; row < end; row += c.tile) {
    tile.read(row, end - row < c.tile ? end : row + c.tile);
    for (int g = 0; g < tile.groups; ++g) {
      if (!tile.counts[g]) continue;
      R *const s = tile.student + g * tile.apart, *const t = tile.teacher + g * tile.apart;
      differentiate_row<Rule, false>(mode, c, c.template terms<Vec<R>>(row / kLanes<R> + g), s, t, s, t,
                                     s, 0);
    }
    tile.write();
  }
}

}  // namespace kdkernels::KDK_ISA
