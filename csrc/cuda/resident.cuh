// Sources whose row stays on chip (see sources.cuh).
#pragma once

#include "packs.cuh"

namespace kdkernels::cuda {

// kElements a thread in registers: the row is read once. `vector`: every row begins at a multiple of
// 16 bytes and holds whole packs; then a thread takes packs, else single classes, in turn.
template <class T, int kElements>
class Registers {
 public:
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr bool kLong = false;
  static constexpr int kPacks = kElements / kPack<T>;

  KDK_DEVICE Registers(const RowPointers<T>& at, int classes, bool vector, bool valid, int rank,
                       int size)
      : at_(at), classes_(classes), vector_(vector), rank_(rank), size_(size) {
    KDK_UNROLL
    for (int i = 0; i < kPacks; ++i) {
      packs_[i] = {filled<T>(narrow<T>(0.0f)), filled<T>(narrow<T>(0.0f))};
      if (!valid) continue;
      if (vector) {
        const int c = index(i * kPack<T>);
        packs_[i] = {filled<T>(lowest<T>()), filled<T>(lowest<T>())};
        if (c < classes) packs_[i] = {load16(at.s + c), load16(at.t + c)};
      } else {
        Pack<T> s, t;
        KDK_UNROLL
        for (int k = 0; k < kPack<T>; ++k) {
          const int c = index(i * kPack<T> + k);
          s.x[k] = c < classes ? at.s[c] : lowest<T>();
          t.x[k] = c < classes ? at.t[c] : lowest<T>();
        }
        packs_[i] = {as_bits(s), as_bits(t)};
      }
    }
  }

  KDK_DEVICE void exclude(int64_t target) {
    // Element `which` of the thread's own, wherever it is; no branch, no indexed register.
    const int64_t which = !owns(target) ? -1
                          : vector_     ? target / kPack<T> / size_ * kPack<T> + target % kPack<T>
                                        : target / size_;
    KDK_UNROLL
    for (int i = 0; i < kPacks; ++i) packs_[i].exclude(which - i * kPack<T>);
  }

  KDK_DEVICE void find_maxima(float (&origin)[2]) const {
    PackMaxima<T> maxima;
    KDK_UNROLL
    for (int i = 0; i < kPacks; ++i) maxima.add(packs_[i]);
    maxima.join(origin);
  }

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    KDK_UNROLL
    for (int i = 0; i < kPacks; ++i) packs_[i].each(f);
  }

  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    KDK_UNROLL
    for (int i = 0; i < kPacks; ++i) {
      const Bits16 g = packs_[i].map(f);
      if (!at_.g) continue;
      if (vector_) {
        const int c = index(i * kPack<T>);
        if (c < classes_) store16(at_.g + c, g);
      } else {
        const Pack<T> single = as_pack<T>(g);
        KDK_UNROLL
        for (int k = 0; k < kPack<T>; ++k) {
          const int c = index(i * kPack<T> + k);
          if (c < classes_) at_.g[c] = single.x[k];
        }
      }
    }
  }

  KDK_DEVICE void clear() const {
    emit([](float, float) { return 0.0f; });
  }

  KDK_DEVICE void put(int64_t target, float value) const {
    if (at_.g && owns(target)) at_.g[target] = narrow<T>(value);
  }

  KDK_DEVICE float student(int64_t c) const { return at_.student(c); }
  KDK_DEVICE float teacher(int64_t c) const { return at_.teacher(c); }

  // The class of element j; and its place where lanes are to lie next to each other.
  KDK_DEVICE int index(int j) const {
    return vector_ ? (j / kPack<T> * size_ + rank_) * kPack<T> + j % kPack<T> : j * size_ + rank_;
  }
  KDK_DEVICE int place(int j) const {
    const int unit = j / kPack<T> * size_ + rank_;
    return vector_ ? j % kPack<T> * (classes_ / kPack<T>) + unit : j * size_ + rank_;
  }

 private:
  KDK_DEVICE bool owns(int64_t target) const {
    return (vector_ ? target / kPack<T> : target) % size_ == rank_;
  }

  RowPointers<T> at_;
  PackPair<T> packs_[kPacks];
  int classes_;
  bool vector_;
  int rank_, size_;
};

// A slice of the row's whole packs in this block's shared memory, `begin` classes into them. The threads of
// the block share it; `rank` and `size` are theirs. The classes before and after the whole packs are the
// first block's, one a thread, in registers; they are read long before they are used. The last sweep goes by
// parts, of `part` classes, a multiple of what the threads take at once, and hands each to `refill` when the
// block is about to leave it: all parts of a slice, because the next row may have more whole packs.
template <class T, class Refill>
class Shared {
 public:
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr bool kLong = true;

