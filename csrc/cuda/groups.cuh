// The threads that walk one row together, and their reductions.
//
// sum and max reduce N values over the group and leave the same bits in every thread, whatever the
// number of rows: the order is fixed by the group's shape. A group of more than a warp keeps its
// exchange (`kExchangeBytes`) at the beginning of the block's shared memory, in two halves used in
// turn, so that one barrier a reduction is enough: a half is written again only after the barrier of
// the reduction between, which every reader has reached.
#pragma once

#include "device.cuh"
#include "task.h"

namespace kdkernels::cuda {

constexpr int kWarp = 32;
constexpr double kLog2E = 1.4426950408889634074;  // exp(x) is 2^(x log2 e)

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

// One thread a row: neighbouring threads take neighbouring rows.
struct Alone {
  KDK_DEVICE int rank() const { return 0; }
  KDK_DEVICE int size() const { return 1; }
  template <class Op, int N, class R>
  KDK_DEVICE void reduce(R (&)[N]) {}
};

// kLanes consecutive lanes of a warp.
template <int kLanes>
struct Lanes {
  KDK_DEVICE int rank() const { return thread_index() % kLanes; }
  KDK_DEVICE int size() const { return kLanes; }
  template <class Op, int N, class R>
  KDK_DEVICE void reduce(R (&x)[N]) {
    KDK_UNROLL
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      KDK_UNROLL
      for (int k = 0; k < N; ++k) x[k] = Op::join(x[k], shuffle_xor(x[k], mask));
    }
  }
};

// Joins the slots' values, which lie N apart, in every warp.
template <class Op, int N, class R>
KDK_DEVICE void join_slots(const R* slots, int count, R (&x)[N]) {
  KDK_UNROLL
  for (int k = 0; k < N; ++k) x[k] = Op::template identity<R>();
  for (int slot = thread_index() % kWarp; slot < count; slot += kWarp) {
    KDK_UNROLL
    for (int k = 0; k < N; ++k) x[k] = Op::join(x[k], slots[slot * N + k]);
  }
  reduce_lanes<Op>(x, kWarp);
}

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
struct Block {
  static constexpr int kExchangeBytes = kBlockExchange;
  Exchange<kExchangeBytes> exchange;
  KDK_DEVICE int rank() const { return thread_index(); }
  KDK_DEVICE int size() const { return thread_count(); }
  template <class Op, int N, class R>
  KDK_DEVICE void reduce(R (&x)[N]) {
    reduce_lanes<Op>(x, kWarp);
    R* const slots = exchange.template next<R>();
    if (thread_index() % kWarp == 0) {
      KDK_UNROLL
      for (int k = 0; k < N; ++k) slots[thread_index() / kWarp * N + k] = x[k];
    }
    sync_block();
    join_slots<Op>(slots, thread_count() / kWarp, x);
  }
};

// All threads of a cluster: each warp puts its value into every block's exchange. The cluster must
// have synchronised once before the first reduction.
struct Cluster {
  static constexpr int kExchangeBytes = kClusterExchange;
  Exchange<kExchangeBytes> exchange;
  KDK_DEVICE int rank() const { return cluster_rank() * thread_count() + thread_index(); }
  KDK_DEVICE int size() const { return cluster_size() * thread_count(); }
  template <class Op, int N, class R>
  KDK_DEVICE void reduce(R (&x)[N]) {
    reduce_lanes<Op>(x, kWarp);
    R* const slots = exchange.template next<R>();
    const int warps = thread_count() / kWarp, lane = thread_index() % kWarp;
    if (lane < cluster_size()) {
      R* const there = cluster_shared(slots, lane);
      const int slot = cluster_rank() * warps + thread_index() / kWarp;
      KDK_UNROLL
      for (int k = 0; k < N; ++k) there[slot * N + k] = x[k];
    }
    sync_cluster();
    join_slots<Op>(slots, cluster_size() * warps, x);
  }
};

// `blocks` consecutive blocks of a cooperative grid, of which all teams reduce equally often. Each
// reduction has its own place in global memory.
struct Team {
  static constexpr int kExchangeBytes = Block::kExchangeBytes;
  Block block;
  char* exchange;  // room for kTeamReductions x kMostValues x 8 bytes for each block of the grid
  int blocks;
  int phase = 0;

  KDK_DEVICE int first() const { return block_index() / blocks * blocks; }
  KDK_DEVICE int rank() const {
    return (block_index() - first()) * thread_count() + thread_index();
  }
  KDK_DEVICE int size() const { return blocks * thread_count(); }
  template <class Op, int N, class R>
  KDK_DEVICE void reduce(R (&x)[N]) {
    block.reduce<Op>(x);
    R* const slots = reinterpret_cast<R*>(exchange) +
                     int64_t(phase++) * kMostValues * block_count() + int64_t(first()) * N;
    if (thread_index() == 0) {
      KDK_UNROLL
      for (int k = 0; k < N; ++k) slots[(block_index() - first()) * N + k] = x[k];
    }
    sync_grid();
    KDK_UNROLL
    for (int k = 0; k < N; ++k) x[k] = Op::template identity<R>();
    for (int slot = thread_index() % kWarp; slot < blocks; slot += kWarp) {
      KDK_UNROLL
      for (int k = 0; k < N; ++k) x[k] = Op::join(x[k], load_fresh(slots + slot * N + k));
    }
    reduce_lanes<Op>(x, kWarp);
  }
};
}  // namespace kdkernels::cuda
