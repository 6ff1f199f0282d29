// What the operators hand to the kernels: plain pointers, strides and numbers.
//
// Nothing here depends on PyTorch, the device or the instruction set, so that every translation unit
// agrees on the layout of these structs.
#pragma once

#include <cstdint>

#include "rules/math.h"

namespace kdkernels {

enum class Scalar : int32_t { f64, f32, f16, bf16 };

enum Reduction : int64_t { kNone, kMean, kSum };

constexpr int kMaxRowDims = 8;

// A tensor seen as rows of classes, in place. The rows are the dimensions other than the classes,
// merged where the strides allow it; offsets and strides are in elements.
struct Rows {
  void* data;
  Scalar type;
  int64_t class_stride;
  int32_t dims;  // row dimensions, outermost first
  int64_t size[kMaxRowDims];
  int64_t stride[kMaxRowDims];

  KDK_FN int64_t offset(int64_t row) const {
    if (dims == 1) return row * stride[0];
    int64_t at = 0;
    for (int dim = dims - 1; dim > 0; --dim) {
      at += (row % size[dim]) * stride[dim];
      row /= size[dim];
    }
    return at + row * stride[0];
  }
  // Whether `count` consecutive rows from `row` lie `stride` elements apart, 1 for the caller's lanes.
  KDK_FN bool adjacent(int64_t row, int64_t count) const {
    const int last = dims - 1;
    return stride[last] == 1 && (dims == 1 || row % size[last] + count <= size[last]);
  }
};

// Rows of a contiguous tensor whose classes are last.
inline Rows contiguous_rows(void* data, Scalar type, int64_t rows, int64_t classes) {
  return {data, type, 1, 1, {rows}, {classes}};
}

struct RowProblem {
  Rows student, teacher, gradient;  // gradient.data is null where none is wanted
  const int64_t* target;            // class of each row, or null
  const void* token_weight;         // factor of each row's divergence in the working type, or null
  const void* hard_token_weight;    // factor of each row's cross-entropy likewise
  const void* row_temperature;      // temperature of each row likewise, instead of `temperature`
  const void* upstream;             // factor of each row's gradient likewise
  void* loss;                       // value of each row in the working type
  void* parts;  // likewise, or null: all rows' weighted divergences, then cross-entropies, then entropies
  int64_t rows, classes;
  int64_t ignore_index;
  double temperature;
  double scale;           // multiplies the divergences (mean: already divided by the valid rows)
  double hard;            // likewise the cross-entropies of the targets at temperature 1; 0 for none
  bool standardize;
  Options options;
};

struct CorrelationProblem {
  Rows student, teacher, gradient;
  const uint8_t* counted;  // whether each row counts, or null where all do
  void* loss;              // value of each row, then of each class, in the working type
  int64_t rows, classes;
  double inter, intra;  // coefficients of the sums over rows and over classes
  double tau, eps;
  Options options;

  KDK_FN bool counts(int64_t row) const { return !counted || counted[row]; }
};

struct FactorProblem {  // rows are samples, classes their elements
  Rows inheritance, exploration, teacher;
  Rows inheritance_gradient, exploration_gradient;  // data is null where none is wanted
  double* loss;                                     // value of each sample
  int64_t samples, width;
  double inheritance_weight, exploration_weight;  // coefficients of a sample's sums
  bool cosine;
};

struct TupleProblem {
  const void *student, *teacher;  // distances, (batch, batch), in the working type
  void* gradient;                 // of the sum over tuples by the student's distances, or null
  const int64_t* target;
  double* loss;     // sum over the tuples of each anchor
  int64_t* tuples;  // number of tuples of each anchor
  int64_t batch;
  double margin, temperature;
};

// Rows of logits against K ids each: what a divergence needs of a row whose teacher is sparse.
struct TopKProblem {
  Rows student, gradient;       // gradient.data is null in the forward pass; it may be the student's
  const int64_t* ids;           // (rows, k); kAbsent where there is none
  const int64_t* target;        // class of each row, or null
  const void* row_temperature;  // as of RowProblem
  void* small;                  // (rows, k + 1) in the working type, which the backward pass reads
  void* numbers;                // (kTopKNumbers, rows) likewise
  const void* small_upstream;   // gradients by `small`
  const void* hard_upstream;    // by the cross-entropies, or null
  int64_t* bad;                 // one more than the first row with ids that cannot be; 0 if there is none
  int64_t rows, classes, k;
  int64_t ignore_index;
  double temperature;
  bool rest, hard, entropy;  // which of a row's numbers are wanted
};

constexpr int64_t kAbsent = INT64_MIN;
// The origin, which was subtracted from the row's logits; the logsumexp of all classes but the target at
// temperature 1; the target's cross-entropy; the entropy of the softened distribution; the largest logit
// of the rest, and the logarithm of the rest's sum from there.
enum TopKNumber { kOrigin, kOthers, kHard, kEntropy, kRestTop, kRestSum, kTopKNumbers };

}  // namespace kdkernels
