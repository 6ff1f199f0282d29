// What the traversals of the correlation family share: rows in registers, moments of columns.
//
// q and p are the softmaxes of student and teacher. A rule turns the inner products of centred q and p
// over a row, or a column, into a value and the coefficients of the derivative. Raw second moments
// would cancel in columns that hardly vary: moments are taken about the mean of a few rows, and merged
// in a fixed order (Chan, Golub, LeVeque).
#pragma once

#include "correlation.h"
#include "groups.cuh"
#include "sources.cuh"
#include "totals.cuh"

namespace kdkernels::cuda {

// What the last walk over a row needs of it.
template <class R>
struct RowTerms {
  R most_s, inverse_s, most_t, inverse_t, of_q, of_p;
};

// 2^(k x - k most), fused in float; `excess` is what rounding makes of 1, at x = most.
template <class R>
struct Exponent {
  R k, at;
  KDK_DEVICE Exponent(R most, R factor) : k(bounded_factor(most, factor)), at(product(most, k)) {}
  KDK_DEVICE R operator()(R x) const { return power_of_two(multiply_add(x, k, -at)); }
  KDK_DEVICE R excess(R most) const { return (*this)(most); }
};
template <>
struct Exponent<double> {
  double k, most;
  KDK_DEVICE Exponent(double most, double k) : k(k), most(most) {}
  KDK_DEVICE double operator()(double x) const { return power_of_two((x - most) * k); }
  KDK_DEVICE double excess(double) const { return 1; }
};

// The softmax of a row. Its logits give the same bits in every walk, and in all rows that equal it: the
// moments of a constant column are 0.
template <class R>
struct Softmax {
  Exponent<R> exponent;
  R inverse;  // one by the sum of the exponentials
  KDK_DEVICE Softmax(R most, R inverse, R k) : exponent(most, k), inverse(inverse) {}
  KDK_DEVICE R operator()(R x) const { return product(exponent(x), inverse); }
};

template <class R>
struct Column {  // means, and coefficients of q and p in the derivative
  R mean_q, mean_p, of_q, of_p;
};
// In memory each of the four lies in an array of its own: term k of class c.
template <class R>
KDK_DEVICE R* column_term(const CorrelationTask& task, int k, int64_t c) {
  return static_cast<R*>(task.columns) + k * task.problem.classes + c;
}

template <class R>
struct Moments {
  R mean_q = 0, mean_p = 0, qq = 0, pp = 0, qp = 0;

  // One by a number of rows; of the first row exactly 1.
  template <class Count>
  KDK_DEVICE static R share_of(Count count) {
    return count == 1 ? R(1) : rules::quotient(R(1), R(count));
  }
  // One row more (Welford), with the share_of the rows that there are then.
  KDK_DEVICE void add(R q, R p, R share) {
    const R dq = q - mean_q, dp = p - mean_p, rest = R(1) - share;
    mean_q = multiply_add(dq, share, mean_q);
    mean_p = multiply_add(dp, share, mean_p);
    const R eq = dq * rest, ep = dp * rest;
    qq = multiply_add(dq, eq, qq);
    pp = multiply_add(dp, ep, pp);
    qp = multiply_add(dq, ep, qp);
  }
  // Moments of `count` rows more, after those of `before` rows.
  KDK_DEVICE void merge(const Moments& other, R before, R count) {
    const R share = count / (before + count), weight = before * share;
    const R dq = other.mean_q - mean_q, dp = other.mean_p - mean_p;
    mean_q += dq * share;
    mean_p += dp * share;
    qq += other.qq + dq * dq * weight;
    pp += other.pp + dp * dp * weight;
    qp += other.qp + dq * dp * weight;
  }
};

// Moments of `count` rows, at most kRows, of one column, `q` and `p` in registers. Sums are of differences
// to the first, so that the mean of a constant column is that constant, and its moments exactly 0.
template <class R, int kRows>
KDK_DEVICE Moments<R> moments_of(const R (&q)[kRows], const R (&p)[kRows], int count) {
  Moments<R> m;
  KDK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (r >= count) break;
    m.mean_q += q[r] - q[0];
    m.mean_p += p[r] - p[0];
  }
  const R inverse = R(1) / R(count);
  m.mean_q = q[0] + product(m.mean_q, inverse);
  m.mean_p = p[0] + product(m.mean_p, inverse);
  KDK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (r >= count) break;
    const R a = q[r] - m.mean_q, b = p[r] - m.mean_p;
    m.qq += a * a;
    m.pp += b * b;
    m.qp += a * b;
  }
  return m;
}

