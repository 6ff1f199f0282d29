// One sample of the factor family, whoever walks it and wherever it lies: norms, sums, gradients.
//
// A source gives the sample's elements, those of inheritance, exploration and teacher together:
// each(f): calls f(inheritance, exploration, teacher) for every element of this thread.
// emit(f): f(inheritance, exploration, teacher, g, h) sets the two gradients, which are written
// where they are wanted.
// Elements past the end of the sample read as 0.
#pragma once

#include "embedding.h"
#include "groups.cuh"
#include "sources.cuh"

namespace kdkernels::cuda {

// Sample `row` of a tensor of (samples, width), which has one stride.
template <class T>
KDK_DEVICE T* sample_of(const Rows& x, int64_t row) {
  return static_cast<T*>(x.data) + row * x.stride[0];
}

// The pack from element `at` of a sample, or of zeros past its end.
template <class T>
KDK_DEVICE Pack<T> pack_of(const T* sample, int64_t at, bool inside = true) {
  return as_pack<T>(inside ? load16(sample + at) : Bits16{});
}

// Gradients of two packs, written where they are wanted.
template <class T, class F>
KDK_DEVICE void emit_pack(const FactorProblem& problem, int64_t row, int64_t at, const Pack<T>& a,
                          const Pack<T>& e, const Pack<T>& t, const F& f) {
  Pack<T> g, h;
  KDK_UNROLL
  for (int k = 0; k < kPack<T>; ++k) {
    float dg, dh;
    f(widen(a.x[k]), widen(e.x[k]), widen(t.x[k]), dg, dh);
    g.x[k] = narrow<T>(dg);
    h.x[k] = narrow<T>(dh);
  }
  const Rows &first = problem.inheritance_gradient, &second = problem.exploration_gradient;
  if (first.data) store16(sample_of<T>(first, row) + at, as_bits(g));
  if (second.data) store16(sample_of<T>(second, row) + at, as_bits(h));
}

// kElements of each factor a thread, T in all tensors, in registers as packs.
template <class T, int kElements>
class FactorRegisters {
 public:
  KDK_DEVICE FactorRegisters(const FactorProblem& problem, int64_t row, int rank, int size)
      : problem_(problem), row_(row), rank_(rank), size_(size) {
    const T* const a = sample_of<const T>(problem.inheritance, row);
    const T* const e = sample_of<const T>(problem.exploration, row);
    const T* const t = sample_of<const T>(problem.teacher, row);
    KDK_UNROLL
    for (int j = 0; j < kPacks; ++j) {
      a_[j] = pack_of(a, index(j), inside(j));
      e_[j] = pack_of(e, index(j), inside(j));
      t_[j] = pack_of(t, index(j), inside(j));
    }
  }

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    KDK_UNROLL
    for (int j = 0; j < kPacks; ++j) {
      KDK_UNROLL
      for (int k = 0; k < kPack<T>; ++k)
        f(widen(a_[j].x[k]), widen(e_[j].x[k]), widen(t_[j].x[k]));
    }
  }

  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    KDK_UNROLL
    for (int j = 0; j < kPacks; ++j)
      if (inside(j)) emit_pack(problem_, row_, index(j), a_[j], e_[j], t_[j], f);
  }

 private:
  static constexpr int kPacks = kElements / kPack<T>;

  KDK_DEVICE int index(int j) const { return (j * size_ + rank_) * kPack<T>; }
  KDK_DEVICE bool inside(int j) const { return index(j) < int(problem_.width); }

  const FactorProblem& problem_;
  Pack<T> a_[kPacks], e_[kPacks], t_[kPacks];
  int64_t row_;
  int rank_, size_;
};

// Whole packs in global memory, read again by every sweep, each from where the one before ended:
// that end of the sample is in cache.
template <class T>
class FactorStream {
 public:
  KDK_DEVICE FactorStream(const FactorProblem& problem, int64_t row, int rank, int size)
      : problem_(problem), row_(row), rank_(rank), size_(size) {}

