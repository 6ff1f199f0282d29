// The correlation family: Pearson relations of the rows and of the columns of two softmaxes, or of the
// sigmoids of all logits.
//
// Three phases. (1) Rows, in chunks fixed by the shape: normalisers (of a softmax), row moments centred
// at the rows' means (1/C of a softmax), and the centred moments of each column over a tile of rows, merged into the chunk's by Chan's formula
// (raw moments would cancel in columns that hardly vary). (2) Columns: chunks merged in order,
// relation and coefficients. (3) Rows again: gradient. Nothing of size N x C is kept but the
// gradient, which holds the student's probabilities in between; the result does not depend on the number
// of threads. Rows that do not count are left out: their gradients are zeros.
#pragma once

#include "probabilities.h"
#include "scratch.h"
#include "tiles.h"

namespace kdkernels::KDK_ISA {


constexpr int64_t kChunkRows = 64, kMostChunks = 32;
constexpr int kTile = 16, kMostTile = int(kSpan);

// Centred moments of a column over some rows: mean of q and p, sums of squares and of products.
enum Moment { kMeanQ, kMeanP, kQQ, kPP, kQP, kMoments };

template <class R>
struct CorrelationContext {
  const CorrelationProblem& problem;
  int64_t chunks, chunk_rows, stride;  // stride: padded classes
  int tile;                            // rows taken together
  RowTerms<R>* rows;
  R* moments;  // [chunks][kMoments][stride]
  R* columns;  // [4][stride]: of_p, of_q, mean p, mean q
  int64_t* counts;  // [chunks]: rows that count

  // Whether the student's probabilities stay in the gradient between the first and the last phase.
  KDK_FN bool keeps_probabilities() const {
    return problem.gradient.data && direct<R>(problem.gradient);
  }
};

// Probabilities of one row into q and p, and its relation. p is padded with zeros to whole vectors; q
// may be the row's gradient, which keeps it for the last phase.
template <class Rule, class R>
inline R relate_row(const CorrelationProblem& problem, const R* s, const R* t, R* q, R* p,
                    RowTerms<R>& terms) {
  using V = Vec<R>;
  const ByClass<R> mode{problem.classes};
  V scale_s{}, scale_t{};
  if constexpr (Rule::sigmoid) {
    sigmoids_of_row<R>(problem, s, t, q, p, terms);
  } else {
    exponentials_of_row<R>(problem, s, t, q, p, terms);
    scale_s = splat<R>(terms.inverse_s);
    scale_t = splat<R>(terms.inverse_t);
  }
  const V mean_q = splat<R>(terms.mean_q), mean_p = splat<R>(terms.mean_p);
  Blocked<V> aa, bb, ab;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        V x = mode.template get<kPart>(q, i, R(0));
        V y = load<R>(p + i * kLanes<R>);
        if constexpr (!Rule::sigmoid) {
          x = rounded(V(x * scale_s));
          y = rounded(V(y * scale_t));
          mode.template put<kPart>(q, i, x);
          store<R>(p + i * kLanes<R>, y);
        }
        V a = x - mean_q, b = y - mean_p;
        if constexpr (kPart) {
          a = mask_rest(mode, a);
          b = mask_rest(mode, b);
        }
        aa.add(a * a);
        bb.add(b * b);
        ab.add(a * b);
      },
      [&]() KDK_LAMBDA {
        aa.flush();
        bb.flush();
        ab.flush();
      });
  return Rule::template relation<R>(reduce_sum<R>(aa.total), reduce_sum<R>(bb.total),
                                    reduce_sum<R>(ab.total), R(problem.eps), terms.of_p,
                                    terms.of_q);
}

// Merge the moments of `count_b` rows into those of `count_a` rows (Chan, Golub, LeVeque).
template <class V>
KDK_FN void merge(V (&a)[kMoments], const V (&b)[kMoments], double count_a, double count_b) {
  using R = rules::scalar_t<V>;
  const R share = R(count_b / (count_a + count_b));
  const R weight = R(count_a * count_b / (count_a + count_b));
  const V dq = b[kMeanQ] - a[kMeanQ], dp = b[kMeanP] - a[kMeanP];
  a[kMeanQ] += dq * share;
  a[kMeanP] += dp * share;
  a[kQQ] += b[kQQ] + dq * dq * weight;
  a[kPP] += b[kPP] + dp * dp * weight;
  a[kQP] += b[kQP] + dq * dp * weight;
}

template <class R>
KDK_FN void load_moments(const R* from, int64_t stride, int64_t i, Vec<R> (&m)[kMoments]) {
  for (int k = 0; k < kMoments; ++k) m[k] = load<R>(from + k * stride + i);
}
template <class R>
KDK_FN void store_moments(R* to, int64_t stride, int64_t i, const Vec<R> (&m)[kMoments]) {
  for (int k = 0; k < kMoments; ++k) store<R>(to + k * stride + i, m[k]);
}

