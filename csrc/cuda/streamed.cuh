// Sources that read their row again from memory (see sources.cuh).
#pragma once

#include <type_traits>

#include "packs.cuh"

namespace kdkernels::cuda {

// The row in global memory, read again by every sweep, several loads in flight; packs, or where rows
// are not aligned single classes in the order of Registers. The last sweep runs backwards, to find the
// end of the row in cache.
template <class T>
class Streamed {
 public:
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr bool kLong = true;
  static constexpr int kAhead = 2;  // packs of each side loaded at once

  KDK_DEVICE Streamed(const RowPointers<T>& at, int64_t classes, bool vector, bool valid, int rank,
                      int size)
      : at_(at), classes_(classes), vector_(vector), rank_(rank), size_(size) {
    const int64_t units = vector ? classes / kPack<T> : classes;
    const int64_t mine = units > rank ? (units - rank + size - 1) / size : 0;
    mine_ = vector ? mine : (mine + kPack<T> - 1) / kPack<T>;
    read_ = valid ? mine_ : 0;
  }

  KDK_DEVICE void exclude(int64_t target) {
    const int64_t unit = (vector_ ? target / kPack<T> : target) / size_;  // of the owner's
    excluded_ = !owns(target) ? -1 : vector_ ? unit : unit / kPack<T>;
    which_ = int((vector_ ? target : unit) % kPack<T>);
  }

  KDK_DEVICE void find_first(float (&origin)[2]) const {
    PackMaxima<T> maxima;
    if (read_ > 0) maxima.add(load(0));
    maxima.join(origin);
  }
  KDK_DEVICE void find_maxima(float (&origin)[2]) const {
    PackMaxima<T> maxima;
    each_pack([&](const PackPair<T>& pack) { maxima.add(pack); });
    maxima.join(origin);
  }

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    each_pack([&](const PackPair<T>& pack) { pack.each(f); });
  }

  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    const int64_t whole = read_ / kAhead * kAhead;
    for (int64_t i = read_ - 1; i >= whole; --i) write(i, load(i).map(f));
    for (int64_t first = whole - kAhead; first >= 0; first -= kAhead) {
      PackPair<T> packs[kAhead];
      KDK_UNROLL
      for (int a = 0; a < kAhead; ++a) packs[a] = load(first + a);
      KDK_UNROLL
      for (int a = 0; a < kAhead; ++a) write(first + a, packs[a].map(f));
    }
  }

  KDK_DEVICE void clear() const {
    for (int64_t i = 0; i < mine_; ++i) write(i, Bits16{});
  }

  KDK_DEVICE void put(int64_t target, float value) const {
    if (at_.g && owns(target)) at_.g[target] = narrow<T>(value);
  }

  KDK_DEVICE float student(int64_t c) const { return at_.student(c); }
  KDK_DEVICE float teacher(int64_t c) const { return at_.teacher(c); }

 private:
  template <class F>
  KDK_DEVICE void each_pack(const F& f) const {
    const int64_t whole = read_ / kAhead * kAhead;
    for (int64_t first = 0; first < whole; first += kAhead) {
      PackPair<T> packs[kAhead];
      KDK_UNROLL
      for (int a = 0; a < kAhead; ++a) packs[a] = load(first + a);
      KDK_UNROLL
      for (int a = 0; a < kAhead; ++a) f(packs[a]);
    }
    for (int64_t i = whole; i < read_; ++i) f(load(i));
  }
  // This thread's i-th pack.
  KDK_DEVICE int64_t begin(int64_t i) const { return (i * size_ + rank_) * kPack<T>; }
  KDK_DEVICE int64_t single(int64_t i, int k) const {
    return (i * kPack<T> + k) * size_ + rank_;
  }
  KDK_DEVICE PackPair<T> load(int64_t i) const {
    PackPair<T> pack;
    if (vector_) {
      pack = {load16(at_.s + begin(i)), load16(at_.t + begin(i))};
    } else {
      Pack<T> s, t;
      KDK_UNROLL
      for (int k = 0; k < kPack<T>; ++k) {
        const int64_t c = single(i, k);
        s.x[k] = c < classes_ ? at_.s[c] : lowest<T>();
        t.x[k] = c < classes_ ? at_.t[c] : lowest<T>();
      }
      pack = {as_bits(s), as_bits(t)};
    }
    if (i == excluded_) pack.exclude(which_);
    return pack;
  }
  KDK_DEVICE void write(int64_t i, const Bits16& g) const {
    if (!at_.g) return;
    if (vector_) return store16(at_.g + begin(i), g);
    const Pack<T> pack = as_pack<T>(g);
    KDK_UNROLL
    for (int k = 0; k < kPack<T>; ++k)
      if (single(i, k) < classes_) at_.g[single(i, k)] = pack.x[k];
  }
  KDK_DEVICE bool owns(int64_t target) const {
    return (vector_ ? target / kPack<T> : target) % size_ == rank_;
  }

  RowPointers<T> at_;
  int64_t classes_, mine_, read_, excluded_ = -1;
  int which_ = 0;
  bool vector_;
  int rank_, size_;
};

