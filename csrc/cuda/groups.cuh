// The threads that walk one row together, and their reductions.
//
// sum and max reduce N values over the group and leave the same bits in every thread, whatever the
// number of rows: the order is fixed by the group's shape. A group of more than a warp keeps its
// exchange (`kExchangeBytes`) at the beginning of the block's shared memory, in two halves used in
// turn, so that one barrier a reduction is enough: a half is written again only after the barrier of
// the reduction between, which every reader has reached.
#pragma once

#include "../rules/math.h"
#include "device.cuh"
#include "task.h"

namespace kdkernels::cuda {

constexpr int kWarp = 32;
constexpr double kLog2E = 1.4426950408889634074;  // exp(x) is 2^(x log2 e)

// The factor of exponents k x - fl(k origin). Beyond 2^30 different logits are so far apart that a smaller
// factor leaves the largest ones alone as well: a power of two, whose product with the origin is exact
// and does not overflow.
KDK_DEVICE float bounded_factor(float origin, float k) {
  const float at = fabsf(origin * k);
  return at <= 0x1p30f ? k : at <= 0x1p126f ? power_below(k) : 0x1p-64f;
}
// 2^-x for the rounding error x of such an exponent.
KDK_DEVICE float unrounded(float x) {
  const float y = x * -0.69314718f;
  const float near = 1.0f + y * (1.0f + y * (0.5f + y * (1.0f / 6.0f)));
  return fabsf(x) < 0x1p-8f ? near : power_of_two(-x);
}

// 1 / x, rounded as a division rounds it but for rare cases; x is no infinity.
KDK_DEVICE float reciprocal(float x) {
  const float near = rules::quotient(1.0f, x);
  return multiply_add(near, multiply_add(-x, near, 1.0f), near);
}

struct Sum {
  template <class R>
  static KDK_DEVICE R identity() {
    return R(0);
  }
  template <class R>
  static KDK_DEVICE R join(R a, R b) {
    return a + b;
  }
};
struct Max {  // of numbers: NaN is left to the sums, which it reaches through exp(x - max)
  template <class R>
  static KDK_DEVICE R identity() {
    return -R(INFINITY);
  }
  template <class R>
  static KDK_DEVICE R join(R a, R b) {
    return larger(a, b);
  }
};

template <class Op, int N, class R>
KDK_DEVICE void reduce_lanes(R (&x)[N], int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    KDK_UNROLL
    for (int k = 0; k < N; ++k) x[k] = Op::join(x[k], shuffle_xor(x[k], mask));
  }
}

// What the parts of a group have put down, N values each.
template <class R>
struct Slots {
  const R* at;
  int count;
};

// The sum z of 2^(k (x - from)) as one of 2^(k (x - to)); a sum of nothing has no origin.
template <class R>
KDK_DEVICE R moved(R z, R from, R to, R k) {
  return z == R(0) ? R(0) : z * power_of_two((from - to) * k);
}

// The reductions of a group, from two things that it can do: within<Op>(x) reduces over a part of it - all of
// it, a warp, a block -, and share(x) shows the parts' values to all, if there are several (kShares).
template <class Self>
struct Reduction {
  template <class Op, int N, class R>
  KDK_DEVICE void reduce(R (&x)[N]) {
    Self& self = static_cast<Self&>(*this);
    self.template within<Op>(x);
    if constexpr (Self::kShares) {
      const Slots<R> slots = self.share(x);
      KDK_UNROLL
      for (int k = 0; k < N; ++k) x[k] = Op::template identity<R>();
      KDK_UNROLL_BY(1)  // few turns: tests for more would take longer than they save
      for (int slot = thread_index() % kWarp; slot < slots.count; slot += kWarp) {
        KDK_UNROLL
        for (int k = 0; k < N; ++k) x[k] = Op::join(x[k], Self::read(slots.at + slot * N + k));
      }
      reduce_lanes<Op>(x, kWarp);
    }
  }

  // Sums of 2^(k (x - origin)) from the largest origin, from those of each thread. The group meets once.
  template <class R>
  KDK_DEVICE void reduce_exponentials(R (&origin)[2], R (&z)[2], const R (&k)[2]) {
    Self& self = static_cast<Self&>(*this);
    self.within_exponentials(origin, z, k);
    const R part[4] = {origin[0], origin[1], z[0], z[1]};
    const Slots<R> slots = self.share(part);
    const int lane = thread_index() % kWarp;
    origin[0] = origin[1] = Max::identity<R>();
    KDK_UNROLL_BY(1)
    for (int slot = lane; slot < slots.count; slot += kWarp) {
      KDK_UNROLL
      for (int i = 0; i < 2; ++i)
        origin[i] = Max::join(origin[i], Self::read(slots.at + slot * 4 + i));
    }
    reduce_lanes<Max>(origin, kWarp);
    z[0] = z[1] = R(0);
    KDK_UNROLL_BY(1)
    for (int slot = lane; slot < slots.count; slot += kWarp) {
      KDK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const R* const at = slots.at + slot * 4 + i;
        z[i] += moved(Self::read(at + 2), Self::read(at), origin[i], k[i]);
      }
    }
    reduce_lanes<Sum>(z, kWarp);
  }
  template <class R>
  KDK_DEVICE void within_exponentials(R (&origin)[2], R (&z)[2], const R (&k)[2]) {
    Self& self = static_cast<Self&>(*this);
    R most[2] = {origin[0], origin[1]};
    self.template within<Max>(most);
    KDK_UNROLL
    for (int i = 0; i < 2; ++i) {
      z[i] = moved(z[i], origin[i], most[i], k[i]);
      origin[i] = most[i];
    }
    self.template within<Sum>(z);
  }

  template <class R>
  KDK_DEVICE static R read(const R* slot) {
    return *slot;
  }
};

