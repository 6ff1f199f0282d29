// How a block walks its rows in correlation_slices.cu: what each thread is told of a row, where the parts of a
// row meet, and who does what when.
#pragma once

#include "correlation.cuh"
#include "correlation_slices.cuh"

namespace kdkernels::cuda {

constexpr int kTurnsAhead = 2;                           // from the beginning of a row to its end
constexpr int kCopies = kSliceStages - kTurnsAhead - 2;  // rows that come before they begin

// Of some classes of a row: a = 2^(k (s - origin)) and b likewise of the teacher, their sums z, and the sums
// of squares and products, aa, bb, ab, about their means. Equal logits have a = 1, sums without
// rounding, and aa = 0.
struct RowPart {
  float origin[2] = {-INFINITY, -INFINITY}, z[2] = {0, 0}, products[3] = {0, 0, 0};

  // The parts of sixteen lanes, of `mine` classes each and `all` together, as one, in each of them.
  KDK_DEVICE RowPart merged(float mine, float all, float k) const {
    RowPart sum;
    float factor[2], gap[2];
    KDK_UNROLL
    for (int i = 0; i < 2; ++i) {
      sum.origin[i] = warp_max(origin[i]);
      const float below = origin[i] - sum.origin[i];
      factor[i] = origin[i] == sum.origin[i] ? 1.0f : power_of_two(below * k);
      sum.z[i] = z[i] * factor[i];
      gap[i] = sum.z[i];
    }
    reduce_lanes<Sum>(sum.z, 16);
    KDK_UNROLL
    for (int i = 0; i < 2; ++i) gap[i] = multiply_add(-mine, sum.z[i] / all, gap[i]);
    const float one = mine > 0 ? rules::quotient(1.0f, mine) : 0.0f;
    sum.products[0] = products[0] * factor[0] * factor[0] + gap[0] * gap[0] * one;
    sum.products[1] = products[1] * factor[1] * factor[1] + gap[1] * gap[1] * one;
    sum.products[2] = products[2] * factor[0] * factor[1] + gap[0] * gap[1] * one;
    reduce_lanes<Sum>(sum.products, 16);
    return sum;
  }
};

// The sums of five values over a warp: lanes 0, 16, 8, 24 and 4 have one each, in this order.
KDK_DEVICE float sum_five(const float (&x)[5]) {
  const int lane = thread_index() % kWarp;
  const auto fold = [&](float a, float b, int mask) {
    const bool second = lane & mask;
    return (second ? b : a) + shuffle_xor(second ? a : b, mask);
  };
  const float pair = fold(x[0], x[1], 16), other = fold(x[2], x[3], 16);
  float last = x[4] + shuffle_xor(x[4], 16);
  last += shuffle_xor(last, 8);
  float sum = fold(fold(pair, other, 8), last, 4);
  sum += shuffle_xor(sum, 2);
  return sum + shuffle_xor(sum, 1);
}

// What all threads of a block are told of a row.
struct SliceTold {
  Softmax<float> s, t;
};

// Where a row's parts meet, in shared memory.
constexpr int kHandings = 4;  // rows whose parts may be on their way between blocks
struct SliceMeeting {
  float warps[2][kSliceThreads / kWarp][12];  // of a row: sums z, aa, bb, ab, their centres and origins
  float blocks[kHandings][16][8];             // RowPart, from each block of the cluster
  SliceTold told[8];
  float of_row[8][4];                         // (3): of_q, of_p, and their sum times the mean
  float along[2];                             // (3): the sum of q times d loss / d q
};
static_assert(sizeof(SliceMeeting) <= kSliceMeeting);

// One launch over the rows of a block: who does what.
template <class T, bool kWhole, int kElements>
struct SliceWalk {
  const CorrelationProblem& problem;
  int threads, cluster, rank, begin, count;  // threads with classes; slice of this block
  int64_t first, step, rows;                 // rows of this cluster: first, first + step...
  bool exchanging;                           // this thread's warp exchanges instead
  SliceSeat<T, kWhole, kElements> seat;
  SliceMeeting& meeting;
  Barrier* barriers;  // of what the blocks hand out; then of the stages
  SliceStages<T, kWhole> stages;
  const bool& bulk;
  float k, of_warp, of_block, of_slice;      // classes of warp `lane`, of this block, of block `lane`

  KDK_DEVICE SliceWalk(const CorrelationTask& task, const CorrelationPlan& plan)
      : problem(task.problem),
        threads(thread_count() - kWarp),
        cluster(cluster_size()),
        rank(cluster_rank()),
        begin(rank * plan.slice),
        count(slice_of(rank, plan)),
        first(block_index() / cluster),
        step(block_count() / cluster),
        rows(first < problem.rows ? (problem.rows - first - 1) / step + 1 : 0),
        exchanging(thread_index() >= threads),
        seat(thread_index(), threads, count),
        meeting(*reinterpret_cast<SliceMeeting*>(shared_memory() + kBlockExchange + kBarrierBytes)),
        barriers(reinterpret_cast<Barrier*>(shared_memory() + kBlockExchange)),
        stages(problem, plan, shared_memory() + kBlockExchange + kBarrierBytes + kSliceMeeting,
               barriers + kHandings, begin, count),
        bulk(plan.bulk),
        k(float(1.0 / problem.tau) * float(kLog2E)),
        of_warp(0),
        of_block(float(count)),
        of_slice(0) {
    const int lane = thread_index() % kWarp;
    if (exchanging) {
      if (lane < threads / kWarp) of_warp = float(seat.classes_of_warp(lane));
      if (lane < cluster) of_slice = float(slice_of(lane, plan));
    }
    stages.prepare();
    if (thread_index() == 0) {
      for (int i = 0; i < kHandings; ++i) barrier_init(barriers + i);
      fence_barriers();
    }
    sync_cluster();  // also: every block of the cluster runs before one writes to its memory
  }

