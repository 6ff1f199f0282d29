// A row that one block or the blocks of a cluster share, a slice of its classes each: which classes a thread
// has, how slices come into shared memory, and how the parts of a row become one.
#pragma once

#include "correlation.h"
#include "groups.cuh"
#include "packs.cuh"

namespace kdkernels::cuda {

constexpr int kSliceStep = 8;  // of a thread's classes, in registers at once
using SliceLogits = const float (&)[kSliceStep];

// The classes of a thread: runs of packs where `kWhole` (every row is whole packs), else single ones.
template <class T, bool kWhole, int kElements>
struct SliceSeat {
  static constexpr int kRun = kWhole ? kPack<T> : 1, kRuns = kElements / kRun;
  int thread, threads, count;  // threads that have classes, classes of the block

  KDK_DEVICE SliceSeat(int thread, int threads, int count)
      : thread(thread), threads(threads), count(count) {}
  KDK_DEVICE int at(int run) const { return (thread + run * threads) * kRun; }
  // The plan gives every thread its first classes.
  KDK_DEVICE bool inside(int run) const { return run * kRun < kSliceStep || at(run) < count; }
  KDK_DEVICE int classes_of_warp(int warp) const {
    int all = 0;
    for (int run = 0; run < kRuns; ++run) {
      const int left = count / kRun - warp * kWarp - run * threads;
      all += left < 0 ? 0 : left < kWarp ? left : kWarp;
    }
    return all * kRun;
  }

  // f(first element, q, p): the logits of some of this thread's classes at a time, -inf where there are none.
  template <class F>
  KDK_DEVICE void each(const T* s, const T* t, const F& f) const {
    KDK_UNROLL
    for (int j = 0; j < kElements; j += kSliceStep) {
      if constexpr (kElements > kSliceElements) sync_warp();  // what is read later takes no registers yet
      float q[kSliceStep], p[kSliceStep];
      KDK_UNROLL
      for (int k = 0; k < kSliceStep; k += kRun) {
        const int place = at((j + k) / kRun);
        if constexpr (kWhole) {
          const Bits16 a = load16_shared(s + place), b = load16_shared(t + place);
          KDK_UNROLL
          for (int i = 0; i < kRun; ++i) {
            q[k + i] = element<T>(a, i);
            p[k + i] = element<T>(b, i);
          }
        } else {
          q[k] = widen(s[place]);
          p[k] = widen(t[place]);
        }
      }
      f(j, q, p);
    }
  }
  // The largest logits of this thread.
  KDK_DEVICE void find_maxima(const T* s, const T* t, float (&most)[2]) const {
    most[0] = most[1] = -INFINITY;
    if constexpr (kWhole) {
      PackMaxima<T> maxima{{load16_shared(s + at(0)), load16_shared(t + at(0))}};
      KDK_UNROLL
      for (int run = 1; run < kRuns; ++run) {
        if constexpr (kElements > kSliceElements) sync_warp();  // as in each()
        maxima.add({load16_shared(s + at(run)), load16_shared(t + at(run))});
      }
      maxima.join(most);
    } else {
      each(s, t, [&](int, SliceLogits q, SliceLogits p) {
        KDK_UNROLL
        for (int k = 0; k < kSliceStep; ++k) {
          most[0] = larger(q[k], most[0]);
          most[1] = larger(p[k], most[1]);
        }
      });
    }
  }
  // Writes the elements from j on.
  KDK_DEVICE void write(T* to, int j, SliceLogits g) const {
    KDK_UNROLL
    for (int k = 0; k < kSliceStep; k += kRun) {
      const int place = at((j + k) / kRun);
      if (!inside((j + k) / kRun)) continue;
      if constexpr (kWhole) {
        Pack<T> pack;
        KDK_UNROLL
        for (int i = 0; i < kRun; ++i) pack.x[i] = narrow<T>(g[k + i]);
        store16(to + place, as_bits(pack));
      } else {
        to[place] = narrow<T>(g[k]);
      }
    }
  }
};

// Slices of rows in shared memory, in kSliceStages places, followed by -inf in place of what threads have no
// classes for. Whole packs lie at the beginning of a side, others by multiples of 16 bytes from where they
// lie in memory.
template <class T, bool kWhole>
class SliceStages {
 public:
  KDK_DEVICE SliceStages(const CorrelationProblem& problem, const CorrelationPlan& plan, char* memory,
                         Barrier* barriers, int begin, int count)
      : problem_(problem),
        memory_(memory),
        barriers_(barriers),
        begin_(begin),
        count_(count),
        side_(plan.tile),
        all_((thread_count() - kWarp) * plan.elements) {}

