// A row of logits and its K ids: where it lies, and the classes that stand apart, which are the ids and the
// target of a cross-entropy.
#pragma once

#include "convert.h"
#include "scratch.h"

namespace kdkernels::KDK_ISA {

constexpr int64_t kTopKBlock = 1024;

// A thread's scratch.
template <class R>
struct TopKScratch {
  R* block;       // a block, padded to whole vectors
  double* logits;  // those of the ids
  int64_t* apart;  // the classes that stand apart, by block
  int64_t* heads;  // where each block's begin in `apart`

  KDK_FN explicit TopKScratch(const TopKProblem& problem) {
    const int64_t blocks = problem.classes / kTopKBlock + 1, count = problem.k + 1;
    const int64_t bytes = sizeof(R) * (kTopKBlock + 64) + 8 * (2 * count + blocks + 2);
    block = static_cast<R*>(cpu::scratch(bytes));
    logits = reinterpret_cast<double*>(block + kTopKBlock + 64);
    apart = reinterpret_cast<int64_t*>(logits + count);
    heads = apart + count;
  }
};

// What a row is besides its logits.
template <class R>
struct TopKRow {
  const TopKProblem& problem;
  int64_t row, target;  // -1: no cross-entropy
  const int64_t* ids;
  double temperature;
  bool target_is_id = false;

  KDK_FN TopKRow(const TopKProblem& problem, int64_t row)
      : problem(problem),
        row(row),
        target(problem.hard ? problem.target[row] : -1),
        ids(problem.ids + row * problem.k),
        temperature(problem.row_temperature
                        ? double(static_cast<const R*>(problem.row_temperature)[row])
                        : problem.temperature) {
    for (int64_t k = 0; k < problem.k; ++k) target_is_id |= target >= 0 && ids[k] == target;
  }
  KDK_FN bool ignored() const {
    return problem.target && problem.target[row] == problem.ignore_index;
  }
  KDK_FN R* small() const { return static_cast<R*>(problem.small) + row * (problem.k + 1); }
  KDK_FN R& number(TopKNumber which) const {
    return static_cast<R*>(problem.numbers)[which * problem.rows + row];
  }
};

// Sorts the classes that stand apart by their blocks; false where an id is out of range or there twice.
template <class R>
inline bool set_apart(const TopKRow<R>& row, const TopKScratch<R>& scratch) {
  const TopKProblem& problem = row.problem;
  const int64_t blocks = problem.classes / kTopKBlock + 1;
  int64_t* const heads = scratch.heads;
  std::memset(heads, 0, sizeof(int64_t) * (blocks + 2));
  bool inside = true;
  const auto each = [&](auto&& f) KDK_LAMBDA {
    for (int64_t k = 0; k < problem.k; ++k)
      if (row.ids[k] != kAbsent) f(row.ids[k]);
    if (row.target >= 0 && !row.target_is_id) f(row.target);
  };
  each([&](int64_t id) KDK_LAMBDA {
    if (id < 0 || id >= problem.classes) inside = false;
    else ++heads[id / kTopKBlock + 2];
  });
  if (!inside) return false;
  for (int64_t b = 2; b < blocks + 2; ++b) heads[b] += heads[b - 1];
  each([&](int64_t id) KDK_LAMBDA { scratch.apart[heads[id / kTopKBlock + 1]++] = id; });
  for (int64_t b = 0; b < blocks; ++b) {
    if (heads[b + 1] - heads[b] < 2) continue;
    uint64_t seen[kTopKBlock / 64] = {};
    for (int64_t i = heads[b]; i < heads[b + 1]; ++i) {
      const int64_t at = scratch.apart[i] % kTopKBlock;
      const uint64_t bit = uint64_t(1) << (at % 64);
      if (seen[at / 64] & bit) return false;
      seen[at / 64] |= bit;
    }
  }
  return true;
}

// A vector of logits, and of the gradient.
template <class R, class T>
KDK_FN Vec<R> take(const T* from) {
  if constexpr (std::is_same_v<T, R>) return load<R>(from);
  if constexpr (kHalf<T> && std::is_same_v<R, float>) return widen_vector(from);
  Vec<R> v{};
  for (int lane = 0; lane < kLanes<R>; ++lane) v[lane] = R(widen(from[lane]));
  return v;
}
template <class R, class T>
KDK_FN void give(T* to, const Vec<R>& v) {
  if constexpr (std::is_same_v<T, R>) store<R>(to, v);
  else if constexpr (kHalf<T> && std::is_same_v<R, float>) narrow_vector(to, v);
  else
    for (int lane = 0; lane < kLanes<R>; ++lane) to[lane] = narrow<T>(v[lane]);
}

}  // namespace kdkernels::KDK_ISA
