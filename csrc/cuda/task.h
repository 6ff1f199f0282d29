// What the row kernels get, and the choice among them.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace kdkernels::cuda {

struct RowTask {
  RowProblem problem;       // loss: a value for each row, or null
  int64_t upstream_stride;  // 1, or 0 where all rows share one factor
  // The valid rows, by which the scale is still to be divided: in `parts` parts; or, of a few rows, for each
  // warp to count.
  const int64_t* counts;
  int parts;
  bool count;
  double* partials;  // a value for each block, or null where no sum is wanted
  unsigned* ticket;  // 0 before and after the launch
  void* total;       // the sum, in the working type
  char* exchange;    // of a split row's blocks
};

struct Device {
  int arch;             // 80, 90, 100: compute capability
  int multiprocessors;
  int block_shared;     // bytes of shared memory that a block may have
  int most_cluster;     // blocks of a cluster, 0 where there are none
  // Clusters of 2, 4, 8 and 16 blocks, each of a whole multiprocessor, that there is room for at once; -1 where
  // nobody has asked.
  int clusters[4] = {-1, -1, -1, -1};

  // A cluster keeps to one of the groups of 16 to 18 multiprocessors that a GPU is made of.
  int clusters_of(int blocks) const {
    if (blocks == 1) return multiprocessors;
    const int asked = clusters[blocks == 2 ? 0 : blocks == 4 ? 1 : blocks == 8 ? 2 : 3];
    if (asked >= 0) return asked;
    const int groups = multiprocessors < 18 ? 1 : (multiprocessors + 16) / 18;
    return blocks <= most_cluster ? groups * (multiprocessors / groups / blocks) : 0;
  }
};

// How rows are walked; the kernels are in the file of the same name, row_<traversal>.cu.
enum class Traversal : int32_t {
  lanes,    // in the registers of 8 or 32 lanes of a warp
  block,    // in the registers of a block
  cluster,  // in the shared memory of a thread-block cluster (sm_90 and later)
  stream,   // read twice by a block
  split,    // read twice by several blocks of a cooperative grid
  general,  // any dtypes and strides, float64, standardisation: read up to five times
};

struct RowPlan {
  Traversal traversal;
  int32_t lanes;     // that share a row: 1, 8, 32 or (0) the whole block, cluster or team
  int32_t elements;  // of a row in each thread's registers
  int32_t threads, blocks;
  int32_t cluster;   // blocks that share a row
  int32_t slice;     // classes in each block of a cluster
  int32_t shared;    // bytes
  bool vector;       // 16-byte accesses
};

// What the choice depends on.
struct RowShape {
  int64_t rows, classes;
  Scalar student, teacher;
  bool dense;      // classes lie next to each other in all three tensors, of one dtype
  bool alike;      // and each row begins at the same address modulo 16 bytes in all three
  bool aligned;    // and every row begins at, and holds, a multiple of 16 bytes
  bool adjacent;   // rows lie next to each other instead
  bool plain;      // float32 arithmetic, no standardisation
  // Rows that copies of whole packs can bring in together, 0 where none can. All three tensors lie
  // alike then: aligned rows at one distance; or one after the other; or, where they are adjacent,
  // runs of so many rows.
  int64_t run;
};

RowPlan plan_rows(const RowShape& shape, const Device& device);
// For the tests: a given traversal, whatever would be chosen (throws where it cannot be), and whether
// a plan keeps the limits.
RowPlan plan_as(Traversal traversal, const RowShape& shape, const Device& device);
bool fits(const RowPlan& plan, const RowShape& shape, const Device& device);

constexpr int kLaneThreads = 128;    // of a block, in `lanes` and `general` but for whole blocks
constexpr int kBlockThreads = 512;   // at most, elsewhere
constexpr int kClusterThreads = 384;  // at most, in `cluster`; two such blocks have room for their registers
constexpr int kBlockElements = 16;   // of a row in each thread of a `block`
constexpr int64_t kCountedByWarps = 1024;  // rows whose valid ones each warp of the row kernel counts itself
constexpr int kSingleRow = kBlockElements * kBlockThreads;  // most classes in one block's registers
// Of a row by several blocks: softmaxes, value; the largest logit, its teacher's and the slopes of a rule
// that is not centred.
constexpr int kTeamReductions = 5;
constexpr int kMostValues = 4;       // in one reduction
constexpr int kBlockExchange = 2 * kMostValues * 32 * 8;      // bytes: of 32 warps
constexpr int kClusterExchange = 2 * kMostValues * 256 * 4;   // of 256 warps
constexpr int kBarrierBytes = 128;

}  // namespace kdkernels::cuda
