// Rows that one block cannot hold, spread over the shared memory of a thread-block cluster: bulk
// copies bring each logit in once, the next row's while the gradient of this one is written, and the blocks
// reduce through each other's shared memory. While one cluster waits for its copies or its barrier,
// another one on the same multiprocessors computes. Copies take whole packs of 16 bytes, so that threads of the
// first block load the classes around these; which those are differs from row to row where rows are odd.
#include "launch.cuh"
#include "row.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

// Rows::offset of fewer than 2^32 rows, whose divisions are short enough to stand in several places.
KDK_DEVICE int64_t offset_of(const Rows& x, uint32_t row) {
  int64_t at = 0;
  KDK_UNROLL_BY(1)
  for (int dim = x.dims - 1; dim > 0; --dim) {
    const uint32_t size = uint32_t(x.size[dim]);
    at += row % size * x.stride[dim];
    row /= size;
  }
  return at + row * x.stride[0];
}

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
        begin_(cluster_rank() * slice) {
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
      for (int begin = 0; begin < slice_; begin += part_) fetch(begin);
      first_ = false;
    }
    next_ = next_valid ? int(next) : -1;
    if (valid) {
      for (int begin = 0; begin < slice_; begin += part_)
        barrier_wait(barriers_ + begin / part_, parity_);
      parity_ ^= 1;
    }
    const RowPointers<T> at = pointers(index);
    return Shared<T, Slices>(at, s_, s_ + slice_, extent(at), begin_, slice_, part_, valid,
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
    return RowPointers<T>(problem_, row, [row](const Rows& x) { return offset_of(x, uint32_t(row)); });
  }
  KDK_DEVICE Extent<T> extent(const RowPointers<T>& at) const {
    return Extent<T>(Extent<T>::beside(at.s), int(problem_.classes));
  }
  KDK_DEVICE void fetch(int begin) const {
    if (next_ < 0 || thread_index() != 0) return;
    const RowPointers<T> at = pointers(next_);
    const Extent<T> row = extent(at);
    const int from = begin_ + begin, most = slice_ - begin < part_ ? slice_ - begin : part_;
    const uint32_t bytes = uint32_t(row.within(from, from + most) * sizeof(T));
    Barrier* const barrier = barriers_ + begin / part_;
    barrier_expect(barrier, 2 * bytes);
    if (bytes == 0) return;
    bulk_load(s_ + begin, at.s + row.head + from, bytes, barrier);
    bulk_load(s_ + slice_ + begin, at.t + row.head + from, bytes, barrier);
  }

  const RowProblem& problem_;
  Barrier* barriers_;
  const int &slice_, &part_;
  T* s_;
  int begin_, next_ = -1;  // the next row, -1 if it is not valid
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
