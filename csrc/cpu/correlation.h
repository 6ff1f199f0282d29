// The correlation family: Pearson relations of the rows and of the columns of two softmaxes, or of the
// sigmoids of all logits.
//
// Three phases. (1) Rows, in chunks fixed by the shape: normalisers (of a softmax), row moments centred
// at the rows' means (1/C of a softmax), and the centred moments of each column over a tile of rows, merged
// into the chunk's by Chan's formula (raw moments would cancel in columns that hardly vary). (2) Columns:
// chunks merged in order, relation and coefficients. (3) Rows again: gradient. Nothing of size N x C is kept
// but the gradient, which holds the student's probabilities in between where its classes lie together; the
// result does not depend on the number of threads. Rows that do not count are left out: their gradients are
// zeros. Where neighbours are rows (NCHW), lanes are rows (correlation_lanes.h).
#pragma once

#include "correlation_lanes.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {

constexpr int64_t kChunkRows = 64, kMostChunks = 32;
constexpr int kTile = 16, kMostTile = int(kSpan);

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
  const int64_t begin = chunk * c.chunk_rows, end = c.end_of(chunk);
  const Tiles<R> tiles(c);
  const bool direct_s = direct<R>(problem.student), direct_t = direct<R>(problem.teacher);
  const bool kept = c.keeps_probabilities();
  R* const loss = static_cast<R*>(problem.loss);
  R* const moments = c.moments + chunk * kMoments * c.stride;
  const ByClass<R> mode{problem.classes};
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
      loss[row + r] = relate_row<Rule>(mode, problem, s, t, q, p, terms);
      c.template terms<R>(row + r) = terms;
    }
    if (!counted) continue;
    merge_tile<R>(students, tiles.second, c.stride, problem.classes, counted, before, moments);
    before += counted;
  }
  c.counts[chunk] = before;
}

template <class Rule, class R>
void differentiate_rows(const CorrelationContext<R>& c, int64_t begin, int64_t end) {
  const CorrelationProblem& problem = c.problem;
  const Tiles<R> tiles(c);
  const bool kept = c.keeps_probabilities();
  const bool direct_s = kept || direct<R>(problem.student), direct_t = direct<R>(problem.teacher);
  const int64_t last = problem.rows - 1;
  const ByClass<R> mode{problem.classes};
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
        differentiate_row<Rule, true>(mode, c, c.template terms<R>(row + r), gradient, t, gradient,
                                      pull, gradient, ahead);
        continue;
      }
      const R* s = q;
      if (direct_s)
        s = static_cast<const R*>(problem.student.data) + problem.student.offset(row + r);
      differentiate_row<Rule, false>(mode, c, c.template terms<R>(row + r), s, t, q, pull, q, 0);
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
  const bool lanes = rows_are_lanes(problem);
  const int tile = far && classes <= kSpanClasses ? kMostTile
                   : classes <= 4096      ? kTile
                   : classes <= 65536     ? kTile / 2
                                          : kTile / 4;
  // Whole tiles, so that rows whose classes are far apart are read in vectors to the end.
  int64_t chunk_rows = (rows + chunks - 1) / chunks;
  if (far) chunk_rows = (chunk_rows + tile - 1) / tile * tile;
  chunks = (rows + chunk_rows - 1) / chunk_rows;
  const int64_t numbers = sizeof(RowTerms<Vec<R>>) * ((rows + kLanes<R> - 1) / kLanes<R>);
  cpu::Buffer buffer(numbers + sizeof(R) * stride * (chunks * kMoments + kColumnNumbers));
  int64_t counts[kMostChunks];
  R* const moments = reinterpret_cast<R*>(static_cast<char*>(buffer.data) + numbers);
  CorrelationContext<R> context{problem, chunks, chunk_rows, stride, tile, lanes, buffer.data, moments,
                                moments + stride * chunks * kMoments, counts};
  parallel_for(
      chunks, 16384 / (chunk_rows * classes) + 1,
      [](void* opaque, int64_t begin, int64_t end) {
        const auto& c = *static_cast<const CorrelationContext<R>*>(opaque);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          if (c.lanes) relate_lanes<Rule>(c, chunk);
          else relate_rows<Rule, R>(c, chunk);
        }
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
        const int64_t first = begin * c.tile, tiled = end * c.tile;
        const int64_t last = tiled < c.problem.rows ? tiled : c.problem.rows;
        if (c.lanes) differentiate_lanes<Rule>(c, first, last);
        else differentiate_rows<Rule, R>(c, first, last);
      },
      &context);
}

}  // namespace kdkernels::KDK_ISA
