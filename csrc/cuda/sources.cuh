// Where a thread finds its part of a row, and where its part of the gradient goes.
//
// find_maxima(origin): extends the maxima of student and teacher by this thread's classes.
// each(f): calls f(student, teacher) for every class of this thread.
// emit(f): likewise, and writes what f returns as the gradient, where one is wanted.
// clear(): writes zeros as the gradient, for a row that is not valid. Such a row is never loaded.
// exclude(target): the target's logits count as -inf from here on (on-chip copies are overwritten).
// put(target, g): the thread that owns the target writes its gradient.
//
// A class past the end of the row reads as -inf on both sides, which no sum notices.
#pragma once

#include <cstring>

#include "../problem.h"
#include "device.cuh"

namespace kdkernels::cuda {

template <class T>
constexpr int kPack = 16 / int(sizeof(T));  // elements in 16 bytes

template <class T>
struct alignas(16) Pack {
  T x[kPack<T>];
};
template <class T>
KDK_DEVICE Pack<T> as_pack(const Bits16& bits) {
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}
template <class T>
KDK_DEVICE Bits16 as_bits(const Pack<T>& pack) {
  Bits16 bits;
  memcpy(&bits, &pack, sizeof bits);
  return bits;
}
template <class T>
KDK_DEVICE T lowest() {
  return narrow<T>(-INFINITY);
}
template <class T>
KDK_DEVICE Bits16 filled(T x) {
  Pack<T> pack;
  KDK_UNROLL
  for (int k = 0; k < kPack<T>; ++k) pack.x[k] = x;
  return as_bits(pack);
}
template <class T>
KDK_DEVICE void exclude_element(Bits16& bits, int64_t which) {
  Pack<T> pack = as_pack<T>(bits);
  KDK_UNROLL
  for (int k = 0; k < kPack<T>; ++k)
    if (k == which) pack.x[k] = lowest<T>();
  bits = as_bits(pack);
}

// 16 bytes of each side; what the sources with packs do with them.
template <class T>
struct PackPair {
  Bits16 s, t;

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    KDK_UNROLL
    for (int k = 0; k < kPack<T>; ++k) f(element<T>(s, k), element<T>(t, k));
  }
  template <class F>
  KDK_DEVICE Bits16 map(const F& f) const {
    Pack<T> g;
    KDK_UNROLL
    for (int k = 0; k < kPack<T>; ++k) g.x[k] = narrow<T>(f(element<T>(s, k), element<T>(t, k)));
    return as_bits(g);
  }
  KDK_DEVICE void exclude(int64_t which) {
    exclude_element<T>(s, which);
    exclude_element<T>(t, which);
  }
};

// Maxima of packs, kept packed: two elements an instruction where T has 2 bytes.
template <class T>
struct PackMaxima {
  PackPair<T> most{filled<T>(lowest<T>()), filled<T>(lowest<T>())};

  KDK_DEVICE void add(const PackPair<T>& pack) {
    most.s = larger<T>(most.s, pack.s);
    most.t = larger<T>(most.t, pack.t);
  }
  KDK_DEVICE void join(float (&origin)[2]) const {
    most.each([&](float s, float t) {
      origin[0] = larger(origin[0], s);
      origin[1] = larger(origin[1], t);
    });
  }
};

// Row `row` of a pair whose classes are adjacent, T on both sides.
template <class T>
struct RowPointers {
  const T *s, *t;
  T* g;  // null where no gradient is wanted

  template <class Problem>
  KDK_DEVICE RowPointers(const Problem& problem, int64_t row)
      : s(static_cast<const T*>(problem.student.data) + problem.student.offset(row)),
        t(static_cast<const T*>(problem.teacher.data) + problem.teacher.offset(row)),
        g(problem.gradient.data && row < problem.rows
              ? static_cast<T*>(problem.gradient.data) + problem.gradient.offset(row)
              : nullptr) {}

  KDK_DEVICE float student(int64_t c) const { return widen(s[c]); }
  KDK_DEVICE float teacher(int64_t c) const { return widen(t[c]); }
};

// kElements a thread in registers: the row is read once. `vector`: every row begins at a multiple of
// 16 bytes and holds whole packs; then a thread takes packs, else single classes, in turn.
template <class T, int kElements>
class Registers {
 public:
  static constexpr bool kHalf = sizeof(T) == 2;
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

// A slice of the row in this block's shared memory, `begin` classes into the row; whole packs. The
// threads of the block share it; `rank` and `size` are theirs.
template <class T>
class Shared {
 public:
  static constexpr bool kHalf = sizeof(T) == 2;

  KDK_DEVICE Shared(const RowPointers<T>& at, T* s, T* t, int64_t begin, int count, bool valid,
                    int rank, int size)
      : at_(at),
        s_(s),
        t_(t),
        begin_(begin),
        count_(count),
        valid_(valid),
        rank_(rank),
        size_(size) {}

  // By the thread that reads the class: nobody else may still see the old value.
  KDK_DEVICE void exclude(int64_t target) {
    if (owns(target)) s_[target - begin_] = t_[target - begin_] = lowest<T>();
  }

