// Running the embedding losses on the device: plans, workspaces, launches. No PyTorch.
#pragma once

#include <string>

#include "task.h"

namespace kdkernels::cuda {

struct FactorTask {
  FactorProblem problem;  // weights already divided; no values of single samples
  const void* upstream;   // one factor of the gradients in the working type, or null
  double* partials;       // a value for each block, or null where no loss is wanted
  unsigned* ticket;       // 0 before and after the launch
  void* total;            // the loss, in the working type
};

// How a sample is walked; all in factor_rows.cu.
enum class FactorTraversal : int32_t {
  lanes,    // in the registers of a warp
  block,    // in the registers of a block
  stream,   // read three times by a block, in 16-byte accesses
  general,  // any dtypes and strides, float64: read three times by a warp or a block
};

struct FactorPlan {
  FactorTraversal traversal;
  int32_t lanes;     // that share a sample: 32 or (0) the whole block
  int32_t elements;  // of each factor in a thread's registers
  int32_t threads, blocks;
  int32_t shared;  // bytes
};

struct FactorShape {
  int64_t samples, width;
  // Elements lie next to each other in all tensors, of one dtype other than float64, and every
  // sample begins at, and holds, a multiple of 16 bytes.
  bool aligned;
};

FactorPlan plan_factors(const FactorShape& shape, const Device& device);
// For the tests, as their namesakes in task.h.
FactorPlan plan_factors_as(FactorTraversal traversal, const FactorShape& shape,
                           const Device& device);
bool fits(const FactorPlan& plan, const FactorShape& shape, const Device& device);

struct FactorRun {
  FactorProblem problem;  // weights not yet divided; `loss` is not used
  const void* upstream;
  int64_t reduction;
  void* total;  // null where no loss is wanted
};

FactorShape shape_of(const FactorProblem& problem);

// Bytes that run_factors needs, 256-byte aligned, of any content.
int64_t workspace_bytes(const FactorRun& run, const FactorPlan& plan);

// A launch on the stream; nothing waits for the device. `ticket` is the stream's counter (common.h), or
// null: then there is a launch before where a loss is wanted.
void run_factors(const std::string& rule, const FactorRun& run, const FactorPlan& plan,
                 char* workspace, unsigned* ticket, void* stream);

struct TupleTask {
  TupleProblem problem;  // loss and tuples: of each anchor
  double scale;          // of the loss
  bool mean;
  void* total;    // the loss, in the working type
  char* scratch;  // arrays of each block, or null: they are in shared memory
  int64_t scratch_bytes;
};

struct TuplePlan {
  int32_t threads, blocks;  // of the anchors
  int32_t shared;           // bytes
  int64_t scratch;          // bytes of each block in global memory
  int32_t closing_blocks;   // of the launch that takes the mean
};

TuplePlan plan_tuples(int64_t batch, bool wide, bool gradient, const Device& device);

struct TupleRun {
  TupleProblem problem;  // `loss` and `tuples` are not used
  bool wide;             // distances in double
  double scale;
  int64_t reduction;
  void* total;
};

int64_t workspace_bytes(const TupleRun& run, const TuplePlan& plan);

// Two launches; the number of tuples stays on the device.
void run_tuples(const std::string& rule, const TupleRun& run, const TuplePlan& plan,
                char* workspace, void* stream);

constexpr int kFactorWarpThreads = 128;  // of a block whose warps have a sample each
constexpr int kFactorBlockElements = 8;  // in a thread of a block; twice as many for long samples
constexpr int kTupleColumnArrays = 7;    // of the working type; and one of int32
constexpr int kTupleScanBytes = 128;     // of shared memory: a number for each warp
constexpr int kClosingThreads = 512;

}  // namespace kdkernels::cuda