// Column moments of a tile of `count` rows, merged into the chunk's moments of `before` rows. Sums are of
// differences to the first row, so that the mean of a constant column is that constant, and its moments
// exactly 0.
template <class R>
void merge_tile(const R* const* q, const R* p, int64_t stride, int64_t classes, int64_t count,
                int64_t before, R* moments) {
  using V = Vec<R>;
  const ByClass<R> mode{classes};
  const R inverse = R(1.0 / double(count));
  sweep(
      mode,
      [&](int64_t step, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const int64_t i = step * kLanes<R>;
        V m[kMoments] = {};
        const V first_q = mode.template get<kPart>(q[0], step, R(0)), first_p = load<R>(p + i);
        for (int64_t r = 1; r < count; ++r) {
          m[kMeanQ] += mode.template get<kPart>(q[r], step, R(0)) - first_q;
          m[kMeanP] += load<R>(p + r * stride + i) - first_p;
        }
        m[kMeanQ] = first_q + m[kMeanQ] * inverse;
        m[kMeanP] = first_p + m[kMeanP] * inverse;
        for (int64_t r = 0; r < count; ++r) {
          const V a = mode.template get<kPart>(q[r], step, R(0)) - m[kMeanQ];
          const V b = load<R>(p + r * stride + i) - m[kMeanP];
          m[kQQ] += a * a;
          m[kPP] += b * b;
          m[kQP] += a * b;
        }
        if (before) {
          V total[kMoments];
          load_moments<R>(moments, stride, i, total);
          merge(total, m, double(before), double(count));
          store_moments<R>(moments, stride, i, total);
        } else {
          store_moments<R>(moments, stride, i, m);
        }
      },
      [&]() KDK_LAMBDA {});
}

template <class R>
struct Tiles {  // scratch of a thread: two tiles, and lanes for gathering
  R *first, *second, *lanes;
  KDK_FN Tiles(const CorrelationContext<R>& c) {
    const int64_t size = c.tile * c.stride, gathered = kTransposed * kSpan;
    first = static_cast<R*>(cpu::scratch(sizeof(R) * (2 * size + gathered)));
    second = first + size;
    lanes = second + size;
  }
};

template <class Rule, class R>
void relate_rows(const CorrelationContext<R>& c, int64_t chunk) {
  const CorrelationProblem& problem = c.problem;
  const int64_t begin = chunk * c.chunk_rows;
  const int64_t end = begin + c.chunk_rows < problem.rows ? begin + c.chunk_rows : problem.rows;
  const Tiles<R> tiles(c);
  const bool direct_s = direct<R>(problem.student), direct_t = direct<R>(problem.teacher);
  const bool kept = c.keeps_probabilities();
  R* const loss = static_cast<R*>(problem.loss);
  R* const moments = c.moments + chunk * kMoments * c.stride;
  const R* students[kMostTile];
  int64_t before = 0;
  for (int64_t row = begin; row < end; row += c.tile) {
    const int64_t count = end - row < c.tile ? end - row : c.tile;
    // The probabilities, side by side, overwrite the logits where those had to be gathered into the tile.
    if (!direct_s) read_tile(problem, problem.student, row, count, tiles.first, c.stride, tiles.lanes);
    if (!direct_t) read_tile(problem, problem.teacher, row, count, tiles.second, c.stride, tiles.lanes);
    int64_t counted = 0;
    for (int64_t r = 0; r < count; ++r) {
      if (!problem.counts(row + r)) {
        loss[row + r] = R(0);
        continue;
      }
      const R* s = tiles.first + r * c.stride;
      const R* t = tiles.second + r * c.stride;
      R* q = tiles.first + counted * c.stride;
      R* p = tiles.second + counted * c.stride;
      if (direct_s)
        s = static_cast<const R*>(problem.student.data) + problem.student.offset(row + r);
      if (direct_t)
        t = static_cast<const R*>(problem.teacher.data) + problem.teacher.offset(row + r);
      if (kept) q = static_cast<R*>(problem.gradient.data) + problem.gradient.offset(row + r);
      students[counted++] = q;
      RowTerms<R> terms;
      loss[row + r] = relate_row<Rule, R>(problem, s, t, q, p, terms) * R(problem.inter);
      terms.of_p *= R(problem.inter);
      terms.of_q *= R(problem.inter);
      c.rows[row + r] = terms;
    }
    if (!counted) continue;
    merge_tile<R>(students, tiles.second, c.stride, problem.classes, counted, before, moments);
    before += counted;
  }
  c.counts[chunk] = before;
}

