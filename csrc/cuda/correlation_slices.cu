// Correlation of many classes in three launches. A block keeps a slice of the columns, the same one for
// all its rows, with their moments in registers (Welford's recurrence), as are the columns' terms for
// the gradient; where a row does not fit one block, the blocks of a cluster share it. (1) Rows: softmaxes,
// relations, moments. (2) The columns combined. (3) The rows again, from their saved terms, and their
// gradient. Memory is read twice and written once (5 N C bytes an element's size).
//
// A row is walked twice, first for what the other slices have to know of it, then, two turns later, with
// what they know. Between, one warp makes one of the warps' parts, hands it to the other blocks, and makes
// the row's of theirs, so that nobody waits for a cluster's latency. A turn is: begin row i + 2, the
// block meets, end row i.
#include <cfloat>

#include "correlation_walk.cuh"
#include "launch.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

using R = float;

template <class T, bool kWhole, int kElements>
KDK_KERNEL void KDK_BOUNDS(kSliceThreads, 1)
    correlate_slices(KDK_PARAMETER CorrelationTask task, KDK_PARAMETER CorrelationPlan plan) {
  const CorrelationProblem& problem = task.problem;
  const SliceWalk<T, kWhole, kElements> walk(task, plan);
  const auto& seat = walk.seat;
  auto& meeting = walk.meeting;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  if (block_index() == 0 && thread_index() == 0) *task.ticket = 0;  // of the second launch
  double total = 0;
  Moments<R> columns[kElements];

  // The warp's part. Its centre is the mean of lane 0's first classes, which every thread has: it cannot be so
  // far from the warp's mean that the deviations from the one would hide those from the other.
  const auto begin_row = [&](int i, int stage) {
    const T* const s = walk.stages.student(walk.row(i), stage);
    const T* const t = walk.stages.teacher(walk.row(i), stage);
    R origin[2], centre[2] = {0, 0}, x[5] = {0, 0, 0, 0, 0};
    seat.find_maxima(s, t, origin);
    KDK_UNROLL
    for (int k = 0; k < 2; ++k) {  // any, where there are no logits
      origin[k] = warp_max(origin[k]);
      if (origin[k] == -R(INFINITY)) origin[k] = -R(FLT_MAX);
    }
    seat.each(s, t, [&](int j, SliceLogits q, SliceLogits p) {
      R a[kSliceStep], b[kSliceStep];
      KDK_UNROLL
      for (int k = 0; k < kSliceStep; ++k) {
        a[k] = power_of_two((q[k] - origin[0]) * walk.k);
        b[k] = power_of_two((p[k] - origin[1]) * walk.k);
        x[0] += a[k];
        x[1] += b[k];
      }
      if (j == 0) {
        centre[0] = shuffle(x[0] * (R(1) / kSliceStep), 0);
        centre[1] = shuffle(x[1] * (R(1) / kSliceStep), 0);
      }
      KDK_UNROLL
      for (int k = 0; k < kSliceStep; ++k) {
        const bool known = seat.inside((j + k) / seat.kRun);
        const R da = a[k] - (known ? centre[0] : R(0)), db = b[k] - (known ? centre[1] : R(0));
        x[2] = multiply_add(da, da, x[2]);
        x[3] = multiply_add(db, db, x[3]);
        x[4] = multiply_add(da, db, x[4]);
      }
    });
    const R sum = sum_five(x);
    R* const to = meeting.warps[i % 2][warp];
    if ((lane & 7) == 0) to[(lane >> 4) + (lane >> 2 & 2)] = sum;
    if (lane == 4) to[4] = sum;
    if (lane == 1) {
      to[5] = centre[0];
      to[6] = centre[1];
      to[7] = origin[0];
      to[8] = origin[1];
    }
  };
  const auto exchange = [&](int i) {
    RowPart part;
    if (walk.of_warp > 0) {
      const R* const from = meeting.warps[i % 2][lane];
      const R n = walk.of_warp, one = rules::quotient(R(1), n);  // sums of a - centre, b - centre
      const R a = multiply_add(-n, from[5], from[0]), b = multiply_add(-n, from[6], from[1]);
      part = {{from[7], from[8]},
              {from[0], from[1]},
              {from[2] - a * a * one, from[3] - b * b * one, from[4] - a * b * one}};
    }
    const RowPart sum = part.merged(walk.of_warp, walk.of_block, walk.k);
    const R values[8] = {sum.origin[0],   sum.origin[1],   sum.z[0],        sum.z[1],
                         sum.products[0], sum.products[1], sum.products[2], 0};
    walk.hand_out(i, values);
  };
  const auto finish = [&](int i) {
    RowPart part;
    R values[7];
    if (walk.receive(i, values))
      part = {{values[0], values[1]}, {values[2], values[3]}, {values[4], values[5], values[6]}};
    const RowPart sum =
        walk.cluster > 1 ? part.merged(walk.of_slice, R(problem.classes), walk.k) : part;
    R one_by[2];  // of the sums of the rounded exponents that the columns and the gradient see
    KDK_UNROLL
    for (int k = 0; k < 2; ++k) {
      const R excess = Exponent<R>(sum.origin[k], walk.k).excess(sum.origin[k]);
      one_by[k] = rules::quotient(R(1), sum.z[k] * excess);
    }
    if (lane == 0)
      meeting.told[i % 2] = {{sum.origin[0], one_by[0], walk.k}, {sum.origin[1], one_by[1], walk.k}};
    if (walk.rank != 0 || lane != 0) return;
    // What rounding leaves below 0 is 0.
    const auto square = [](R x) { return x < R(0) ? R(0) : x; };
    const R inverse[2] = {rules::quotient(R(1), sum.z[0]), rules::quotient(R(1), sum.z[1])};
    const R aa = square(sum.products[0]) * inverse[0] * inverse[0];
    const R bb = square(sum.products[1]) * inverse[1] * inverse[1];
    const R ab = sum.products[2] * inverse[0] * inverse[1];
    R of_q, of_p;
    const R value = Rule::relation(aa, bb, ab, R(problem.eps), of_p, of_q), inter = R(problem.inter);
    total += double(value * inter);
    if (problem.gradient.data)
      static_cast<RowTerms<R>*>(task.rows)[walk.row(i)] = {
          sum.origin[0], one_by[0], sum.origin[1], one_by[1], of_q * inter, of_p * inter};
  };
  // The row in the moments of the columns.
  const auto end_row = [&](int i, int stage) {
    const SliceTold told = meeting.told[i % 2];
    const R share = Moments<R>::share_of(i + 1);
    const int64_t row = walk.row(i);
    const auto add = [&](int j, SliceLogits q, SliceLogits p) {
      KDK_UNROLL
      for (int k = 0; k < kSliceStep; ++k) {
        columns[j + k].add(told.s(q[k]), told.t(p[k]), share);
      }
    };
    seat.each(walk.stages.student(row, stage), walk.stages.teacher(row, stage), add);
  };
  walk.turns([&](int i) { return walk.row(i); }, begin_row, end_row, [](int) {}, exchange, finish);

  const int part = int(walk.first);
  if (walk.rank == 0 && thread_index() == 0) task.counts[part] = walk.rows;
  if (!walk.exchanging) {
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) {
      if (!seat.inside(j / seat.kRun)) continue;
      const int c = walk.begin + seat.at(j / seat.kRun) + j % seat.kRun;
      store_partial<R>(task, plan.parts, part, c, columns[j]);
    }
  }
  sync_cluster();  // nobody leaves before all have written to its memory
  keep_total(task, total);
}

