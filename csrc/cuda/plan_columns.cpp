// The launch of correlation_columns.cu: lanes of a row, and how a tile lies in shared memory.
#include <algorithm>

#include "correlation.h"
#include "layout.h"

namespace kdkernels::cuda {
namespace {

constexpr int kWarps = kTileThreads / 32;
constexpr int kColumnShared = kBlockExchange + kBarrierBytes + 4 * kColumnTile;

// How many lanes of a warp want different words of one bank at once, at worst.
int conflicts(const CorrelationPlan& plan, int64_t bytes) {
  int64_t words[32];
  int taken[32] = {}, worst = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const int64_t row = int64_t(lane / plan.lanes) * (plan.spread ? kWarps : 1);
    words[lane] = (row * plan.row_pitch + lane % plan.lanes * plan.class_pitch) * bytes / 4;
    const bool known = std::find(words, words + lane, words[lane]) != words + lane;
    if (!known) worst = std::max(worst, ++taken[words[lane] % 32]);
  }
  return worst;
}

struct Choice {
  const RowShape& shape;
  int64_t pack, room;  // elements of 16 bytes, of a tile
  int64_t most;        // blocks

  // Rows of a tile of which a row takes `pitch` elements: whole passes, and as many in each block.
  int64_t rows_for(int64_t pitch, int64_t grain) const {
    const int64_t largest = room / pitch / grain * grain;
    const int64_t rounds = ceil_divide(shape.rows, most * std::max<int64_t>(largest, 1));
    return std::min(largest, round_up(ceil_divide(shape.rows, most * rounds), grain));
  }
};

// Keeps the candidate with the fewest conflicts, the first of those.
struct Best {
  int conflicts = 33;
  CorrelationPlan plan{};
  void offer(const CorrelationPlan& candidate, int64_t bytes) {
    const int found = candidate.tile > 0 ? cuda::conflicts(candidate, bytes) : 33;
    if (found < conflicts) *this = {found, candidate};
  }
};

// As compiled: even counts, and 19, which both Cityscapes (19 classes) and ADE20K (150, by eight lanes) need.
int32_t elements_for(int64_t classes_of_a_lane) {
  const int64_t even = round_up(classes_of_a_lane, 2);
  return int32_t(classes_of_a_lane == 19 ? 19 : std::max<int64_t>(4, even));
}

// Blocks on a multiprocessor, all there at once to meet.
int columns_at_once(const CorrelationPlan& plan, const Device& device) {
  return std::min(column_blocks(plan.elements), (device.block_shared + 1024) / (plan.shared + 1024));
}

}  // namespace

bool plan_columns(const RowShape& shape, const Device& device, CorrelationPlan& chosen) {
  if (!shape.plain || shape.run <= 0 || shape.classes < 2 || shape.classes > kColumnClasses)
    return false;
  const int64_t classes = shape.classes, bytes = element_bytes(shape.student);
  CorrelationPlan plan{};
  plan.traversal = CorrelationTraversal::columns;
  plan.layout = shape.aligned ? TileLayout::rows
                : shape.dense ? TileLayout::flat
                              : TileLayout::planes;
  plan.threads = kTileThreads;
  plan.groups = 1;
  plan.vector = true;
  plan.run = shape.run;
  plan.shared = kColumnShared;
  plan.lanes = 1;
  // What is computed once a row costs a lane as much as twenty classes: few lanes. A lane a row finds
  // rows of many equal factors in few banks.
  while (ceil_divide(classes, plan.lanes) > kColumnElements) plan.lanes *= 2;
  if (plan.layout != TileLayout::planes && plan.lanes == 1 && classes >= 8 &&
      classes * bytes % 16 == 0)
    plan.lanes = 2;
  plan.elements = elements_for(ceil_divide(classes, plan.lanes));
  const int at_once = columns_at_once(plan, device);
  if (at_once < 1) return false;
  const Choice choice{shape, 16 / bytes, kColumnTile / bytes,
                      int64_t(at_once) * device.multiprocessors};
  const int64_t grain = std::max<int64_t>(kTileThreads / plan.lanes, choice.pack);

  Best best;
  for (int64_t pad = 0; pad < 8; ++pad) {
    plan.class_pitch = 1;
    if (plan.layout == TileLayout::flat) {
      if (pad > 1) break;
      plan.spread = pad == 1;
      plan.row_pitch = int32_t(classes);
      plan.tile = int32_t(choice.rows_for(classes, grain));
    } else if (plan.layout == TileLayout::rows) {
      plan.row_pitch = int32_t(classes + pad * choice.pack);
      plan.tile = int32_t(choice.rows_for(plan.row_pitch, grain));
    } else {
      plan.row_pitch = 1;
      const int64_t rows = std::min(choice.rows_for(classes, grain), round_up(shape.run, grain));
      const int64_t pitch = rows + pad * choice.pack;
      if (classes * pitch > choice.room) break;
      plan.tile = int32_t(rows);
      plan.class_pitch = int32_t(pitch);
    }
    best.offer(plan, bytes);
  }
  if (best.conflicts > 32) return false;
  chosen = best.plan;
  // Short bulk copies take longer to start than to make.
  const int64_t line = chosen.layout == TileLayout::planes ? chosen.tile : classes;
  chosen.bulk = device.arch >= 90 && (chosen.layout == TileLayout::flat || line * bytes >= 512);
  const int64_t runs = chosen.layout == TileLayout::planes ? shape.rows / shape.run : 1;
  const int64_t tiles = runs * ceil_divide(shape.rows / runs, chosen.tile);
  chosen.blocks = chosen.parts = int32_t(std::min<int64_t>(tiles, choice.most));
  return tiles < int64_t(1) << 31;
}

bool columns_fit(const CorrelationPlan& plan, const RowShape& shape, const Device& device) {
  const int64_t bytes = element_bytes(shape.student), pack = 16 / bytes;
  const int64_t last = (plan.tile - 1) * int64_t(plan.row_pitch) +
                       (shape.classes - 1) * int64_t(plan.class_pitch) + 1;
  const int64_t runs = plan.layout == TileLayout::planes ? shape.rows / shape.run : 1;
  // The moments of each warp, and the sums of the columns, where the tiles were.
  const int64_t merged = 4 * kWarps * (kMoments * shape.classes + 1);
  const int64_t summed = 3 * 4 * kTileThreads;
  return plan.threads == kTileThreads && plan.lanes >= 1 && plan.lanes <= 32 &&
         int64_t(plan.lanes) * plan.elements >= shape.classes &&
         (plan.elements == 4 || int64_t(plan.lanes) * (plan.elements - 2) <= shape.classes) &&
         plan.elements == elements_for(plan.elements) && plan.elements <= kColumnElements &&
         last * bytes <= kColumnTile &&
         plan.tile * bytes % 16 == 0 && plan.shared == kColumnShared &&
         merged <= 4 * kColumnTile && summed <= 4 * kColumnTile && plan.parts == plan.blocks &&
         plan.blocks <= columns_at_once(plan, device) * device.multiprocessors &&
         plan.blocks <= runs * ceil_divide(shape.rows / runs, plan.tile) &&
         (plan.layout == TileLayout::flat || plan.row_pitch * plan.class_pitch % pack == 0);
}

}  // namespace kdkernels::cuda