template <class Rule, class R>
void relate_columns(const CorrelationContext<R>& c, int64_t begin, int64_t end) {
  const CorrelationProblem& problem = c.problem;
  R* const loss = static_cast<R*>(problem.loss) + problem.rows;
  for (int64_t i = begin; i < end; i += kLanes<R>) {
    Vec<R> total[kMoments] = {};
    int64_t before = 0;
    for (int64_t chunk = 0; chunk < c.chunks; ++chunk) {
      if (!c.counts[chunk]) continue;
      Vec<R> m[kMoments];
      load_moments<R>(c.moments + chunk * kMoments * c.stride, c.stride, i, m);
      merge(total, m, double(before), double(c.counts[chunk]));
      before += c.counts[chunk];
    }
    const int64_t lanes = end - i < kLanes<R> ? end - i : kLanes<R>;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      R of_p, of_q;
      loss[i + lane] = R(problem.intra) *
                       Rule::template relation<R>(total[kQQ][lane], total[kPP][lane],
                                                  total[kQP][lane], R(problem.eps), of_p, of_q);
      c.columns[i + lane] = of_p * R(problem.intra);
      c.columns[c.stride + i + lane] = of_q * R(problem.intra);
      c.columns[2 * c.stride + i + lane] = total[kMeanP][lane];
      c.columns[3 * c.stride + i + lane] = total[kMeanQ][lane];
    }
  }
}

// Gradient of one row. Where kKept, `gradient` holds the student's probabilities; else they are computed
// from the logits s into q. `pull` is scratch and may be where the teacher's logits t are. The row
// `ahead` elements further is fetched meanwhile: these are too many streams for the hardware.
template <class Rule, bool kKept, class R>
KDK_FN void differentiate_row(const CorrelationContext<R>& c, const RowTerms<R>& terms, const R* s,
                              const R* t, R* q, R* pull, R* gradient, int64_t ahead) {
  using V = Vec<R>;
  const CorrelationProblem& problem = c.problem;
  const ByClass<R> mode{problem.classes};
  const R fill = -kInfinity<R>;
  const V origin_s = splat<R>(terms.max_s), origin_t = splat<R>(terms.max_t);
  const V scale_s = splat<R>(terms.inverse_s), scale_t = splat<R>(terms.inverse_t);
  const V row_p = splat<R>(terms.of_p), row_q = splat<R>(terms.of_q);
  const V factor = splat<R>(R(1.0 / problem.tau));
  const Exponential<R> exponential(factor);
  const V mean_q = splat<R>(terms.mean_q), mean_p = splat<R>(terms.mean_p);
  Blocked<V> dot;
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const int64_t at = i * kLanes<R>;
        __builtin_prefetch(t + ahead + at, 0, 2);
        if constexpr (kKept) __builtin_prefetch(gradient + ahead + at, 0, 2);
        V x = mode.template get<kPart>(kKept ? gradient : s, i, kKept ? R(0) : fill);
        V y = mode.template get<kPart>(t, i, fill);
        if constexpr (Rule::sigmoid) {
          if constexpr (!kKept) x = sigmoid<R>(x, exponential);
          y = sigmoid<R>(y, exponential);
        } else {
          if constexpr (!kKept) x = rounded(V(scale_s * exponential(V(x - origin_s))));
          y = rounded(V(scale_t * exponential(V(y - origin_t))));
        }
        V g = row_p * (y - mean_p) + row_q * (x - mean_q);
        g += load<R>(c.columns + at) * (y - load<R>(c.columns + 2 * c.stride + at));
        g += load<R>(c.columns + c.stride + at) * (x - load<R>(c.columns + 3 * c.stride + at));
        if constexpr (Rule::sigmoid) {
          mode.template put<kPart>(gradient, i, V(x * (R(1) - x) * factor * g));
        } else {
          if constexpr (kPart) g = mask_rest(mode, g);
          if constexpr (!kKept) store<R>(q + at, x);
          store<R>(pull + at, g);
          dot.add(x * g);
        }
      },
      [&]() KDK_LAMBDA { dot.flush(); });
  if constexpr (Rule::sigmoid) return;
  const V centre = splat<R>(reduce_sum<R>(dot.total));
  sweep(
      mode,
      [&](int64_t i, auto part) KDK_LAMBDA {
        constexpr bool kPart = decltype(part)::value;
        const int64_t at = i * kLanes<R>;
        V x;
        if constexpr (kKept) x = mode.template get<kPart>(gradient, i, R(0));
        else x = load<R>(q + at);
        mode.template put<kPart>(gradient, i, V(x * factor * (load<R>(pull + at) - centre)));
      },
      [&]() KDK_LAMBDA {});
}