  KDK_DEVICE int slice_of(int rank, const CorrelationPlan& plan) const {
    const int left = int(problem.classes) - rank * plan.slice;
    return left < 0 ? 0 : left < plan.slice ? left : plan.slice;
  }
  KDK_DEVICE int64_t row(int i) const { return first + i * step; }

  // Turns: begin_row(i, stage) and end_row(i, stage) by the threads with classes; by the other warp prepare(i)
  // before a row begins, exchange(i) the turn after, and finish(i) the turn after that. `nth` is the row in the
  // order of the walk. Each side has a loop of its own, and so registers.
  template <class Nth, class Begin, class End, class Prepare, class Exchange, class Finish>
  KDK_DEVICE void turns(const Nth& nth, const Begin& begin_row, const End& end_row,
                        const Prepare& prepare, const Exchange& exchange, const Finish& finish) const {
    const bool bulk = kElements == kSliceMost || this->bulk;
    const int all = int(rows), lane = thread_index() % kWarp;
    int fetched = 0;  // stages, as those below
    if (exchanging) {
      int come = 0;
      unsigned parity = 0;  // of the row that comes
      const auto fetch = [&](int i) {
        if (i < all) {
          if (bulk) stages.fetch_bulk(nth(i), fetched, lane);
          else stages.fetch_edges(nth(i), fetched, lane);
        }
        fetched = after(fetched);
      };
      for (int i = 0; i < kCopies - 1; ++i) fetch(i);
      for (int i = -kTurnsAhead - 1; i < all; ++i) {
        fetch(i + kTurnsAhead + kCopies);
        if (i + kTurnsAhead + 1 < all) prepare(i + kTurnsAhead + 1);
        if (i + 1 >= 0 && i + 1 < all) exchange(i + 1);
        if (i >= 0) finish(i);
        if (bulk && i + kTurnsAhead + 1 < all) stages.wait_bulk(come, parity);
        come = after(come);
        if (come == 0) parity ^= 1;
        sync_block();
      }
    } else {
      int begun = 0, ended = 0;
      const auto fetch = [&](int i) {
        if (bulk) return;
        if (i < all) stages.fetch_packs(nth(i), fetched, thread_index(), threads);
        commit_copies();
        fetched = after(fetched);
      };
      for (int i = 0; i < kCopies - 1; ++i) fetch(i);
      for (int i = -kTurnsAhead - 1; i < all; ++i) {
        fetch(i + kTurnsAhead + kCopies);
        if (i + kTurnsAhead >= 0 && i + kTurnsAhead < all) {
          begin_row(i + kTurnsAhead, begun);
          begun = after(begun);
        }
        if (!bulk) wait_copies<kCopies - 1>();
        sync_block();
        if (i < 0) continue;
        end_row(i, ended);
        if (bulk) fence_bulk();  // the next copy comes to this place
        ended = after(ended);
      }
      if (!bulk) wait_copies();
    }
  }
  KDK_DEVICE static int after(int stage) { return stage == kSliceStages - 1 ? 0 : stage + 1; }

  // Hands `values` of row i, the same in the lanes that hand out, to all blocks.
  template <int N>
  KDK_DEVICE void hand_out(int i, const float (&values)[N]) const {
    static_assert(N % 4 == 0);
    const int lane = thread_index() % kWarp;
    float* const mine = meeting.blocks[i % kHandings][rank];
    if (cluster == 1) {
      KDK_UNROLL
      for (int n = 0; n < N; ++n)
        if (lane == 0) mine[n] = values[n];
      sync_warp();
      return;
    }
    Barrier* const barrier = barriers + i % kHandings;
    if (lane == 0) barrier_expect(barrier, uint32_t(cluster * N * sizeof(float)));
    if (lane < cluster) {
      KDK_UNROLL
      for (int n = 0; n < N; n += 4)
        store_remote(mine + n, {values[n], values[n + 1], values[n + 2], values[n + 3]}, barrier, lane);
    }
    sync_warp();
  }
  // Waits for those of all blocks; block `lane`'s, if there is one.
  template <int N>
  KDK_DEVICE bool receive(int i, float (&values)[N]) const {
    const int lane = thread_index() % kWarp;
    if (cluster > 1) barrier_wait_cluster(barriers + i % kHandings, unsigned(i / kHandings) % 2);
    if (lane >= cluster) return false;
    KDK_UNROLL
    for (int n = 0; n < N; ++n) values[n] = meeting.blocks[i % kHandings][lane][n];
    return true;
  }
};

}  // namespace kdkernels::cuda
