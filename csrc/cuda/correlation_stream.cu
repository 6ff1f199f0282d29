// Correlation of any number of classes, dtypes and strides, in float or double, in one cooperative
// launch: (1) a block a row: normalisers and the row's relation. (2) A thread a column: moments over a
// part of the rows. (3) The columns combined. (4) A block a row: the gradient. The logits are read from
// memory three times unless the cache holds them (7 N C bytes an element's size).
#include "correlation.cuh"
#include "launch.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

// Dense packs of T, in float.
template <class T>
struct Packs {
  using R = float;
  static constexpr int kWidth = kPack<T>;
  RowPointers<T> at;
  KDK_DEVICE Packs(const CorrelationProblem& problem, int64_t row) : at(problem, row) {}
  KDK_DEVICE void load(int64_t c, R (&s)[kWidth], R (&t)[kWidth]) const {
    const Bits16 a = load16(at.s + c), b = load16(at.t + c);
    KDK_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      s[k] = element<T>(a, k);
      t[k] = element<T>(b, k);
    }
  }
  KDK_DEVICE void find_maxima(int64_t first, int64_t step, int64_t classes, R (&most)[2]) const {
    PackMaxima<T> maxima;
    for (int64_t c = first; c < classes; c += step) maxima.add({load16(at.s + c), load16(at.t + c)});
    maxima.join(most);
  }
  KDK_DEVICE void store(int64_t c, const R (&g)[kWidth]) const {
    Pack<T> pack;
    KDK_UNROLL
    for (int k = 0; k < kWidth; ++k) pack.x[k] = narrow<T>(g[k]);
    store16(at.g + c, as_bits(pack));
  }
};

// Single elements of any dtype and stride.
template <class Real>
struct Elements {
  using R = Real;
  static constexpr int kWidth = 1;
  const CorrelationProblem& problem;
  int64_t s_, t_, g_;
  KDK_DEVICE Elements(const CorrelationProblem& problem, int64_t row)
      : problem(problem),
        s_(problem.student.offset(row)),
        t_(problem.teacher.offset(row)),
        g_(problem.gradient.data ? problem.gradient.offset(row) : 0) {}
  KDK_DEVICE void load(int64_t c, R (&s)[1], R (&t)[1]) const {
    s[0] = load_element<R>(problem.student, s_ + c * problem.student.class_stride);
    t[0] = load_element<R>(problem.teacher, t_ + c * problem.teacher.class_stride);
  }
  KDK_DEVICE void find_maxima(int64_t first, int64_t step, int64_t classes, R (&most)[2]) const {
    for (int64_t c = first; c < classes; c += step) {
      R s[1], t[1];
      load(c, s, t);
      most[0] = larger(s[0], most[0]);
      most[1] = larger(t[0], most[1]);
    }
  }
  KDK_DEVICE void store(int64_t c, const R (&g)[1]) const {
    store_element<R>(problem.gradient, g_ + c * problem.gradient.class_stride, g[0]);
  }
};

// f(c, k, student, teacher) for every class of this thread, c the first class of its pack.
template <class Access, class F>
KDK_DEVICE void each_class(const CorrelationProblem& problem, const Access& row, const F& f) {
  using R = typename Access::R;
  for (int64_t c = int64_t(thread_index()) * Access::kWidth; c < problem.classes;
       c += int64_t(kStreamThreads) * Access::kWidth) {
    R s[Access::kWidth], t[Access::kWidth];
    row.load(c, s, t);
    KDK_UNROLL
    for (int k = 0; k < Access::kWidth; ++k) f(s[k], t[k]);
  }
}

