// The launch of correlation_slices.cu: which blocks share a row, and how many rows are walked at once.
#include <algorithm>

#include "correlation.h"
#include "layout.h"

namespace kdkernels::cuda {
namespace {

int64_t side_bytes(const CorrelationPlan& plan, const RowShape& shape) {
  return (plan.threads - 32) * plan.elements * element_bytes(shape.student) + (plan.vector ? 0 : 16);
}
// Whether every block's threads have the classes that they are sure to have (SliceSeat::inside).
bool all_busy(const CorrelationPlan& plan, const RowShape& shape) {
  const int64_t last = shape.classes - (plan.cluster - 1) * int64_t(plan.slice);
  return last >= 8 * (plan.threads - 32);
}
int64_t shared_bytes(const CorrelationPlan& plan) {
  return kBlockExchange + kBarrierBytes + kSliceMeeting + 2 * kSliceStages * int64_t(plan.tile);
}
// Blocks on a multiprocessor: registers go to four warps at a time, shared memory to a block.
int64_t slices_at_once(const CorrelationPlan& plan, const Device& device) {
  const int64_t warps = round_up(plan.threads / 32, 4);
  return std::min<int64_t>(kSliceThreads / 32 / warps,
                           (int64_t(device.block_shared) + 1024) / (plan.shared + 1024));
}

// Clusters that are there at once: a part of the rows for each.
int64_t slices_room(const CorrelationPlan& plan, const Device& device) {
  return device.clusters_of(plan.cluster) * slices_at_once(plan, device);
}

// Clocks of a walk, by the instructions of a class and of a thread; a turn takes the exchange's at least.
double clocks(const CorrelationPlan& plan, const RowShape& shape, const Device& device) {
  const double work = 30.0 * double(plan.slice) + 85.0 * plan.threads;
  const double exchange = plan.cluster > 1 ? 2000.0 : 1000.0;
  const double turn = std::max(exchange, double(slices_at_once(plan, device)) * work / 100.0);
  return turn * double(ceil_divide(shape.rows, plan.parts) + 2);
}

}  // namespace

bool plan_slices(const RowShape& shape, const Device& device, CorrelationPlan& chosen) {
  if (!shape.plain || !shape.dense || shape.run != shape.rows || shape.classes < 2 ||
      shape.rows >= int64_t(1) << 31)
    return false;
  const int64_t bytes = element_bytes(shape.student), pack = 16 / bytes;
  // The moments of all parts fit where the gradient will be.
  const int64_t most = std::max<int64_t>(shape.rows * bytes / (4 * kMoments), 1);
  double least = 0;
  for (const int32_t cluster : {1, 2, 4, 8, 16}) {
    if (cluster > std::max(device.most_cluster, 1)) break;
    for (const int32_t elements : {kSliceElements, kSliceMost}) {
      if (elements == kSliceMost && !(bytes == 2 && shape.aligned && device.arch >= 90)) continue;
      CorrelationPlan plan{};
      plan.traversal = CorrelationTraversal::slices;
      plan.cluster = cluster;
      plan.elements = elements;
      plan.vector = shape.aligned;
      plan.bulk = device.arch >= 90;
      const int64_t slice = round_up(ceil_divide(shape.classes, cluster), pack);
      const int64_t threads = round_up(ceil_divide(slice, elements), 32) + 32;
      if (threads > kSliceThreads) continue;
      plan.slice = int32_t(slice);
      plan.threads = int32_t(threads);
      if (!all_busy(plan, shape)) continue;
      plan.tile = int32_t(side_bytes(plan, shape));
      if (shared_bytes(plan) > device.block_shared) continue;
      plan.shared = int32_t(shared_bytes(plan));
      plan.parts = int32_t(std::min({slices_room(plan, device), shape.rows, most}));
      if (plan.parts < 1) continue;
      plan.blocks = plan.parts * cluster;
      plan.groups = int32_t(std::min<int64_t>(ceil_divide(shape.classes, 32),
                                              8 * int64_t(device.multiprocessors)));
      const double time = clocks(plan, shape, device);
      if (least > 0 && time >= least) continue;
      least = time;
      chosen = plan;
    }
  }
  return least > 0;
}

bool slices_fit(const CorrelationPlan& plan, const RowShape& shape, const Device& device) {
  const bool known = plan.elements == kSliceElements ||
                     (plan.elements == kSliceMost && element_bytes(shape.student) == 2 && plan.vector &&
                      plan.bulk);
  return known && plan.cluster >= 1 && plan.cluster <= std::max(device.most_cluster, 1) &&
         plan.blocks == plan.parts * plan.cluster && plan.parts >= 1 && plan.parts <= shape.rows &&
         plan.parts <= slices_room(plan, device) &&
         plan.groups >= 1 && plan.threads % 32 == 0 && plan.threads <= kSliceThreads &&
         int64_t(plan.threads - 32) * plan.elements >= plan.slice &&
         int64_t(plan.cluster) * plan.slice >= shape.classes &&
         all_busy(plan, shape) &&
         plan.slice * element_bytes(shape.student) % 16 == 0 && plan.vector == shape.aligned &&
         plan.tile == side_bytes(plan, shape) && plan.shared == shared_bytes(plan) &&
         plan.shared <= device.block_shared && slices_at_once(plan, device) >= 1;
}

}  // namespace kdkernels::cuda
