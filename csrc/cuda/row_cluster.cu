// Rows that one block cannot hold, spread over the shared memory of a thread-block cluster: bulk
// copies bring each logit in once, and the blocks reduce through each other's shared memory. While one
// cluster waits for its copies or its barrier, another one on the same multiprocessors computes.
#include "launch.cuh"
#include "row.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

template <class T>
class Slices {  // of this block; refilled for every row
 public:
  KDK_DEVICE Slices(const RowProblem& problem, int slice)
      : barrier_(reinterpret_cast<Barrier*>(shared_memory() + kClusterExchange)),
        s_(reinterpret_cast<T*>(shared_memory() + kClusterExchange + kBarrierBytes)),
        t_(s_ + slice),
        begin_(int64_t(cluster_rank()) * slice),
        count_(int(problem.classes - begin_ < slice ? problem.classes - begin_ : slice)) {
    if (count_ < 0) count_ = 0;
    if (thread_index() == 0) {
      barrier_init(barrier_);
      fence_barriers();
    }
    sync_cluster();  // also: every block of the cluster runs before one writes to its memory
  }

  KDK_DEVICE Shared<T> load(const RowPointers<T>& at, bool valid) {
    fence_bulk();
    sync_block();  // nobody reads the row before any more
    if (valid && count_ > 0) {
      if (thread_index() == 0) {
        const uint32_t bytes = uint32_t(count_ * sizeof(T));
        barrier_expect(barrier_, 2 * bytes);
        bulk_load(s_, at.s + begin_, bytes, barrier_);
        bulk_load(t_, at.t + begin_, bytes, barrier_);
      }
      barrier_wait(barrier_, parity_);
      parity_ ^= 1;
    }
    return Shared<T>(at, s_, t_, begin_, count_, valid, thread_index(), thread_count());
  }

 private:
  Barrier* barrier_;
  T *s_, *t_;
  int64_t begin_;
  int count_;
  uint32_t parity_ = 0;
};

template <class T>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1)
    row_cluster(KDK_PARAMETER RowTask task, KDK_PARAMETER int slice) {
  Cluster group;
  Slices<T> slices(task.problem, slice);
  walk_rows<Rule, float, false>(task, group, block_index() / cluster_size(), 0,
                                block_count() / cluster_size(), [&](int64_t row, bool valid) {
                                  return slices.load(RowPointers<T>(task.problem, row), valid);
                                });
}

template <class T>
void run(const RowTask& task, const RowPlan& plan, void* stream) {
  launch<row_cluster<T>>({plan.blocks, plan.threads, plan.cluster, size_t(plan.shared), false},
                         stream, task, plan.slice);
}

}  // namespace

void KDK_JOIN(KDK_RULE, _row_cluster)(const RowTask& task, const RowPlan& plan, void* stream) {
  switch (task.problem.student.type) {
    case Scalar::f16: return run<f16>(task, plan, stream);
    case Scalar::bf16: return run<bf16>(task, plan, stream);
    default: return run<float>(task, plan, stream);
  }
}

}  // namespace kdkernels::cuda