// One thread a row: neighbouring threads take neighbouring rows.
struct Alone : Reduction<Alone> {
  static constexpr bool kShares = false;
  KDK_DEVICE int rank() const { return 0; }
  KDK_DEVICE int size() const { return 1; }
  template <class Op, int N, class R>
  KDK_DEVICE void within(R (&)[N]) {}
};

// kLanes consecutive lanes of a warp.
template <int kLanes>
struct Lanes : Reduction<Lanes<kLanes>> {
  static constexpr bool kShares = false;
  KDK_DEVICE int rank() const { return thread_index() % kLanes; }
  KDK_DEVICE int size() const { return kLanes; }
  template <class Op, int N, class R>
  KDK_DEVICE void within(R (&x)[N]) {
    KDK_UNROLL
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      KDK_UNROLL
      for (int k = 0; k < N; ++k) x[k] = Op::join(x[k], shuffle_xor(x[k], mask));
    }
  }
};

template <int kBytes>
class Exchange {
 public:
  template <class R>
  KDK_DEVICE R* next() {
    char* const half = shared_memory() + (turn_ ? kBytes / 2 : 0);
    turn_ = !turn_;
    return reinterpret_cast<R*>(half);
  }

 private:
  bool turn_ = false;
};

// All threads of a block.
struct Block : Reduction<Block> {
  static constexpr bool kShares = true;
  static constexpr int kExchangeBytes = kBlockExchange;
  Exchange<kExchangeBytes> exchange;
  KDK_DEVICE int rank() const { return thread_index(); }
  KDK_DEVICE int size() const { return thread_count(); }
  template <class Op, int N, class R>
  KDK_DEVICE void within(R (&x)[N]) {
    reduce_lanes<Op>(x, kWarp);
  }
  template <int N, class R>
  KDK_DEVICE Slots<R> share(const R (&x)[N]) {
    R* const slots = exchange.template next<R>();
    if (thread_index() % kWarp == 0) {
      KDK_UNROLL
      for (int k = 0; k < N; ++k) slots[thread_index() / kWarp * N + k] = x[k];
    }
    sync_block();
    return {slots, thread_count() / kWarp};
  }
};

// All threads of a cluster: each warp puts its value into every block's exchange. The cluster must
// have synchronised once before the first reduction.
struct Cluster : Reduction<Cluster> {
  static constexpr bool kShares = true;
  static constexpr int kExchangeBytes = kClusterExchange;
  Exchange<kExchangeBytes> exchange;
  KDK_DEVICE int rank() const { return cluster_rank() * thread_count() + thread_index(); }
  KDK_DEVICE int size() const { return cluster_size() * thread_count(); }
  template <class Op, int N, class R>
  KDK_DEVICE void within(R (&x)[N]) {
    reduce_lanes<Op>(x, kWarp);
  }
  template <int N, class R>
  KDK_DEVICE Slots<R> share(const R (&x)[N]) {
    R* const slots = exchange.template next<R>();
    const int warps = thread_count() / kWarp, lane = thread_index() % kWarp;
    if (lane < cluster_size()) {
      R* const there = cluster_shared(slots, lane);
      const int slot = cluster_rank() * warps + thread_index() / kWarp;
      KDK_UNROLL
      for (int k = 0; k < N; ++k) there[slot * N + k] = x[k];
    }
    sync_cluster();
    return {slots, cluster_size() * warps};
  }
};

// `blocks` consecutive blocks of a cooperative grid, of which all teams reduce equally often. Each
// reduction has its own place in global memory.
struct Team : Reduction<Team> {
  static constexpr bool kShares = true;
  static constexpr int kExchangeBytes = Block::kExchangeBytes;
  Block block;
  char* exchange;  // room for kTeamReductions x kMostValues x 8 bytes for each block of the grid
  int blocks;
  int phase = 0;

  KDK_DEVICE Team(char* exchange, int blocks) : exchange(exchange), blocks(blocks) {}
  KDK_DEVICE int first() const { return block_index() / blocks * blocks; }
  KDK_DEVICE int rank() const {
    return (block_index() - first()) * thread_count() + thread_index();
  }
  KDK_DEVICE int size() const { return blocks * thread_count(); }
  template <class Op, int N, class R>
  KDK_DEVICE void within(R (&x)[N]) {
    block.reduce<Op>(x);
  }
  template <class R>
  KDK_DEVICE void within_exponentials(R (&origin)[2], R (&z)[2], const R (&k)[2]) {
    block.reduce_exponentials(origin, z, k);
  }
  template <int N, class R>
  KDK_DEVICE Slots<R> share(const R (&x)[N]) {
    R* const slots = reinterpret_cast<R*>(exchange) +
                     int64_t(phase++) * kMostValues * block_count() + int64_t(first()) * N;
    if (thread_index() == 0) {
      KDK_UNROLL
      for (int k = 0; k < N; ++k) slots[(block_index() - first()) * N + k] = x[k];
    }
    sync_grid();
    return {slots, blocks};
  }
  template <class R>
  KDK_DEVICE static R read(const R* slot) {
    return load_fresh(slot);
  }
};

}  // namespace kdkernels::cuda