  KDK_DEVICE Shared(const RowPointers<T>& at, T* s, T* t, const Extent<T>& row, int begin,
                    const int& slice, const int& part, bool valid, int rank, int size, Refill& refill)
      : at_(at),
        s_(s),
        t_(t),
        slice_(slice),
        part_(part),
        classes_(row.count),
        begin_(row.head + begin),
        read_(valid ? row.within(begin, begin + slice) : 0),
        edge_(valid && begin == 0 ? row.edge(rank) : -1),
        rank_(rank),
        size_(size),
        refill_(refill) {
    if (edge_ < 0) return;
    edge_s_ = at.s[edge_];
    edge_t_ = at.t[edge_];
  }

  // By the thread that reads the class: nobody else may still see the old value.
  KDK_DEVICE void exclude(int64_t target) {
    const int at = int(target) - begin_;
    if (at >= 0 && at < read_ && at / kPack<T> % size_ == rank_) {
      s_[at] = t_[at] = lowest<T>();
      excluded_ = begin_ + at;
    } else if (edge_ == target) {
      excluded_ = edge_;
      edge_ = -1;
    }
  }

  KDK_DEVICE void find_first(float (&origin)[2]) const {
    PackMaxima<T> maxima;
    const int once = size_ * kPack<T>;
    each_pack(0, once < read_ ? once : read_, [&](int, const PackPair<T>& p) { maxima.add(p); });
    maxima.join(origin);
  }
  KDK_DEVICE void find_maxima(float (&origin)[2]) const {
    PackMaxima<T> maxima;
    each_pack(0, read_, [&](int, const PackPair<T>& pack) { maxima.add(pack); });
    maxima.join(origin);
    if (edge_ < 0) return;
    origin[0] = larger(origin[0], widen(edge_s_));
    origin[1] = larger(origin[1], widen(edge_t_));
  }

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    each_pack(0, read_, [&](int, const PackPair<T>& pack) { pack.each(f); });
    if (edge_ >= 0) f(widen(edge_s_), widen(edge_t_));
  }

  // A loop without a gradient is one of its own: a test for each pack would cost as much as half a class.
  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    if (edge_ >= 0) {
      const float g = f(widen(edge_s_), widen(edge_t_));
      if (at_.g) at_.g[edge_] = narrow<T>(g);
    }
    for (int begin = 0; begin < slice_; begin += part_) {
      const int end = begin + part_ < read_ ? begin + part_ : read_;
      if (at_.g) {
        each_pack(begin, end, [&](int i, const PackPair<T>& pack) {
          store16(at_.g + begin_ + i, pack.map(f));
        });
      } else {
        each_pack(begin, end, [&](int, const PackPair<T>& pack) { pack.each(f); });
      }
      refill_(begin);
    }
  }

  KDK_DEVICE void clear() const {
    if (at_.g) {
      const Extent<T> row(Extent<T>::beside(at_.g), classes_);  // the gradient lies as the logits do
      const int begin = begin_ - row.head, count = row.within(begin, begin + slice_);
      for (int i = rank_ * kPack<T>; i < count; i += size_ * kPack<T>)
        store16(at_.g + begin_ + i, Bits16{});
      if (begin == 0 && row.edge(rank_) >= 0) at_.g[row.edge(rank_)] = narrow<T>(0.0f);
    }
    for (int begin = 0; begin < slice_; begin += part_) refill_(begin);
  }

  KDK_DEVICE void put(int64_t, float value) const {
    if (at_.g && excluded_ >= 0) at_.g[excluded_] = narrow<T>(value);
  }

  KDK_DEVICE float student(int64_t c) const { return at_.student(c); }
  KDK_DEVICE float teacher(int64_t c) const { return at_.teacher(c); }

 private:
  template <class F>
  KDK_DEVICE void each_pack(int begin, int end, const F& f) const {
    KDK_UNROLL_BY(2)
    for (int i = begin + rank_ * kPack<T>; i < end; i += size_ * kPack<T>)
      f(i, PackPair<T>{load16_shared(s_ + i), load16_shared(t_ + i)});
  }

  RowPointers<T> at_;
  T *s_, *t_;
  const int &slice_, &part_;
  int classes_, begin_, read_;
  int edge_;  // the thread's class outside of the packs; -1 where there is none, or it is excluded
  T edge_s_, edge_t_;
  int excluded_ = -1;  // the target, in the thread that has it
  int rank_, size_;
  Refill& refill_;
};

}  // namespace kdkernels::cuda