// Part `part` of the rows: the moments of column c.
template <class R>
KDK_DEVICE R* partial(const CorrelationTask& task, int parts, int moment, int part, int64_t c) {
  return static_cast<R*>(task.partials) +
         (int64_t(moment) * parts + part) * task.problem.classes + c;
}
template <class R>
KDK_DEVICE void store_partial(const CorrelationTask& task, int parts, int part, int64_t c,
                              const Moments<R>& m) {
  *partial<R>(task, parts, 0, part, c) = m.mean_q;
  *partial<R>(task, parts, 1, part, c) = m.mean_p;
  *partial<R>(task, parts, 2, part, c) = m.qq;
  *partial<R>(task, parts, 3, part, c) = m.pp;
  *partial<R>(task, parts, 4, part, c) = m.qp;
}

// Adds up N values of each lane over the warps of the block, in order; every warp gets the sums.
template <int N, class R>
KDK_DEVICE void sum_warps(R (&x)[N], R* scratch) {
  const int lane = thread_index() % kWarp, warps = thread_count() / kWarp;
  sync_block();
  KDK_UNROLL
  for (int k = 0; k < N; ++k) scratch[(k * warps + thread_index() / kWarp) * kWarp + lane] = x[k];
  sync_block();
  KDK_UNROLL
  for (int k = 0; k < N; ++k) {
    x[k] = 0;
    for (int warp = 0; warp < warps; ++warp) x[k] += scratch[(k * warps + warp) * kWarp + lane];
  }
}

// All parts of each column combined, in order: its terms are stored, its value returned to one thread.
// A block takes 32 columns, a lane each, and shares the parts among its warps.
template <class Rule, class R>
KDK_DEVICE double combine_columns(const CorrelationTask& task, int parts, R* scratch) {
  const CorrelationProblem& problem = task.problem;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int warps = thread_count() / kWarp;
  const R one = R(1) / R(problem.rows);
  double total = 0;
  for (int64_t base = int64_t(block_index()) * kWarp; base < problem.classes;
       base += int64_t(block_count()) * kWarp) {
    const int64_t c = base + lane;
    const bool known = c < problem.classes;
    const int64_t at = known ? c : 0;  // others read along and keep nothing
    const auto read = [&](int moment, int part) {
      return load_fresh(partial<R>(task, parts, moment, part, at));
    };
    const R base_q = read(0, 0), base_p = read(1, 0);
    R means[2] = {0, 0};
    // Many parts are on their way at once: each turn alone would wait for the second-level cache.
    KDK_UNROLL_BY(8)
    for (int part = warp; part < parts; part += warps) {
      const R share = R(load_fresh(task.counts + part)) * one;
      means[0] += share * (read(0, part) - base_q);
      means[1] += share * (read(1, part) - base_p);
    }
    sum_warps(means, scratch);
    means[0] += base_q;
    means[1] += base_p;
    R products[3] = {0, 0, 0};
    KDK_UNROLL_BY(4)
    for (int part = warp; part < parts; part += warps) {
      const R count = R(load_fresh(task.counts + part));
      const R q = read(0, part) - means[0], p = read(1, part) - means[1];
      products[0] += read(2, part) + count * q * q;
      products[1] += read(3, part) + count * p * p;
      products[2] += read(4, part) + count * q * p;
    }
    sum_warps(products, scratch);
    if (!known || warp != 0) continue;
    R of_p, of_q;
    const R value =
        Rule::relation(products[0], products[1], products[2], R(problem.eps), of_p, of_q);
    const R intra = R(problem.intra);
    *column_term<R>(task, 0, c) = means[0];
    *column_term<R>(task, 1, c) = means[1];
    *column_term<R>(task, 2, c) = of_q * intra;
    *column_term<R>(task, 3, c) = of_p * intra;
    total += double(value * intra);
  }
  return total;
}