// Single classes of any strides, read again by every sweep, R the working type. T is the dtype of all
// tensors, or void where they differ.
template <class R, class T>
class General {
 public:
  static constexpr bool kHalf = false;
  static constexpr bool kLong = false;
  static constexpr int kAhead = sizeof(R) == 8 ? 1 : 4;  // classes of each side loaded at once

  KDK_DEVICE General(const RowProblem& problem, int64_t row, bool valid, int rank, int size)
      : problem_(problem),
        s_(valid ? problem.student.offset(row) : 0),
        t_(valid ? problem.teacher.offset(row) : 0),
        g_(problem.gradient.data ? problem.gradient.offset(row) : 0),
        writes_(problem.gradient.data && row < problem.rows),
        valid_(valid),
        rank_(rank),
        size_(size) {}

  KDK_DEVICE void exclude(int64_t target) { target_ = target; }

  // f(class, student, teacher), the target's logits as they are.
  template <class F>
  KDK_DEVICE void each_class(const F& f) const {
    const int64_t step = size_;
    int64_t c = rank_;
    for (; c + (kAhead - 1) * step < problem_.classes; c += kAhead * step) {
      R s[kAhead], t[kAhead];
      KDK_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        s[a] = student(c + a * step);
        t[a] = teacher(c + a * step);
      }
      KDK_UNROLL
      for (int a = 0; a < kAhead; ++a) f(c + a * step, s[a], t[a]);
    }
    for (; c < problem_.classes; c += step) f(c, student(c), teacher(c));
  }
  template <class F>
  KDK_DEVICE void each(const F& f) const {
    each_class([&](int64_t c, R s, R t) {
      if (c != target_) f(s, t);
    });
  }
  KDK_DEVICE void find_maxima(R (&origin)[2]) const {
    each([&](R s, R t) {
      origin[0] = larger(origin[0], s);
      origin[1] = larger(origin[1], t);
    });
  }
  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    each_class([&](int64_t c, R s, R t) {
      const bool excluded = c == target_;
      const R g = f(excluded ? -R(INFINITY) : s, excluded ? -R(INFINITY) : t);
      if (writes_) write(c, g);
    });
  }
  KDK_DEVICE void clear() const {
    for (int64_t c = rank_; writes_ && c < problem_.classes; c += size_) write(c, R(0));
  }
  KDK_DEVICE void put(int64_t target, R value) const {
    if (writes_ && target % size_ == rank_) write(target, value);
  }
  KDK_DEVICE R student(int64_t c) const {
    return valid_ ? load(problem_.student, s_ + c * problem_.student.class_stride) : R(0);
  }
  KDK_DEVICE R teacher(int64_t c) const {
    return valid_ ? load(problem_.teacher, t_ + c * problem_.teacher.class_stride) : R(0);
  }

 private:
  KDK_DEVICE static R load(const Rows& x, int64_t at) {
    if constexpr (std::is_void_v<T>) return load_element<R>(x, at);
    else return R(widen(static_cast<const T*>(x.data)[at]));
  }
  KDK_DEVICE void write(int64_t c, R g) const {
    const Rows& x = problem_.gradient;
    const int64_t at = g_ + c * x.class_stride;
    if constexpr (std::is_void_v<T>) store_element<R>(x, at, g);
    else static_cast<T*>(x.data)[at] = narrow<T>(g);
  }

  const RowProblem& problem_;
  int64_t s_, t_, g_, target_ = -1;
  bool writes_, valid_;
  int rank_, size_;
};

}  // namespace kdkernels::cuda