  template <class F>
  KDK_DEVICE void each(const F& f) {
    sweep([&](int64_t, const Pack<T>& a, const Pack<T>& e, const Pack<T>& t) {
      KDK_UNROLL
      for (int k = 0; k < kPack<T>; ++k) f(widen(a.x[k]), widen(e.x[k]), widen(t.x[k]));
    });
  }

  template <class F>
  KDK_DEVICE void emit(const F& f) {
    sweep([&](int64_t at, const Pack<T>& a, const Pack<T>& e, const Pack<T>& t) {
      emit_pack(problem_, row_, at, a, e, t, f);
    });
  }

 private:
  static constexpr int kAhead = sizeof(T) == 4 ? 2 : 1;  // packs of each factor loaded at once

  template <class F>
  KDK_DEVICE void sweep(const F& f) {
    const T* const a = sample_of<const T>(problem_.inheritance, row_);
    const T* const e = sample_of<const T>(problem_.exploration, row_);
    const T* const t = sample_of<const T>(problem_.teacher, row_);
    const int64_t packs = problem_.width / kPack<T>;
    const int64_t steps = (packs + size_ - 1) / size_;
    for (int64_t step = 0; step < steps; step += kAhead) {
      Pack<T> held_a[kAhead], held_e[kAhead], held_t[kAhead];
      int64_t at[kAhead];
      KDK_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const int64_t here = back_ ? steps - 1 - step - k : step + k;
        const int64_t pack = here * size_ + rank_;
        const bool inside = here >= 0 && pack < packs;
        at[k] = inside ? pack * kPack<T> : -1;
        held_a[k] = pack_of(a, at[k], inside);
        held_e[k] = pack_of(e, at[k], inside);
        held_t[k] = pack_of(t, at[k], inside);
      }
      KDK_UNROLL
      for (int k = 0; k < kAhead; ++k)
        if (at[k] >= 0) f(at[k], held_a[k], held_e[k], held_t[k]);
    }
    back_ = !back_;
  }

  const FactorProblem& problem_;
  int64_t row_;
  int rank_, size_;
  bool back_ = false;
};

// Any dtypes and strides, R the working type: single elements, read again by every sweep.
template <class R>
class FactorGeneral {
 public:
  KDK_DEVICE FactorGeneral(const FactorProblem& problem, int64_t row, int rank, int size)
      : problem_(problem), row_(row), rank_(rank), size_(size) {}

  template <class F>
  KDK_DEVICE void each(const F& f) const {
    for (int64_t i = rank_; i < problem_.width; i += size_)
      f(get(problem_.inheritance, i), get(problem_.exploration, i), get(problem_.teacher, i));
  }

  template <class F>
  KDK_DEVICE void emit(const F& f) const {
    for (int64_t i = rank_; i < problem_.width; i += size_) {
      R g, h;
      f(get(problem_.inheritance, i), get(problem_.exploration, i), get(problem_.teacher, i), g, h);
      put(problem_.inheritance_gradient, i, g);
      put(problem_.exploration_gradient, i, h);
    }
  }

 private:
  KDK_DEVICE R get(const Rows& x, int64_t i) const {
    return load_element<R>(x, row_ * x.stride[0] + i * x.class_stride);
  }
  KDK_DEVICE void put(const Rows& x, int64_t i, R value) const {
    if (x.data) store_element<R>(x, row_ * x.stride[0] + i * x.class_stride, value);
  }

  const FactorProblem& problem_;
  int64_t row_;
  int rank_, size_;
};

template <class R>
struct FactorNorm {
  R inverse;  // 1 / max(norm, eps)
  bool unit;  // whether the norm is at least eps, so that its derivative counts
};