template <class Access, class R>
KDK_DEVICE R relate_row(const CorrelationProblem& problem, int64_t row, Block& block,
                        RowTerms<R>& terms) {
  const Access logits(problem, row);
  const R k = R(1.0 / problem.tau) * R(kLog2E), mean = R(1.0 / double(problem.classes));
  R most[2] = {-R(INFINITY), -R(INFINITY)};
  logits.find_maxima(int64_t(thread_index()) * Access::kWidth,
                     int64_t(kStreamThreads) * Access::kWidth, problem.classes, most);
  block.reduce<Max>(most);
  // Of equal logits these are 1, their sum is exact, and the centred squares below are 0.
  const auto power = [&](R x, int side) { return power_of_two((x - most[side]) * k); };
  R z[2] = {0, 0};
  each_class(problem, logits, [&](R s, R t) {
    z[0] += power(s, 0);
    z[1] += power(t, 1);
  });
  block.reduce<Sum>(z);
  const R inverse[2] = {R(1) / z[0], R(1) / z[1]};
  R sums[3] = {0, 0, 0};
  each_class(problem, logits, [&](R s, R t) {
    const R a = product(power(s, 0), inverse[0]) - mean;
    const R b = product(power(t, 1), inverse[1]) - mean;
    sums[0] = multiply_add(a, a, sums[0]);
    sums[1] = multiply_add(b, b, sums[1]);
    sums[2] = multiply_add(a, b, sums[2]);
  });
  block.reduce<Sum>(sums);
  const R inter = R(problem.inter);
  R of_p, of_q;
  const R value = Rule::relation(sums[0], sums[1], sums[2], R(problem.eps), of_p, of_q);
  const Exponent<R> s(most[0], k), t(most[1], k);
  terms = {most[0], R(1) / (z[0] * s.excess(most[0])), most[1], R(1) / (z[1] * t.excess(most[1])),
           of_q * inter, of_p * inter};
  return value * inter;
}

template <class Access, class R>
KDK_DEVICE void sum_columns(const CorrelationTask& task, int part_rows, int parts) {
  constexpr int kWidth = Access::kWidth;
  constexpr int kRows = 2;  // of a column that are read at once
  const CorrelationProblem& problem = task.problem;
  const R k = R(1.0 / problem.tau) * R(kLog2E);
  const int64_t strip = int64_t(kStreamThreads) * kWidth;
  const int64_t strips = (problem.classes + strip - 1) / strip;
  for (int64_t item = block_index(); item < strips * parts; item += block_count()) {
    const int part = int(item / strips);
    const int64_t c = item % strips * strip + int64_t(thread_index()) * kWidth;
    const int64_t begin = int64_t(part) * part_rows;
    const int64_t end = begin + part_rows < problem.rows ? begin + part_rows : problem.rows;
    if (c == 0) task.counts[part] = end - begin;
    if (c >= problem.classes) continue;
    Moments<R> sum[kWidth];
    for (int64_t row = begin; row < end; row += kRows) {
      R s[kRows][kWidth], t[kRows][kWidth];
      KDK_UNROLL
      for (int r = 0; r < kRows; ++r)
        if (row + r < end) Access(problem, row + r).load(c, s[r], t[r]);
      KDK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (row + r >= end) break;
        const RowTerms<R> terms = static_cast<const RowTerms<R>*>(task.rows)[row + r];
        const Softmax<R> q(terms.most_s, terms.inverse_s, k), p(terms.most_t, terms.inverse_t, k);
        const R share = Moments<R>::share_of(row + r - begin + 1);
        KDK_UNROLL
        for (int i = 0; i < kWidth; ++i) sum[i].add(q(s[r][i]), p(t[r][i]), share);
      }
    }
    KDK_UNROLL
    for (int i = 0; i < kWidth; ++i) store_partial<R>(task, parts, part, c + i, sum[i]);
  }
}

// Neighbouring columns' terms, which another block wrote before the grid met.
template <int kWidth>
KDK_DEVICE void load_terms(const float* from, float (&to)[kWidth]) {
  if constexpr (kWidth == 1) {
    to[0] = *from;
  } else {
    KDK_UNROLL
    for (int i = 0; i < kWidth; i += 4) {
      const Bits16 four = load16_written(from + i);
      KDK_UNROLL
      for (int k = 0; k < 4; ++k) to[i + k] = element<float>(four, k);
    }
  }
}
KDK_DEVICE void load_terms(const double* from, double (&to)[1]) { to[0] = *from; }

