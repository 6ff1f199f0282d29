// The choice of a traversal: pure functions of sizes, dtypes and the device, no query and no tuning.
//
// Targets are bytes in flight: a multiprocessor of an H200 has to have about 25 KB of loads on their
// way to keep the memory busy, so that a plan gives each one several times that.
#include <algorithm>
#include <stdexcept>

#include "correlation.h"
#include "layout.h"

namespace kdkernels::cuda {
namespace {

RowPlan by_lanes(const RowShape& shape, const Device& device) {
  const int32_t lanes = shape.classes <= 64 ? 8 : 32;
  const int32_t elements =
      shape.classes <= 256 ? 8 : int32_t(shape.classes <= 512 ? 16 : 32);
  const int64_t rows = kLaneThreads / lanes;
  return {Traversal::lanes, lanes, elements, kLaneThreads,
          blocks_for(ceil_divide(shape.rows, rows), device), 1, 0, kBlockShared, shape.aligned};
}

RowPlan by_block(const RowShape& shape, const Device& device) {
  const int64_t threads = round_up(ceil_divide(shape.classes, kBlockElements), 128);
  return {Traversal::block, 0, kBlockElements, int32_t(threads), blocks_for(shape.rows, device), 1, 0,
          kBlockShared, shape.aligned};
}

// The smallest cluster that leaves room for three clusters on the same multiprocessors, or two, or
// one.
bool by_cluster(const RowShape& shape, const Device& device, RowPlan& plan) {
  if (shape.rows >= int64_t(1) << 31) return false;
  const int64_t bytes = element_bytes(shape.student), pack = 16 / bytes;
  const int64_t fixed = kClusterExchange + kBarrierBytes;
  const auto shared = [&](int64_t slice) { return fixed + 2 * bytes * slice; };
  for (const int64_t together : {3, 2, 1}) {
    // A block's share, less what the system keeps of each.
    const int64_t whole = int64_t(device.block_shared) + 1024;
    const int64_t room = whole / together - (together == 1 ? 2048 : 1024);
    for (const int32_t cluster : {1, 2, 4, 8, 16}) {
      const int64_t slice = round_up(ceil_divide(shape.classes, cluster), pack);
      if (cluster > device.most_cluster) break;
      // Two clusters of 16 on the same multiprocessors: a measurement decides (README.md, at its end).
      if (shared(slice) > room || (cluster == 16 && together == 2)) continue;
      if (together == 1 && device.clusters_of(cluster) < 1) continue;
      // What a thread does once a row costs as much as a dozen classes: few threads, each with many
      // classes under way, and whole fours of warps, one for each scheduler.
      const int32_t threads = together == 3 ? 128 : together == 2 ? 256 : kClusterThreads;
      plan = {Traversal::cluster, 0, 0, threads,
              cluster * blocks_for(shape.rows, device, std::max(4, 12 / cluster)), cluster,
              int32_t(slice), int32_t(shared(slice)), true};
      return true;
    }
  }
  return false;
}

RowPlan by_stream(const RowShape& shape, const Device& device) {
  return {Traversal::stream, 0, 0, kBlockThreads, blocks_for(shape.rows, device), 1, 0,
          kBlockShared, shape.aligned};
}

// One block on each multiprocessor, so that all are there to meet.
bool by_split(const RowShape& shape, const Device& device, RowPlan& plan) {
  const int64_t team = device.multiprocessors / std::max<int64_t>(shape.rows, 1);
  if (team < 2 || shape.rows == 0) return false;
  plan = {Traversal::split, 0, 0, kBlockThreads, int32_t(team * shape.rows), int32_t(team), 0,
          kBlockShared, shape.aligned};
  return true;
}

RowPlan by_general(const RowShape& shape, const Device& device) {
  // A thread a row reads neighbours' logits together, if there are rows enough for all threads.
  const bool alone = shape.adjacent && shape.rows >= 64 * int64_t(device.multiprocessors);
  const int32_t lanes = alone ? 1 : shape.classes <= 2048 ? 32 : 0;
  const int32_t threads = lanes ? kLaneThreads : kBlockThreads;
  const int64_t rows = lanes ? threads / lanes : 1;
  return {Traversal::general, lanes, 0, threads,
          blocks_for(ceil_divide(shape.rows, rows), device), 1, 0, kBlockShared, false};
}

}  // namespace

RowPlan plan_rows(const RowShape& shape, const Device& device) {
  if (!shape.dense || !shape.plain) return by_general(shape, device);
  if (shape.classes <= 1024) return by_lanes(shape, device);
  RowPlan plan{};
  const bool few = by_split(shape, device, plan);
  // A team costs three meetings of the whole grid, some five microseconds.
  if (few && plan.cluster >= 8 && shape.classes >= 131072) {
    RowPlan cluster{};
    const bool clustered = shape.alike && by_cluster(shape, device, cluster);
    if (!clustered || cluster.blocks * 4 < device.multiprocessors) return plan;
    return cluster;
  }
  if (shape.alike && by_cluster(shape, device, plan)) return plan;
  if (shape.classes <= kSingleRow) return by_block(shape, device);
  return by_stream(shape, device);
}

RowPlan plan_as(Traversal traversal, const RowShape& shape, const Device& device) {
  RowPlan plan{};
  bool able = shape.dense && shape.plain;
  switch (traversal) {
    case Traversal::lanes:
      if (able && shape.classes <= 1024) return by_lanes(shape, device);
      break;
    case Traversal::block:
      if (able && shape.classes <= kSingleRow) return by_block(shape, device);
      break;
    case Traversal::cluster:
      if (able && shape.alike && by_cluster(shape, device, plan)) return plan;
      break;
    case Traversal::stream:
      if (able) return by_stream(shape, device);
      break;
    case Traversal::split:
      if (able && by_split(shape, device, plan)) return plan;
      break;
    case Traversal::general: return by_general(shape, device);
  }
  throw std::invalid_argument("traversal must be able to walk these rows");
}

bool fits(const RowPlan& plan, const RowShape& shape, const Device& device) {
  const int64_t rows_at_once = plan.lanes ? plan.threads / plan.lanes : 1;
  bool good = plan.threads % 32 == 0 && plan.threads <= kBlockThreads && plan.blocks >= 1 &&
              plan.shared >= kBlockShared && plan.shared <= device.block_shared &&
              plan.cluster >= 1 && plan.blocks % plan.cluster == 0 && rows_at_once >= 1;
  switch (plan.traversal) {
    case Traversal::lanes:
      return good && plan.threads == kLaneThreads &&
             int64_t(plan.lanes) * plan.elements >= shape.classes;
    case Traversal::block:
      return good && int64_t(plan.threads) * plan.elements >= shape.classes;
    case Traversal::cluster:
      return good && plan.cluster <= device.most_cluster && shape.alike &&
             plan.cluster * plan.threads / 32 <= 256 &&
             int64_t(plan.cluster) * plan.slice >= shape.classes &&
             plan.slice * element_bytes(shape.student) % 16 == 0;
    case Traversal::stream: return good && plan.vector <= shape.aligned;
    case Traversal::split:
      return good && plan.vector <= shape.aligned && plan.blocks <= device.multiprocessors &&
             plan.blocks == plan.cluster * shape.rows;
    case Traversal::general: return good;
  }
  return false;
}

namespace {

CorrelationPlan by_tile(CorrelationTraversal traversal, const RowShape& shape,
                        const Device& device) {
  const int64_t classes = shape.classes;
  CorrelationPlan plan{};
  plan.traversal = traversal;
  plan.lanes = classes <= 32 ? 1 : classes <= 128 ? 4 : classes <= 256 ? 8 : 32;
  plan.elements = classes <= 24 * plan.lanes ? 24 : 32;
  plan.threads = kTileThreads;
  plan.vector = traversal == CorrelationTraversal::tile;
  const int64_t most_blocks = int64_t(tile_blocks(plan.elements)) * device.multiprocessors;
  const int64_t room = (int64_t(device.block_shared) + 1024) / tile_blocks(plan.elements) - 1024;
  const int64_t row = 2 * 4 * (classes | 1), pass = kTileThreads / plan.lanes;
  // Threads without a column take a part of the rows.
  plan.groups = int32_t(std::max<int64_t>(kTileThreads / classes, 1));
  const int64_t fixed = kBlockExchange + 4 * (kMoments * classes * plan.groups + 1);
  // As many rows as fit, in whole passes of the block, and as many in each block.
  const int64_t most = std::min<int64_t>((room - fixed) / row, 256);
  const int64_t whole = most >= pass ? most / pass * pass : most;
  const int64_t rounds = ceil_divide(shape.rows, most_blocks * whole);
  const int64_t wanted = std::max<int64_t>(1, ceil_divide(shape.rows, most_blocks * rounds));
  const int64_t tile = std::min(most, round_up(wanted, std::min(pass, most)));
  plan.tile = int32_t(tile);
  plan.blocks = int32_t(std::min(ceil_divide(shape.rows, tile), most_blocks));
  plan.parts = plan.blocks * plan.groups;
  // The columns' sums are exchanged, and their terms kept, where the tile was.
  const int64_t exchange = 3 * 4 * kTileThreads, columns = 16 * classes;  // bytes
  plan.shared = int32_t(std::max(fixed + tile * row, kBlockExchange + std::max(exchange, columns)));
  // Staged rows stay beside the columns' terms, which take the place of the moments.
  if (traversal == CorrelationTraversal::staged)
    plan.shared = int32_t(std::max<int64_t>(plan.shared, fixed + tile * row));
  return plan;
}

CorrelationPlan by_correlation_stream(const RowShape& shape, const Device& device) {
  const bool vector = shape.aligned && shape.plain;
  const int64_t width = vector ? 16 / element_bytes(shape.student) : 1;
  const int64_t strips = ceil_divide(shape.classes, width * kStreamThreads);
  CorrelationPlan plan{};
  plan.traversal = CorrelationTraversal::stream;
  plan.threads = kStreamThreads;
  plan.blocks = device.multiprocessors;
  plan.vector = vector;
  // Strips of columns times parts of rows: one or two for each block.
  const int64_t parts = std::max<int64_t>(1, 2 * plan.blocks / strips);
  // So many rows at least that the moments of all parts fit where the gradient will be.
  const int64_t least =
      ceil_divide((shape.plain ? 4 : 8) * kMoments, element_bytes(shape.student));
  plan.tile = int32_t(round_up(std::max({int64_t(4), least, ceil_divide(shape.rows, parts)}), 4));
  plan.parts = int32_t(ceil_divide(shape.rows, plan.tile));
  plan.shared = kBlockExchange + 3 * 8 * kStreamThreads;
  return plan;
}

}  // namespace

CorrelationPlan plan_correlation(const RowShape& shape, const Device& device) {
  CorrelationPlan plan{};
  if (plan_columns(shape, device, plan)) return plan;
  const int64_t bytes = 2 * shape.rows * shape.classes * element_bytes(shape.student);
  if (bytes >= kSliceBytes && plan_slices(shape, device, plan)) return plan;
  if (!shape.plain || shape.classes > kTileClasses) return by_correlation_stream(shape, device);
  const bool whole = shape.aligned && shape.classes > kColumnClasses;
  return by_tile(whole ? CorrelationTraversal::tile : CorrelationTraversal::staged, shape, device);
}

CorrelationPlan plan_correlation_as(CorrelationTraversal traversal, const RowShape& shape,
                                    const Device& device) {
  const bool small = shape.plain && shape.classes <= kTileClasses;
  if (traversal == CorrelationTraversal::stream) return by_correlation_stream(shape, device);
  CorrelationPlan plan{};
  if (traversal == CorrelationTraversal::columns) {
    if (plan_columns(shape, device, plan)) return plan;
  } else if (traversal == CorrelationTraversal::slices) {
    if (plan_slices(shape, device, plan)) return plan;
  } else if (small && (traversal == CorrelationTraversal::staged ||
                       (shape.aligned && shape.classes > kColumnClasses))) {
    return by_tile(traversal, shape, device);
  }
  throw std::invalid_argument("traversal must be able to walk these rows");
}

bool fits(const CorrelationPlan& plan, const RowShape& shape, const Device& device) {
  if (plan.traversal == CorrelationTraversal::columns) return columns_fit(plan, shape, device);
  if (plan.traversal == CorrelationTraversal::slices) return slices_fit(plan, shape, device);
  const bool stream = plan.traversal == CorrelationTraversal::stream;
  const int at_once = stream ? 1 : tile_blocks(plan.elements);
  return plan.blocks >= 1 && plan.blocks <= at_once * device.multiprocessors && plan.tile >= 1 &&
         at_once * (int64_t(plan.shared) + 1024) <= int64_t(device.block_shared) + 1024 &&
         (stream ? plan.threads == kStreamThreads && int64_t(plan.parts) * plan.tile >= shape.rows
                 : plan.threads == kTileThreads && shape.plain &&
                       int64_t(plan.lanes) * plan.elements >= shape.classes &&
                       plan.parts == plan.blocks * plan.groups &&
                       (ceil_divide(shape.rows, plan.tile) >= plan.blocks));
}

}  // namespace kdkernels::cuda