  // By all threads, before they meet for the first time.
  KDK_DEVICE void prepare() const {
    if (thread_index() == 0) {
      for (int i = 0; i < kSliceStages; ++i) barrier_init(barriers_ + i);
    }
    if constexpr (kWhole) {
      for (int side = 0; side < 2 * kSliceStages; ++side)
        for (int i = count_ + thread_index(); i < all_; i += thread_count())
          reinterpret_cast<T*>(memory_ + side * side_)[i] = lowest<T>();
    }
  }

  KDK_DEVICE const T* student(int64_t row, int stage) const {
    return place(problem_.student, row, stage, 0);
  }
  KDK_DEVICE const T* teacher(int64_t row, int stage) const {
    return place(problem_.teacher, row, stage, 1);
  }

  // Starts to copy a slice, by a warp and bulk copies, after the block has met since it read the place's last
  // row. Other threads see it after the warp has waited and the block has met.
  KDK_DEVICE void fetch_bulk(int64_t row, int stage, int lane) const {
    fetch_edges(row, stage, lane);
    if (lane != 0) return;
    const Extent<T> s = extent(from(problem_.student, row)), t = extent(from(problem_.teacher, row));
    Barrier* const barrier = barriers_ + stage;
    barrier_expect(barrier, uint32_t(s.packed + t.packed) * sizeof(T));
    bulk_load(place(problem_.student, row, stage, 0) + s.head, from(problem_.student, row) + s.head,
              uint32_t(s.packed) * sizeof(T), barrier);
    bulk_load(place(problem_.teacher, row, stage, 1) + t.head, from(problem_.teacher, row) + t.head,
              uint32_t(t.packed) * sizeof(T), barrier);
  }
  KDK_DEVICE void wait_bulk(int stage, unsigned parity) const { barrier_wait(barriers_ + stage, parity); }

  // Likewise, by each thread's own copies of whole packs; and what lies around them, by a warp.
  KDK_DEVICE void fetch_packs(int64_t row, int stage, int thread, int threads) const {
    fetch_side(problem_.student, row, stage, 0, thread, threads);
    fetch_side(problem_.teacher, row, stage, 1, thread, threads);
  }
  KDK_DEVICE void fetch_edges(int64_t row, int stage, int lane) const {
    if constexpr (kWhole) return;
    const int side = lane / 16;
    const Rows& x = side ? problem_.teacher : problem_.student;
    const int at = extent(from(x, row)).edge(lane % 16);
    if (at >= 0) place(x, row, stage, side)[at] = from(x, row)[at];
    T* const s = place(problem_.student, row, stage, 0);
    T* const t = place(problem_.teacher, row, stage, 1);
    for (int i = count_ + lane; i < all_; i += kWarp) s[i] = t[i] = lowest<T>();
    fence_bulk();  // later copies may write where these elements are
    sync_warp();
  }

 private:
  KDK_DEVICE static int beside(const T* from) {  // bytes
    return kWhole ? 0 : Extent<T>::beside(from);
  }
  KDK_DEVICE Extent<T> extent(const T* from) const { return Extent<T>(beside(from), count_); }
  KDK_DEVICE const T* from(const Rows& x, int64_t row) const {
    return static_cast<const T*>(x.data) + row * x.stride[0] + begin_;
  }
  KDK_DEVICE T* place(const Rows& x, int64_t row, int stage, int side) const {
    return reinterpret_cast<T*>(memory_ + (2 * stage + side) * side_ + beside(from(x, row)));
  }
  KDK_DEVICE void fetch_side(const Rows& x, int64_t row, int stage, int side, int thread,
                             int threads) const {
    const T* const source = from(x, row);
    const Extent<T> e = extent(source);
    T* const to = place(x, row, stage, side) + e.head;
    for (int i = thread * kPack<T>; i < e.packed; i += threads * kPack<T>)
      copy16_async(to + i, source + e.head + i);
  }

  const CorrelationProblem& problem_;
  char* memory_;
  Barrier* barriers_;
  int begin_, count_, side_, all_;
};

}  // namespace kdkernels::cuda
