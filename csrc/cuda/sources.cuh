// Where a thread finds its part of a row, and where its part of the gradient goes.
//
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
  KDK_DEVICE Registers(const RowPointers<T>& at, int classes, bool vector, bool valid, int rank,
                       int size)
      : at_(at), classes_(classes), vector_(vector), rank_(rank), size_(size) {
    if (!valid) {
      KDK_UNROLL
      for (int j = 0; j < kElements; ++j) s_[j] = t_[j] = narrow<T>(0.0f);
    } else if (vector) {
      KDK_UNROLL
      for (int j = 0; j < kElements; j += kPack<T>) {
        Pack<T> s = fill(), t = fill();
        if (index(j) < classes) {
          s = as_pack<T>(load16(at.s + index(j)));
          t = as_pack<T>(load16(at.t + index(j)));
        }
        KDK_UNROLL
        for (int k = 0; k < kPack<T>; ++k) {
          s_[j + k] = s.x[k];
          t_[j + k] = t.x[k];
        }
      }
    } else {
      KDK_UNROLL
      for (int j = 0; j < kElements; ++j) {
        const bool inside = index(j) < classes;
        s_[j] = inside ? at.s[index(j)] : lowest<T>();
        t_[j] = inside ? at.t[index(j)] : lowest<T>();
      }
    }
  }

  KDK_DEVICE void exclude(int64_t target) {
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j)
      if (index(j) == target) s_[j] = t_[j] = lowest<T>();
  }

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) f(widen(s_[j]), widen(t_[j]));
  }

  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    KDK_UNROLL
    for (int j = 0; j < kElements; j += kPack<T>) {
      Pack<T> g;
      KDK_UNROLL
      for (int k = 0; k < kPack<T>; ++k) {
        g.x[k] = narrow<T>(f(widen(s_[j + k]), widen(t_[j + k])));
      }
      if (!at_.g) continue;
      if (vector_) {
        if (index(j) < classes_) store16(at_.g + index(j), as_bits(g));
      } else {
        KDK_UNROLL
        for (int k = 0; k < kPack<T>; ++k)
          if (index(j + k) < classes_) at_.g[index(j + k)] = g.x[k];
      }
    }
  }

  KDK_DEVICE void clear() const {
    emit([](float, float) { return 0.0f; });
  }

  KDK_DEVICE void put(int64_t target, float value) const {
    const int64_t owner = vector_ ? target / kPack<T> % size_ : target % size_;
    if (at_.g && owner == rank_) at_.g[target] = narrow<T>(value);
  }
  KDK_DEVICE float student(int64_t c) const { return at_.student(c); }
  KDK_DEVICE float teacher(int64_t c) const { return at_.teacher(c); }

  // The class of element j.
  KDK_DEVICE int index(int j) const {
    return vector_ ? (j / kPack<T> * size_ + rank_) * kPack<T> + j % kPack<T> : j * size_ + rank_;
  }

 private:
  static KDK_DEVICE Pack<T> fill() {
    Pack<T> pack;
    KDK_UNROLL
    for (int k = 0; k < kPack<T>; ++k) pack.x[k] = lowest<T>();
    return pack;
  }

  RowPointers<T> at_;
  T s_[kElements], t_[kElements];
  int classes_;
  bool vector_;
  int rank_, size_;
};

// A slice of the row in this block's shared memory, `begin` classes into the row; whole packs. The
// threads of the block share it; `rank` and `size` are theirs.
template <class T>
class Shared {
 public:
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
    const int64_t at = target - begin_;
    if (at >= 0 && at < count_ && at / kPack<T> % size_ == rank_) s_[at] = t_[at] = lowest<T>();
  }

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    for (int i = rank_ * kPack<T>; valid_ && i < count_; i += size_ * kPack<T>) {
      const Pack<T> s = as_pack<T>(load16_shared(s_ + i)), t = as_pack<T>(load16_shared(t_ + i));
      KDK_UNROLL
      for (int k = 0; k < kPack<T>; ++k) f(widen(s.x[k]), widen(t.x[k]));
    }
  }

  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    for (int i = rank_ * kPack<T>; i < count_; i += size_ * kPack<T>) {
      const Pack<T> s = as_pack<T>(load16_shared(s_ + i)), t = as_pack<T>(load16_shared(t_ + i));
      Pack<T> g;
      KDK_UNROLL
      for (int k = 0; k < kPack<T>; ++k) g.x[k] = narrow<T>(f(widen(s.x[k]), widen(t.x[k])));
      if (at_.g) store16(at_.g + begin_ + i, as_bits(g));
    }
  }

  KDK_DEVICE void clear() const {
    for (int i = rank_ * kPack<T>; at_.g && i < count_; i += size_ * kPack<T>)
      store16(at_.g + begin_ + i, Bits16{});
  }

  KDK_DEVICE void put(int64_t target, float value) const {
    const int64_t at = target - begin_;
    if (at_.g && at >= 0 && at < count_ && at / kPack<T> % size_ == rank_)
      at_.g[target] = narrow<T>(value);
  }
  KDK_DEVICE float student(int64_t c) const { return at_.student(c); }
  KDK_DEVICE float teacher(int64_t c) const { return at_.teacher(c); }

 private:
  RowPointers<T> at_;
  T *s_, *t_;
  int64_t begin_;
  int count_;
  bool valid_;
  int rank_, size_;
};