template <class Rule, class R>
void differentiate_rows(const CorrelationContext<R>& c, int64_t begin, int64_t end) {
  const CorrelationProblem& problem = c.problem;
  const Tiles<R> tiles(c);
  const bool kept = c.keeps_probabilities();
  const bool direct_s = kept || direct<R>(problem.student), direct_t = direct<R>(problem.teacher);
  const int64_t last = problem.rows - 1;
  const auto gradient_of = [&](int64_t row) {
    return static_cast<R*>(problem.gradient.data) + problem.gradient.offset(row);
  };
  for (int64_t row = begin; row < end; row += c.tile) {
    const int64_t count = end - row < c.tile ? end - row : c.tile;
    if (!direct_s) read_tile(problem, problem.student, row, count, tiles.first, c.stride, tiles.lanes);
    if (!direct_t) read_tile(problem, problem.teacher, row, count, tiles.second, c.stride, tiles.lanes);
    for (int64_t r = 0; r < count; ++r) {
      R* q = tiles.first + r * c.stride;
      if (!problem.counts(row + r)) {
        if (kept) q = gradient_of(row + r);
        for (int64_t i = 0; i < problem.classes; ++i) q[i] = R(0);
        continue;
      }
      R* pull = direct_t ? tiles.second : tiles.second + r * c.stride;
      const R* t = pull;
      if (direct_t)
        t = static_cast<const R*>(problem.teacher.data) + problem.teacher.offset(row + r);
      if (kept) {
        R* gradient = gradient_of(row + r);
        const int64_t ahead = row + r < last ? problem.classes : 0;
        differentiate_row<Rule, true, R>(c, c.rows[row + r], nullptr, t, nullptr, pull, gradient,
                                         ahead);
        continue;
      }
      const R* s = q;
      if (direct_s)
        s = static_cast<const R*>(problem.student.data) + problem.student.offset(row + r);
      differentiate_row<Rule, false, R>(c, c.rows[row + r], s, t, q, pull, q, 0);
    }
    if (!kept)
      write_tile(problem.gradient, row, count, problem.classes, tiles.first, c.stride, tiles.lanes);
  }
}

template <class Rule, class R>
void run_correlation(const CorrelationProblem& problem, cpu::ParallelFor parallel_for) {
  const int64_t rows = problem.rows, classes = problem.classes;
  const int64_t stride = (classes + 63) / 64 * 64 + 64;
  int64_t chunks = rows / kChunkRows < kMostChunks ? rows / kChunkRows : kMostChunks;
  if (chunks < 2) chunks = rows >= 16 && rows * classes >= 65536 ? 2 : 1;
  const bool far = across(problem.student) || across(problem.teacher);
  const int tile = far && classes <= 1024 ? kMostTile
                   : classes <= 4096      ? kTile
                   : classes <= 65536     ? kTile / 2
                                          : kTile / 4;
  // Whole tiles, so that rows whose classes are far apart are read in vectors to the end.
  int64_t chunk_rows = (rows + chunks - 1) / chunks;
  if (far) chunk_rows = (chunk_rows + tile - 1) / tile * tile;
  chunks = (rows + chunk_rows - 1) / chunk_rows;
  cpu::Buffer buffer(sizeof(RowTerms<R>) * rows + sizeof(R) * stride * (chunks * kMoments + 4));
  int64_t counts[kMostChunks];
  CorrelationContext<R> context{problem, chunks, chunk_rows, stride, tile, nullptr, nullptr, nullptr,
                                counts};
  context.moments = static_cast<R*>(buffer.data);
  context.columns = context.moments + stride * chunks * kMoments;
  context.rows = reinterpret_cast<RowTerms<R>*>(context.columns + 4 * stride);
  parallel_for(
      chunks, 16384 / (chunk_rows * classes) + 1,
      [](void* opaque, int64_t begin, int64_t end) {
        const auto& c = *static_cast<const CorrelationContext<R>*>(opaque);
        for (int64_t chunk = begin; chunk < end; ++chunk) relate_rows<Rule, R>(c, chunk);
      },
      &context);
  parallel_for(
      (classes + kLanes<R> - 1) / kLanes<R>, 16384 / kLanes<R>,
      [](void* opaque, int64_t begin, int64_t end) {
        const auto& c = *static_cast<const CorrelationContext<R>*>(opaque);
        const int64_t last = end * kLanes<R>;
        relate_columns<Rule, R>(c, begin * kLanes<R>,
                                last < c.problem.classes ? last : c.problem.classes);
      },
      &context);
  if (!problem.gradient.data) return;
  const int64_t tiles = (rows + tile - 1) / tile;
  parallel_for(
      tiles, 16384 / (tile * classes) + 1,
      [](void* opaque, int64_t begin, int64_t end) {
        const auto& c = *static_cast<const CorrelationContext<R>*>(opaque);
        const int64_t last = end * c.tile;
        differentiate_rows<Rule, R>(c, begin * c.tile, last < c.problem.rows ? last : c.problem.rows);
      },
      &context);
}

}  // namespace kdkernels::KDK_ISA
