// Rows that one block cannot hold, spread over the shared memory of a thread-block cluster: bulk
// copies bring each logit in once, the next row's while the gradient of this one is written, and the blocks
// reduce through each other's shared memory. While one cluster waits for its copies or its barrier,
// another one on the same multiprocessors computes.
#include "launch.cuh"
#include "row.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

// The slices of this block: its part of each row, refilled part by part as the last sweep over the
// row before leaves them.
template <class T>
class Slices {
 public:
  static constexpr int kParts = 4;

  KDK_DEVICE Slices(const RowProblem& problem, const int& slice, const int& part)
      : problem_(problem),
        slice_(slice),
        part_(part),
        barriers_(reinterpret_cast<Barrier*>(shared_memory() + kClusterExchange)),
        s_(reinterpret_cast<T*>(shared_memory() + kClusterExchange + kBarrierBytes)),
        begin_(cluster_rank() * slice),
        count_(int(problem.classes) - begin_ < slice ? int(problem.classes) - begin_ : slice) {
    if (count_ < 0) count_ = 0;
    if (thread_index() == 0) {
      for (int i = 0; i < kParts; ++i) barrier_init(barriers_ + i);
      fence_barriers();
    }
    sync_cluster();  // also: every block of the cluster runs before one writes to its memory
  }

  // Row `index`, and which comes after it. Rows that are not valid are not loaded.
  KDK_DEVICE Shared<T, Slices> load(int64_t index, bool valid, int64_t next, bool next_valid) {
    if (first_) {
      next_ = valid ? int(index) : -1;
      for (int begin = 0; begin < count_; begin += part_) fetch(begin);
      first_ = false;
    }
    next_ = next_valid ? int(next) : -1;
    if (valid) {
      for (int begin = 0; begin < count_; begin += part_)
        barrier_wait(barriers_ + begin / part_, parity_);
      parity_ ^= 1;
    }
    return Shared<T, Slices>(pointers(index), s_, s_ + slice_, begin_, count_, part_, valid,
                             thread_index(), thread_count(), *this);
  }

  // This thread is done with a part of the row; the next row's comes in its place.
  KDK_DEVICE void operator()(int begin) const {
    fence_bulk();
    sync_block();
    fetch(begin);
  }

 private:
  KDK_DEVICE RowPointers<T> pointers(int64_t row) const {
    return RowPointers<T>(problem_, row, [row](const Rows& x) { return x.offset_called(row); });
  }
  KDK_DEVICE void fetch(int begin) const {
    if (next_ < 0 || thread_index() != 0) return;
    const RowPointers<T> at = pointers(next_);
    const int classes = count_ - begin < part_ ? count_ - begin : part_;
    const uint32_t bytes = uint32_t(classes * sizeof(T));
    Barrier* const barrier = barriers_ + begin / part_;
    barrier_expect(barrier, 2 * bytes);
    bulk_load(s_ + begin, at.s + begin_ + begin, bytes, barrier);
    bulk_load(s_ + slice_ + begin, at.t + begin_ + begin, bytes, barrier);
  }

  const RowProblem& problem_;
  Barrier* barriers_;
  const int &slice_, &part_;
  T* s_;
  int begin_, count_, next_ = -1;  // the next row, -1 if it is not valid
  uint32_t parity_ = 0;
  bool first_ = true;
};

template <class T>
KDK_KERNEL void KDK_BOUNDS(kClusterThreads, 2)
    row_cluster(KDK_PARAMETER RowTask task, KDK_PARAMETER int slice, KDK_PARAMETER int part) {
  Cluster group;
  Slices<T> slices(task.problem, slice, part);
  walk_rows<Rule, float, false>(task, group, block_index() / cluster_size(), 0,
                                block_count() / cluster_size(),
                                [&](int64_t row, bool valid, int64_t next, bool next_valid) {
                                  return slices.load(row, valid, next, next_valid);
                                });
}

template <class T>
void run(const RowTask& task, const RowPlan& plan, void* stream) {
  // Parts of whole turns of the unrolled loops.
  constexpr int kParts = Slices<T>::kParts;
  const int turn = 2 * plan.threads * kPack<T>, quarter = (plan.slice + kParts - 1) / kParts;
  launch<row_cluster<T>>({plan.blocks, plan.threads, plan.cluster, size_t(plan.shared), false},
                         stream, task, plan.slice, (quarter + turn - 1) / turn * turn);
}

}  // namespace

void KDK_JOIN(KDK_RULE, _row_cluster)(const RowTask& task, const RowPlan& plan, void* stream) {
  with_type(task.problem.student.type,
            [&](auto of) { run<typename decltype(of)::type>(task, plan, stream); });
}

}  // namespace kdkernels::cuda
