// Tiles of rows in the working type, side by side, from and to tensors of any strides.
#pragma once

#include "convert.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {

// a0 b0 a1 b1 ... of the halves of two vectors that begin at kFirst.
template <int kFirst, class V, int... k>
KDK_FN V interleaved(const V& a, const V& b, std::integer_sequence<int, k...>) {
  constexpr int kW = int(sizeof...(k));
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + k / 2 + (k % 2) * kW)...);
#else
  using I = typename Simd<rules::scalar_t<V>>::I;
  return __builtin_shuffle(a, b, I{(kFirst + k / 2 + (k % 2) * kW)...});
#endif
}

// A square of vectors, by as many perfect shuffles as its width has bits.
template <class R, int kRounds>
KDK_FN void transpose_square(Vec<R> (&x)[kLanes<R>]) {
  if constexpr (kRounds > 1) {
    constexpr int kHalf = kLanes<R> / 2;
    const auto lanes = std::make_integer_sequence<int, kLanes<R>>();
    Vec<R> y[kLanes<R>];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      y[2 * i] = interleaved<0>(x[i], x[i + kHalf], lanes);
      y[2 * i + 1] = interleaved<kHalf>(x[i], x[i + kHalf], lanes);
    }
    transpose_square<R, kRounds / 2>(y);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<R>; ++i) x[i] = y[i];
  }
}

// from[i][k] -> to[k][i] for i < rows and k < columns.
template <class R>
inline void transpose(const R* from, int64_t from_stride, int64_t columns, R* to, int64_t to_stride,
                      int64_t rows) {
  constexpr int kW = kLanes<R>;
  const int64_t whole_rows = rows / kW * kW, whole_columns = columns / kW * kW;
  for (int64_t i = 0; i < whole_rows; i += kW) {
    for (int64_t k = 0; k < whole_columns; k += kW) {
      Vec<R> x[kW];
#pragma GCC unroll 16
      for (int j = 0; j < kW; ++j) x[j] = load<R>(from + (i + j) * from_stride + k);
      transpose_square<R, kW>(x);
#pragma GCC unroll 16
      for (int j = 0; j < kW; ++j) store<R>(to + (k + j) * to_stride + i, x[j]);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = i < whole_rows ? whole_columns : 0; k < columns; ++k)
      to[k * to_stride + i] = from[i * from_stride + k];
}

// Classes that are transposed together, of kSpan rows at most: all of it stays in the cache's first level.
constexpr int64_t kTransposed = 16;

// Calls f(r, span, begin, some) for the `some` classes from `begin` of `span` rows from r that lie side
// by side; gives the first row that is in none.
template <class R, class F>
KDK_FN int64_t by_spans(const Rows& x, int64_t row, int64_t count, int64_t classes, F&& f) {
  constexpr int64_t kW = kLanes<R>;
  int64_t r = 0, span;
  for (; across(x) && count - r >= kW; r += span) {
    span = count - r >= kSpan && x.adjacent(row + r, kSpan) ? kSpan : kW;
    if (!x.adjacent(row + r, span)) break;
    for (int64_t begin = 0; begin < classes; begin += kTransposed)
      f(r, span, begin, classes - begin < kTransposed ? classes - begin : kTransposed);
  }
  return r;
}

// Rows -> tile[r][class], in the working type; what does not count may be left out. `lanes` is scratch
// for kTransposed times kSpan numbers.
template <class Problem, class R>
void read_tile(const Problem& problem, const Rows& x, int64_t row, int64_t count, R* tile,
               int64_t stride, R* lanes) {
  const int64_t classes = problem.classes;
  const auto read = [&](int64_t r, int64_t span, int64_t begin, int64_t some) KDK_LAMBDA {
    int64_t first = 0;
    while (first < span && !problem.counts(row + r + first)) ++first;
    if (first == span) return;
    with_type(x, [&](auto* data) KDK_LAMBDA {
      const auto* from = data + x.offset(row + r) + begin * x.class_stride;
      for (int64_t i = 0; i < some; ++i)
        read_run(from + i * x.class_stride, 1, span, lanes + i * span, 1);
      const int64_t next = classes - begin - some < some ? classes - begin - some : some;
      from += some * x.class_stride;
      constexpr int64_t kLine = 64 / int64_t(sizeof *data);
      for (int64_t i = 0; i < next; ++i)
        for (int64_t k = 0; k < span; k += kLine) __builtin_prefetch(from + i * x.class_stride + k);
    });
    transpose<R>(lanes, span, span, tile + r * stride + begin, stride, some);
  };
  int64_t r = 0;
  while (r < count) {
    r += by_spans<R>(x, row + r, count - r, classes,
                     [&](int64_t at, auto... block) KDK_LAMBDA { read(r + at, block...); });
    if (r < count && problem.counts(row + r)) read_row(x, row + r, classes, tile + r * stride);
    ++r;
  }
}

template <class R>
void write_tile(const Rows& x, int64_t row, int64_t count, int64_t classes, const R* tile,
                int64_t stride, R* lanes) {
  int64_t r = 0;
  const auto write = [&](int64_t at, int64_t span, int64_t begin, int64_t some) KDK_LAMBDA {
    transpose<R>(tile + (r + at) * stride + begin, stride, some, lanes, span, span);
    with_type(x, [&](auto* data) KDK_LAMBDA {
      auto* to = data + x.offset(row + r + at) + begin * x.class_stride;
      for (int64_t i = 0; i < some; ++i)
        write_run(to + i * x.class_stride, 1, span, lanes + i * span, 1);
    });
  };
  while (r < count) {
    r += by_spans<R>(x, row + r, count - r, classes, write);
    if (r < count) write_row(x, row + r, classes, tile + r * stride);
    ++r;
  }
}

}  // namespace kdkernels::KDK_ISA