  KDK_DEVICE void find_maxima(float (&origin)[2]) const {
    PackMaxima<T> maxima;
    each_pack([&](int, const PackPair<T>& pack) { maxima.add(pack); });
    maxima.join(origin);
  }

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    each_pack([&](int, const PackPair<T>& pack) { pack.each(f); });
  }

  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    each_pack([&](int i, const PackPair<T>& pack) {
      const Bits16 g = pack.map(f);
      if (at_.g) store16(at_.g + begin_ + i, g);
    });
  }

  KDK_DEVICE void clear() const {
    for (int i = rank_ * kPack<T>; at_.g && i < count_; i += size_ * kPack<T>)
      store16(at_.g + begin_ + i, Bits16{});
  }

  KDK_DEVICE void put(int64_t target, float value) const {
    if (at_.g && owns(target)) at_.g[target] = narrow<T>(value);
  }

  KDK_DEVICE float student(int64_t c) const { return at_.student(c); }
  KDK_DEVICE float teacher(int64_t c) const { return at_.teacher(c); }

 private:
  template <class F>
  KDK_DEVICE void each_pack(const F& f) const {
    for (int i = rank_ * kPack<T>; valid_ && i < count_; i += size_ * kPack<T>)
      f(i, PackPair<T>{load16_shared(s_ + i), load16_shared(t_ + i)});
  }
  KDK_DEVICE bool owns(int64_t target) const {
    const int64_t at = target - begin_;
    return at >= 0 && at < count_ && at / kPack<T> % size_ == rank_;
  }

  RowPointers<T> at_;
  T *s_, *t_;
  int64_t begin_;
  int count_;
  bool valid_;
  int rank_, size_;
};

// The row in global memory, read again by every sweep, several loads in flight; packs, or where rows
// are not aligned single classes in the order of Registers. The last sweep runs backwards, to find the
// end of the row in cache.
template <class T>
class Streamed {
 public:
  static constexpr bool kHalf = sizeof(T) == 2;
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

// An element of any dtype as R.
template <class R>
KDK_DEVICE R load_element(const Rows& x, int64_t at) {
  switch (x.type) {
    case Scalar::f64: return R(static_cast<const double*>(x.data)[at]);
    case Scalar::f32: return R(static_cast<const float*>(x.data)[at]);
    case Scalar::f16: return R(widen(static_cast<const f16*>(x.data)[at]));
    default: return R(widen(static_cast<const bf16*>(x.data)[at]));
  }
}
template <class R>
KDK_DEVICE void store_element(const Rows& x, int64_t at, R value) {
  switch (x.type) {
    case Scalar::f64: static_cast<double*>(x.data)[at] = double(value); break;
    case Scalar::f32: static_cast<float*>(x.data)[at] = float(value); break;
    case Scalar::f16: static_cast<f16*>(x.data)[at] = narrow<f16>(float(value)); break;
    default: static_cast<bf16*>(x.data)[at] = narrow<bf16>(float(value)); break;
  }
}

// Any dtypes and strides, R the working type: single classes, read again by every sweep.
template <class R>
class General {
 public:
  static constexpr bool kHalf = false;

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
    for (int64_t c = rank_; c < problem_.classes; c += size_) f(c, student(c), teacher(c));
  }
  KDK_DEVICE void find_maxima(R (&origin)[2]) const {
    each([&](R s, R t) {
      origin[0] = larger(origin[0], s);
      origin[1] = larger(origin[1], t);
    });
  }
  template <class F>
  KDK_DEVICE void each(const F& f) const {
    for (int64_t c = rank_; c < problem_.classes; c += size_) {
      if (c != target_) f(student(c), teacher(c));
    }
  }
  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    emit_class([&](int64_t, R s, R t) { return f(s, t); });
  }
  template <class F>
  KDK_DEVICE void emit_class(const F& f) const {
    for (int64_t c = rank_; c < problem_.classes; c += size_) {
      const bool excluded = c == target_;
      const R s = excluded ? -R(INFINITY) : student(c), t = excluded ? -R(INFINITY) : teacher(c);
      const R g = f(c, s, t);
      if (writes_)
        store_element<R>(problem_.gradient, g_ + c * problem_.gradient.class_stride, g);
    }
  }
  KDK_DEVICE void clear() const {
    for (int64_t c = rank_; writes_ && c < problem_.classes; c += size_)
      store_element<R>(problem_.gradient, g_ + c * problem_.gradient.class_stride, R(0));
  }
  KDK_DEVICE void put(int64_t target, R value) const {
    if (writes_ && target % size_ == rank_)
      store_element<R>(problem_.gradient, g_ + target * problem_.gradient.class_stride, value);
  }
  KDK_DEVICE R student(int64_t c) const {
    return valid_ ? load_element<R>(problem_.student, s_ + c * problem_.student.class_stride)
                  : R(0);
  }
  KDK_DEVICE R teacher(int64_t c) const {
    return valid_ ? load_element<R>(problem_.teacher, t_ + c * problem_.teacher.class_stride)
                  : R(0);
  }

 private:
  const RowProblem& problem_;
  int64_t s_, t_, g_, target_ = -1;
  bool writes_, valid_;
  int rank_, size_;
};

}  // namespace kdkernels::cuda