// Whole packs of the row in global memory, read again by every sweep; several loads in flight. The
// last sweep runs backwards, to find the end of the row in cache.
template <class T>
class Streamed {
 public:
  static constexpr int kAhead = sizeof(T) == 4 ? 4 : 2;  // packs of each side loaded at once

  KDK_DEVICE Streamed(const RowPointers<T>& at, int64_t classes, bool valid, int rank, int size)
      : at_(at), packs_(classes / kPack<T>), valid_(valid), rank_(rank), size_(size) {}

  KDK_DEVICE void exclude(int64_t target) { target_ = target; }

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    if (!valid_) return;
    for (int64_t first = rank_; first < packs_; first += int64_t(size_) * kAhead) {
      Pack<T> s[kAhead], t[kAhead];
      load(first, s, t);
      KDK_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        if (first + int64_t(a) * size_ >= packs_) break;
        mask(first + int64_t(a) * size_, s[a], t[a]);
        KDK_UNROLL
        for (int k = 0; k < kPack<T>; ++k) f(widen(s[a].x[k]), widen(t[a].x[k]));
      }
    }
  }

  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    const int64_t step = int64_t(size_) * kAhead;
    if (rank_ >= packs_) return;
    for (int64_t first = rank_ + (packs_ - 1 - rank_) / step * step; first >= 0; first -= step) {
      Pack<T> s[kAhead], t[kAhead];
      load(first, s, t);
      KDK_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const int64_t pack = first + int64_t(a) * size_;
        if (pack >= packs_) break;
        mask(pack, s[a], t[a]);
        Pack<T> g;
        KDK_UNROLL
        for (int k = 0; k < kPack<T>; ++k)
          g.x[k] = narrow<T>(f(widen(s[a].x[k]), widen(t[a].x[k])));
        if (at_.g) store16(at_.g + pack * kPack<T>, as_bits(g));
      }
    }
  }

  KDK_DEVICE void clear() const {
    for (int64_t pack = rank_; at_.g && pack < packs_; pack += size_)
      store16(at_.g + pack * kPack<T>, Bits16{});
  }

  KDK_DEVICE void put(int64_t target, float value) const {
    if (at_.g && target / kPack<T> % size_ == rank_) at_.g[target] = narrow<T>(value);
  }
  KDK_DEVICE float student(int64_t c) const { return at_.student(c); }
  KDK_DEVICE float teacher(int64_t c) const { return at_.teacher(c); }

 private:
  KDK_DEVICE void load(int64_t first, Pack<T> (&s)[kAhead], Pack<T> (&t)[kAhead]) const {
    KDK_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const int64_t pack = first + int64_t(a) * size_;
      if (pack >= packs_) break;
      s[a] = as_pack<T>(load16(at_.s + pack * kPack<T>));
      t[a] = as_pack<T>(load16(at_.t + pack * kPack<T>));
    }
  }
  KDK_DEVICE void mask(int64_t pack, Pack<T>& s, Pack<T>& t) const {
    if (target_ / kPack<T> != pack || target_ < 0) return;
    KDK_UNROLL
    for (int k = 0; k < kPack<T>; ++k)
      if (k == target_ % kPack<T>) s.x[k] = t.x[k] = lowest<T>();
  }

  RowPointers<T> at_;
  int64_t packs_, target_ = -1;
  bool valid_;
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