// This block's value, kept for finish_total.
KDK_DEVICE void keep_total(const CorrelationTask& task, double value) {
  value = add_up_block(value);
  if (thread_index() == 0) task.sums[block_index()] = value;
}
// The loss, by the first block. Called by all after a meeting of the grid.
template <class R>
KDK_DEVICE void finish_total(const CorrelationTask& task) {
  if (block_index() == 0) add_up_blocks<R>(task.sums, task.total);
}

// d loss / d q of one class.
template <class R>
KDK_DEVICE R derivative(R q, R p, R mean, R of_q, R of_p, const Column<R>& column) {
  return of_q * (q - mean) + of_p * (p - mean) + column.of_q * (q - column.mean_q) +
         column.of_p * (p - column.mean_p);
}

// Likewise but for `base`, (of_q + of_p) mean, which all classes share: the gradient does not depend on that.
// The same bits wherever it is called: with the sum of q times it, it cancels where q is 1.
template <class R>
KDK_DEVICE R slope_of(R q, R p, R of_q, R of_p, R base, const Column<R>& column) {
  const R by_row = multiply_add(of_q, q, multiply_add(of_p, p, -base));
  const R by_p = multiply_add(column.of_p, p - column.mean_p, by_row);
  return multiply_add(column.of_q, q - column.mean_q, by_p);
}

// A row pair in the registers of kLanes lanes, a class in every element.
template <class Rule, class R, int kLanes, int kElements>
struct RowPair {
  R q[kElements], p[kElements];
  R of_q, of_p;  // coefficients in the derivative, times `inter`

  // Turns logits (-inf past the end) into softmaxes; returns the row's value.
  template <class Inside>
  KDK_DEVICE R relate(const CorrelationProblem& problem, const Inside& inside) {
    Lanes<kLanes> group;
    const R k = R(1.0 / problem.tau) * R(kLog2E), mean = R(1.0 / double(problem.classes));
    R most[2] = {-R(INFINITY), -R(INFINITY)};
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) {
      most[0] = Max::join(q[j], most[0]);
      most[1] = Max::join(p[j], most[1]);
    }
    group.template reduce<Max>(most);
    R z[2] = {0, 0};
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) {
      q[j] = power_of_two((q[j] - most[0]) * k);
      p[j] = power_of_two((p[j] - most[1]) * k);
      z[0] += q[j];
      z[1] += p[j];
    }
    group.template reduce<Sum>(z);
    const R inverse_q = R(1) / z[0], inverse_p = R(1) / z[1];
    R sums[3] = {0, 0, 0};
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) {
      q[j] = product(q[j], inverse_q);
      p[j] = product(p[j], inverse_p);
      const R centre = inside(j) ? mean : R(0);  // past the end q and p are 0
      const R a = q[j] - centre, b = p[j] - centre;
      sums[0] += product(a, a);
      sums[1] += product(b, b);
      sums[2] += product(a, b);
    }
    group.template reduce<Sum>(sums);
    const R value = Rule::relation(sums[0], sums[1], sums[2], R(problem.eps), of_p, of_q);
    of_p *= R(problem.inter);
    of_q *= R(problem.inter);
    return value * R(problem.inter);
  }

  // Puts the gradient by the logits in place of q. `column(j)` is read where inside(j).
  template <class Inside, class ColumnOf>
  KDK_DEVICE void differentiate(const CorrelationProblem& problem, R factor, const Inside& inside,
                                const ColumnOf& column) {
    Lanes<kLanes> group;
    const R mean = R(1.0 / double(problem.classes));
    R along[1] = {0};
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) {
      p[j] = inside(j) ? derivative(q[j], p[j], mean, of_q, of_p, column(j)) : R(0);
      along[0] += q[j] * p[j];
    }
    group.template reduce<Sum>(along);
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) q[j] = q[j] * (p[j] - along[0]) * factor;
  }
};

template <class R>
KDK_DEVICE R gradient_factor(const CorrelationTask& task) {
  const R upstream = task.upstream ? *static_cast<const R*>(task.upstream) : R(1);
  return upstream * R(1.0 / task.problem.tau);
}

}  // namespace kdkernels::cuda
