// Running a correlation loss on the device: plan, workspace, one launch. Plain pointers, no PyTorch.
#pragma once

#include <string>

#include "task.h"

namespace kdkernels::cuda {

struct CorrelationTask {
  CorrelationProblem problem;  // inter and intra already divided by what a mean divides by
  const void* upstream;        // factor of the gradient in the working type, or null
  void* total;                 // where the loss goes, in the working type
  void* rows;                  // terms of each row, where the traversal keeps some
  void* partials;              // (5, parts, classes): mean of q, of p, inner products qq, pp, qp
  int64_t* counts;             // (parts): rows of each part
  void* columns;               // (4, classes): terms of each column
  double* sums;                // a value for each block
  unsigned* ticket;            // slices: of the blocks that combine the columns
};

// Kernels, in correlation_<traversal>.cu.
enum class CorrelationTraversal : int32_t {
  tile,     // 513 to 1024 classes, rows of one dtype and whole packs: in registers, read twice
  staged,   // up to 1024 classes in float, of any dtypes and strides: through shared memory
  stream,   // any number of classes, dtypes and strides, float and double
  columns,  // 2 to 512 classes of one dtype that lie in one of the ways below
  slices,   // many classes of one dtype, in aligned or contiguous rows: each block keeps some of them
};

// How all tensors of a `columns` problem lie, for copies of 16 bytes.
enum class TileLayout : int32_t {
  flat,    // a row after the other
  rows,    // each row is whole packs
  planes,  // runs of rows whose elements of one class lie side by side, in whole packs (NCHW)
};

struct CorrelationPlan {
  CorrelationTraversal traversal;
  int32_t lanes, elements;  // of a row, and in each of its lanes; slices: classes of a thread
  int32_t tile;             // rows of a tile, or of a part of the rows (stream); slices: bytes of one
  int32_t groups;           // parts of a tile's rows whose columns different threads sum; slices: blocks
                            // that combine the columns
  int32_t threads, blocks;
  int32_t parts;
  int32_t shared;  // bytes
  bool vector;     // 16-byte accesses
  // columns:
  TileLayout layout;
  int32_t row_pitch, class_pitch;  // of a tile in shared memory, in elements
  bool spread;                     // the rows of a warp lie apart in the tile
  bool bulk;                       // and slices: they come by bulk copies (sm_90 and later)
  int64_t run;                     // planes: rows of a run
  // slices:
  int32_t cluster, slice;  // blocks that share a row, and classes of each
};

CorrelationPlan plan_correlation(const RowShape& shape, const Device& device);
CorrelationPlan plan_correlation_as(CorrelationTraversal traversal, const RowShape& shape,
                                    const Device& device);
bool fits(const CorrelationPlan& plan, const RowShape& shape, const Device& device);
// plan_columns.cpp, plan_slices.cpp; false where the traversal cannot walk these rows.
bool plan_columns(const RowShape& shape, const Device& device, CorrelationPlan& plan);
bool columns_fit(const CorrelationPlan& plan, const RowShape& shape, const Device& device);
bool plan_slices(const RowShape& shape, const Device& device, CorrelationPlan& plan);
bool slices_fit(const CorrelationPlan& plan, const RowShape& shape, const Device& device);

struct CorrelationRun {
  // inter and intra not yet divided; gradient.data null if not wanted, else dense memory of its own,
  // of which any content may be written before the gradient.
  CorrelationProblem problem;
  const void* upstream;
  int64_t reduction;
  void* total;
};

RowShape shape_of(const CorrelationProblem& problem);
int64_t workspace_bytes(const CorrelationRun& run, const CorrelationPlan& plan);
void run_correlation(const std::string& rule, const CorrelationRun& run,
                     const CorrelationPlan& plan, char* workspace, void* stream);

constexpr int kTileThreads = 128;
// Blocks on a multiprocessor, all there at once to meet: what registers allow.
constexpr int tile_blocks(int elements) { return elements == 32 ? 2 : 3; }
constexpr int kTileClasses = 1024;
constexpr int kCachedRows = 16;  // of a column, in registers while its moments are taken
constexpr int kMoments = 5;
constexpr int kStreamThreads = 512;
constexpr int kColumnClasses = 512, kColumnElements = 20;  // at most, of a row and of a lane
constexpr int kColumnTile = 12000;  // bytes of one side's tile; four of them are a block's
constexpr int column_blocks(int elements) { return elements <= 10 ? 4 : elements <= 14 ? 3 : 2; }

constexpr int kSliceElements = 16;   // classes of a thread
constexpr int kSliceMost = 24;       // likewise, of half types in whole packs by bulk copies
constexpr int kSliceThreads = 384;   // at most, of a block: registers for the moments of so many
constexpr int kSliceStages = 6;      // rows whose slices are in shared memory
constexpr int kSliceMeeting = 3584;  // bytes through which its warps and blocks meet
// Bytes of both sides from which three launches are worth less traffic than one.
constexpr int64_t kSliceBytes = 16 << 20;

}  // namespace kdkernels::cuda