template <class Access, class R>
KDK_DEVICE void write_gradient(const CorrelationTask& task, int64_t index, R factor,
                               Block& block) {
  constexpr int kWidth = Access::kWidth;
  const CorrelationProblem& problem = task.problem;
  const Access row(problem, index);
  const RowTerms<R> terms = static_cast<const RowTerms<R>*>(task.rows)[index];
  const R k = R(1.0 / problem.tau) * R(kLog2E), mean = R(1.0 / double(problem.classes));
  const Softmax<R> softmax_s(terms.most_s, terms.inverse_s, k);
  const Softmax<R> softmax_t(terms.most_t, terms.inverse_t, k);
  const auto slopes = [&](int64_t c, R (&q)[kWidth], R (&g)[kWidth]) {
    row.load(c, q, g);
    R columns[4][kWidth];
    KDK_UNROLL
    for (int term = 0; term < 4; ++term)
      load_terms(column_term<R>(task, term, c), columns[term]);
    KDK_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      const Column<R> column{columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
      q[i] = softmax_s(q[i]);
      g[i] = slope_of(q[i], softmax_t(g[i]), terms.of_q, terms.of_p,
                      (terms.of_q + terms.of_p) * mean, column);
    }
  };
  const int64_t first = int64_t(thread_index()) * kWidth, step = int64_t(kStreamThreads) * kWidth;
  R along[1] = {0};
  for (int64_t c = first; c < problem.classes; c += step) {
    R q[kWidth], g[kWidth];
    slopes(c, q, g);
    KDK_UNROLL
    for (int i = 0; i < kWidth; ++i) along[0] = multiply_add(q[i], g[i], along[0]);
  }
  block.reduce<Sum>(along);
  for (int64_t c = first; c < problem.classes; c += step) {
    R q[kWidth], g[kWidth];
    slopes(c, q, g);
    KDK_UNROLL
    for (int i = 0; i < kWidth; ++i) g[i] = q[i] * (g[i] - along[0]) * factor;
    row.store(c, g);
  }
}

template <class Access>
KDK_KERNEL void KDK_BOUNDS(kStreamThreads, 1)
    correlate_stream(KDK_PARAMETER CorrelationTask task, KDK_PARAMETER CorrelationPlan plan) {
  using R = typename Access::R;
  const CorrelationProblem& problem = task.problem;
  R* const scratch = reinterpret_cast<R*>(shared_memory() + kBlockExchange);
  Block block;
  double total = 0;
  for (int64_t row = block_index(); row < problem.rows; row += block_count()) {
    RowTerms<R> terms;
    const R value = relate_row<Access>(problem, row, block, terms);
    if (thread_index() != 0) continue;
    static_cast<RowTerms<R>*>(task.rows)[row] = terms;
    total += double(value);
  }
  sync_grid();
  sum_columns<Access, R>(task, plan.tile, plan.parts);
  sync_grid();
  total += combine_columns<Rule, R>(task, plan.parts, scratch);
  keep_total(task, total);
  sync_grid();
  finish_total<R>(task);
  sync_block();
  if (!problem.gradient.data) return;
  Block again;
  const R factor = gradient_factor<R>(task);
  for (int64_t row = block_index(); row < problem.rows; row += block_count())
    write_gradient<Access, R>(task, row, factor, again);
}

template <class Access>
void run(const CorrelationTask& task, const CorrelationPlan& plan, void* stream) {
  launch<correlate_stream<Access>>({plan.blocks, plan.threads, 1, size_t(plan.shared), true},
                                   stream, task, plan);
}

}  // namespace

void KDK_JOIN(KDK_RULE, _correlation_stream)(const CorrelationTask& task,
                                             const CorrelationPlan& plan, void* stream) {
  const Scalar s = task.problem.student.type, t = task.problem.teacher.type;
  if (s == Scalar::f64 || t == Scalar::f64) return run<Elements<double>>(task, plan, stream);
  if (!plan.vector) return run<Elements<float>>(task, plan, stream);
  with_type(s, [&](auto of) { run<Packs<typename decltype(of)::type>>(task, plan, stream); });
}

}  // namespace kdkernels::cuda