KDK_KERNEL void KDK_BOUNDS(kTileThreads, 8)
    correlate_slices_columns(KDK_PARAMETER CorrelationTask task, KDK_PARAMETER CorrelationPlan plan) {
  double total = 0;
  if (block_index() == 0)
    for (int i = thread_index(); i < plan.blocks; i += thread_count()) total += task.sums[i];
  R* const scratch = reinterpret_cast<R*>(shared_memory() + kBlockExchange + 16);
  total += combine_columns<Rule, R>(task, plan.parts, scratch);
  add_up<R>(total, task.sums + plan.blocks, task.ticket, task.total);
}

template <class T, bool kWhole, int kElements>
KDK_KERNEL void KDK_BOUNDS(kSliceThreads, 1)
    correlate_slices_gradient(KDK_PARAMETER CorrelationTask task,
                              KDK_PARAMETER CorrelationPlan plan) {
  const CorrelationProblem& problem = task.problem;
  const SliceWalk<T, kWhole, kElements> walk(task, plan);
  const auto& seat = walk.seat;
  auto& meeting = walk.meeting;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const R factor = gradient_factor<R>(task), mean = R(1.0 / double(problem.classes));
  const auto row = [&](int i) { return walk.row(int(walk.rows) - 1 - i); };  // the last may be cached
  const auto each = [&](int i, int stage, const auto& f) {
    seat.each(walk.stages.student(row(i), stage), walk.stages.teacher(row(i), stage), f);
  };
  Column<R> columns[kElements];
  KDK_UNROLL
  for (int j = 0; j < kElements; ++j) {
    columns[j] = {0, 0, 0, 0};
    if (walk.exchanging || !seat.inside(j / seat.kRun)) continue;
    const int c = walk.begin + seat.at(j / seat.kRun) + j % seat.kRun;
    columns[j] = {*column_term<R>(task, 0, c), *column_term<R>(task, 1, c),
                  *column_term<R>(task, 2, c) * factor, *column_term<R>(task, 3, c) * factor};
  }

  const auto terms_of = [&](int i) { return static_cast<const RowTerms<R>*>(task.rows)[row(i)]; };
  RowTerms<R> ahead = terms_of(0);  // of the next row, so that nobody waits for the memory
  const auto prepare = [&](int i) {
    if (lane != 0) return;
    const RowTerms<R> terms = ahead;
    if (i + 1 < int(walk.rows)) ahead = terms_of(i + 1);
    meeting.told[i % 8] = {{terms.most_s, terms.inverse_s, walk.k},
                           {terms.most_t, terms.inverse_t, walk.k}};
    const R of_q = terms.of_q * factor, of_p = terms.of_p * factor;
    R* const to = meeting.of_row[i % 8];
    to[0] = of_q;
    to[1] = of_p;
    to[2] = (of_q + of_p) * mean;
  };
  const auto row_factors = [&](int i, R (&of)[3]) {
    KDK_UNROLL
    for (int k = 0; k < 3; ++k) of[k] = meeting.of_row[i % 8][k];
  };
  const auto begin_row = [&](int i, int stage) {
    const SliceTold told = meeting.told[i % 8];
    R of[3], along[1] = {0};
    row_factors(i, of);
    each(i, stage, [&](int j, SliceLogits s, SliceLogits t) {
      KDK_UNROLL
      for (int k = 0; k < kSliceStep; ++k) {
        const R q = told.s(s[k]);
        along[0] = multiply_add(q, slope_of(q, told.t(t[k]), of[0], of[1], of[2], columns[j + k]), along[0]);
      }
    });
    reduce_lanes<Sum>(along, kWarp);
    if (lane == 0) meeting.warps[i % 2][warp][0] = along[0];
  };
  const auto exchange = [&](int i) {
    R along[1] = {walk.of_warp > 0 ? meeting.warps[i % 2][lane][0] : R(0)};
    reduce_lanes<Sum>(along, 16);
    const R values[4] = {along[0], 0, 0, 0};
    walk.hand_out(i, values);
  };
  const auto finish = [&](int i) {
    R along[1];
    if (!walk.receive(i, along)) along[0] = 0;
    reduce_lanes<Sum>(along, 16);
    if (lane == 0) meeting.along[i % 2] = along[0];
  };
  const auto end_row = [&](int i, int stage) {
    const SliceTold told = meeting.told[i % 8];
    const R along = meeting.along[i % 2];
    R of[3];
    row_factors(i, of);
    const Rows& gradient = problem.gradient;
    T* const to = static_cast<T*>(gradient.data) + row(i) * gradient.stride[0] + walk.begin;
    each(i, stage, [&](int j, SliceLogits s, SliceLogits t) {
      R g[kSliceStep];
      KDK_UNROLL
      for (int k = 0; k < kSliceStep; ++k) {
        const R q = told.s(s[k]);
        g[k] = q * (slope_of(q, told.t(t[k]), of[0], of[1], of[2], columns[j + k]) - along);
      }
      seat.write(to, j, g);
    });
  };
  walk.turns(row, begin_row, end_row, prepare, exchange, finish);
  sync_cluster();
}