// Norms of the three factors, the same bits in all threads of the group.
template <class Rule, class R, class Source, class Group>
KDK_DEVICE void factor_norms(Source& source, Group& group, FactorNorm<R> (&norms)[3]) {
  R squares[3] = {0, 0, 0};
  source.each([&](R a, R e, R t) {
    squares[0] += a * a;
    squares[1] += e * e;
    squares[2] += t * t;
  });
  group.template reduce<Sum>(squares);
  bool inside[3];  // the range where float is as good as double and no norm is near eps
  KDK_UNROLL
  for (int k = 0; k < 3; ++k) {
    inside[k] = squares[k] > R(1e-20) && squares[k] < R(1e30);
    norms[k] = {R(1) / std::sqrt(squares[k]), true};
  }
  if (inside[0] && inside[1] && inside[2]) return;
  double wide[3] = {0, 0, 0}, scale[3];
  KDK_UNROLL
  for (int k = 0; k < 3; ++k)
    scale[k] = std::is_same_v<R, double> && double(squares[k]) > 1e300 ? Rule::shrink : 1.0;
  source.each([&](R a, R e, R t) {
    wide[0] += (double(a) * scale[0]) * (double(a) * scale[0]);
    wide[1] += (double(e) * scale[1]) * (double(e) * scale[1]);
    wide[2] += (double(t) * scale[2]) * (double(t) * scale[2]);
  });
  group.template reduce<Sum>(wide);
  KDK_UNROLL
  for (int k = 0; k < 3; ++k) {
    const double length = std::sqrt(wide[k]);
    const bool small = length < Rule::eps * scale[k];  // NaN is not small
    if (!inside[k]) norms[k] = {R(small ? 1.0 / Rule::eps : scale[k] / length), !small};
  }
}

// The value of one sample, in one thread at least, and its gradients into the source.
template <class Rule, bool kCosine, class R, class Source, class Group>
KDK_DEVICE double process_sample(const FactorProblem& problem, R upstream, Source& source,
                                 Group& group) {
  FactorNorm<R> norms[3];
  factor_norms<Rule>(source, group, norms);
  const FactorNorm<R> of_a = norms[0], of_e = norms[1], of_t = norms[2];

  // Rounded products: equal factors must stay equal, which a fused x * scale - z would not see.
  R sums[4] = {0, 0, 0, 0};
  source.each([&](R a, R e, R t) {
    const R x = product(a, of_a.inverse), y = product(e, of_e.inverse);
    const R z = product(t, of_t.inverse);
    R term, direction;
    Rule::template element<kCosine>(x, z, term, direction);
    sums[0] += term;
    sums[1] += direction * x;
    Rule::template element<kCosine>(y, z, term, direction);
    sums[2] += term;
    sums[3] += direction * y;
  });
  group.template reduce<Sum>(sums);
  R value_a, value_e, sign_a, sign_e;
  Rule::template sample<kCosine>(true, of_a.unit && of_t.unit, sums[0], sums[1], value_a, sign_a);
  Rule::template sample<kCosine>(false, of_e.unit && of_t.unit, sums[2], sums[3], value_e, sign_e);

  if (problem.inheritance_gradient.data || problem.exploration_gradient.data) {
    // A norm below eps is a constant: nothing is projected out.
    const R outer_a = R(problem.inheritance_weight) * upstream * sign_a * of_a.inverse;
    const R outer_e = R(problem.exploration_weight) * upstream * sign_e * of_e.inverse;
    const R pull_a = of_a.unit ? outer_a * sums[1] : R(0);
    const R pull_e = of_e.unit ? outer_e * sums[3] : R(0);
    // The same numbers, which the compiler does not know: it would keep all that it computed from
    // them above, for which there are no registers.
    const R scale_a = shuffle(of_a.inverse, 0), scale_e = shuffle(of_e.inverse, 0);
    const R scale_t = shuffle(of_t.inverse, 0);
    source.emit([&](R a, R e, R t, R& g, R& h) {
      const R x = product(a, scale_a), y = product(e, scale_e), z = product(t, scale_t);
      R term, direction;
      Rule::template element<kCosine>(x, z, term, direction);
      g = outer_a * direction - pull_a * x;
      Rule::template element<kCosine>(y, z, term, direction);
      h = outer_e * direction - pull_e * y;
    });
  }
  return problem.inheritance_weight * double(value_a) +
         problem.exploration_weight * double(value_e);
}

}  // namespace kdkernels::cuda