template <class T, bool kWhole, int kElements>
void run(const CorrelationTask& task, const CorrelationPlan& plan, void* stream) {
  const LaunchShape rows{plan.blocks, plan.threads, plan.cluster, size_t(plan.shared), false};
  launch<correlate_slices<T, kWhole, kElements>>(rows, stream, task, plan);
  const LaunchShape columns{plan.groups, kTileThreads, 1, kBlockExchange + 16 + 12 * kTileThreads, false};
  launch<correlate_slices_columns>(columns, stream, task, plan);
  if (task.problem.gradient.data)
    launch<correlate_slices_gradient<T, kWhole, kElements>>(rows, stream, task, plan);
}

template <class T>
void run(const CorrelationTask& task, const CorrelationPlan& plan, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (plan.elements == kSliceMost) return run<T, true, kSliceMost>(task, plan, stream);
  }
  return plan.vector ? run<T, true, kSliceElements>(task, plan, stream)
                     : run<T, false, kSliceElements>(task, plan, stream);
}

}  // namespace

void KDK_JOIN(KDK_RULE, _correlation_slices)(const CorrelationTask& task,
                                             const CorrelationPlan& plan, void* stream) {
  with_type(task.problem.student.type,
            [&](auto of) { run<typename decltype(of)::type>(task, plan, stream); });
}

}  // namespace kdkernels::cuda
