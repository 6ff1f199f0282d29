// Tuples of a batch from its two matrices of distances (REFILLED, stage 1), a block per anchor.
//
// An anchor's tuples differ only in the positive. First a warp takes each positive: it mines the
// semi-hard negatives and sums the two softmaxes. Then a thread takes each negative and walks the
// positives, so that a piece of the gradient stays in its register. Every tuple's exponentials are
// relative to its own smallest distances, so that none of its sums can underflow.
#include "embedding.h"
#include "groups.cuh"
#include "launch.cuh"
#include "sources.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

// What a block keeps of its anchor, in shared memory or, of large batches, in the workspace.
template <class R>
struct Anchor {
  R* student;  // of each column: distances, NaN where the class is the anchor's
  R* teacher;
  R* at;                 // of each positive: the student's distance, NaN where there is no tuple
  R* from;               // the least of the teacher's distances in its tuple
  R *scale_s, *scale_t;  // 1 / sums of the exponentials
  R* shift;              // log p - log q = (student - teacher) / temperature - shift
  int32_t* index;        // column of each positive

  KDK_DEVICE Anchor(char* memory, int64_t batch) {
    R* base = reinterpret_cast<R*>(memory);
    R** const arrays[] = {&student, &teacher, &at, &from, &scale_s, &scale_t, &shift};
    KDK_UNROLL
    for (int k = 0; k < kTupleColumnArrays; ++k) *arrays[k] = base + k * batch;
    index = reinterpret_cast<int32_t*>(base + kTupleColumnArrays * batch);
  }
};

template <class R>
struct Scales {  // of distances
  R natural, two;  // 1 / temperature, for exp and for 2^x
  R margin;
  R slope;  // what a slope counts in the gradient
};

// The sum of `count` over the threads before this one; `total` over all.
KDK_DEVICE int scan(int count, int& total) {
  int32_t* const warps = reinterpret_cast<int32_t*>(shared_memory() + Block::kExchangeBytes);
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  int sum = count;
  KDK_UNROLL
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = shuffle(sum, (lane - step) & (kWarp - 1));
    if (lane >= step) sum += before;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  sync_block();
  total = 0;
  int before = 0;
  for (int i = 0; i < thread_count() / kWarp; ++i) {
    if (i == warp) before = total;
    total += warps[i];
  }
  return before + sum - count;
}

// Fills the columns and lists the positives, in an order that only the sizes determine; returns how
// many there are.
template <class R>
KDK_DEVICE int list_positives(const TupleProblem& problem, int64_t row, const Anchor<R>& anchor) {
  const int batch = int(problem.batch);
  const int64_t label = problem.target[row];
  const R* const s = static_cast<const R*>(problem.student) + row * batch;
  const R* const t = static_cast<const R*>(problem.teacher) + row * batch;
  int mine = 0;
  for (int i = thread_index(); i < batch; i += thread_count()) {
    const bool same = problem.target[i] == label;
    anchor.student[i] = same ? R(NAN) : s[i];
    anchor.teacher[i] = t[i];
    mine += same && i != row;
  }
  int count = 0, next = scan(mine, count);
  for (int i = thread_index(); i < batch; i += thread_count()) {
    if (problem.target[i] != label || i == row) continue;
    anchor.index[next] = i;
    anchor.at[next++] = s[i];
  }
  sync_block();
  return count;
}

// The tuple of a positive, by the 32 lanes of a warp; leaves its sums in the anchor. Returns
// whether there is one, with the positive's own part of the divergence and its slope.
template <class R>
KDK_DEVICE bool sum_tuple(const Anchor<R>& anchor, int batch, int positive, const Scales<R>& k,
                          R& value, R& slope) {
  Lanes<kWarp> group;
  const R at = anchor.at[positive], teacher = anchor.teacher[anchor.index[positive]];
  R least[1] = {teacher}, found[1] = {0};
  for (int i = group.rank(); i < batch; i += kWarp) {
    const R gap = anchor.student[i] - at;
    if (!(gap > R(0) && gap <= k.margin)) continue;
    found[0] = R(1);
    if (anchor.teacher[i] < least[0]) least[0] = anchor.teacher[i];
  }
  least[0] = -least[0];
  group.reduce<Max>(least);
  group.reduce<Max>(found);
  if (found[0] == R(0)) {
    if (group.rank() == 0) anchor.at[positive] = R(NAN);
    return false;
  }
  const R from = -least[0];
  R sums[2] = {0, 0};
  for (int i = group.rank(); i < batch; i += kWarp) {
    const R gap = anchor.student[i] - at;
    if (!(gap > R(0) && gap <= k.margin)) continue;
    sums[0] += power_of_two(-gap * k.two);
    sums[1] += power_of_two((from - anchor.teacher[i]) * k.two);
  }
  group.reduce<Sum>(sums);
  const R e = power_of_two((from - teacher) * k.two);
  const R scale_s = R(1) / (sums[0] + R(1)), sum_t = sums[1] + e, scale_t = R(1) / sum_t;
  const R shift = std::log(sum_t * scale_s) - (from - at) * k.natural;
  Rule::member(R(e * scale_t), scale_s, R((at - teacher) * k.natural - shift), value, slope);
  if (group.rank() == 0) {
    anchor.from[positive] = from;
    anchor.scale_s[positive] = scale_s;
    anchor.scale_t[positive] = scale_t;
    anchor.shift[positive] = shift;
  }
  return true;
}

// One negative's part of all tuples that have it.
template <class R>
KDK_DEVICE R negative_terms(const Anchor<R>& anchor, int column, int positives, const Scales<R>& k,
                            R& slopes) {
  const R student = anchor.student[column], teacher = anchor.teacher[column];
  const R difference = (student - teacher) * k.natural;
  R total = 0;
  slopes = 0;
  for (int p = 0; p < positives; ++p) {
    const R gap = student - anchor.at[p];
    if (!(gap > R(0) && gap <= k.margin)) continue;
    R value, slope;
    Rule::member(R(power_of_two((anchor.from[p] - teacher) * k.two) * anchor.scale_t[p]),
                 R(power_of_two(-gap * k.two) * anchor.scale_s[p]), R(difference - anchor.shift[p]),
                 value, slope);
    total += value;
    slopes += slope;
  }
  return total;
}

template <class R>
KDK_KERNEL void KDK_BOUNDS(kBlockThreads, 1) tuple_pairs(KDK_PARAMETER TupleTask task) {
  const TupleProblem& problem = task.problem;
  const int batch = int(problem.batch), warps = thread_count() / kWarp;
  const Anchor<R> anchor(
      task.scratch ? task.scratch + block_index() * task.scratch_bytes
                   : shared_memory() + Block::kExchangeBytes + kTupleScanBytes,
      batch);
  const double inverse = 1.0 / problem.temperature;
  const Scales<R> k{R(inverse), R(inverse * kLog2E), R(problem.margin), R(-inverse * task.scale)};
  Block block;
  for (int64_t row = block_index(); row < batch; row += block_count()) {
    const int positives = list_positives(problem, row, anchor);
    R* const gradient =
        problem.gradient ? static_cast<R*>(problem.gradient) + row * batch : nullptr;
    double sums[2] = {0, 0};  // of the divergences, and of the tuples
    for (int p = thread_index() / kWarp; p < positives; p += warps) {
      R value = 0, slope = 0;
      const bool found = sum_tuple(anchor, batch, p, k, value, slope);
      if (thread_index() % kWarp != 0) continue;
      sums[0] += double(value);
      sums[1] += found ? 1.0 : 0.0;
      if (gradient) gradient[anchor.index[p]] = k.slope * slope;
    }
    sync_block();
    const int64_t label = problem.target[row];
    for (int i = thread_index(); i < batch; i += thread_count()) {
      if (problem.target[i] == label) {
        if (gradient && i == row) gradient[i] = R(0);
        continue;
      }
      R slope;
      sums[0] += double(negative_terms(anchor, i, positives, k, slope));
      if (gradient) gradient[i] = k.slope * slope;
    }
    block.reduce<Sum>(sums);
    if (thread_index() == 0) {
      problem.loss[row] = sums[0];
      problem.tuples[row] = int64_t(sums[1]);
    }
  }
}

// The anchors' values in order, and the mean over all tuples; the gradient is divided by as many
// blocks as there are, each of which adds up the tuples.
template <class R>
KDK_KERNEL void KDK_BOUNDS(kClosingThreads, 1) close_tuples(KDK_PARAMETER TupleTask task) {
  const TupleProblem& problem = task.problem;
  Block block;
  int64_t tuples[1] = {0};
  for (int64_t i = thread_index(); task.mean && i < problem.batch; i += thread_count())
    tuples[0] += problem.tuples[i];
  block.reduce<Sum>(tuples);
  const double count = double(tuples[0] > 0 ? tuples[0] : 1);
  if (block_index() == 0) {
    double sum[1] = {0};
    for (int64_t i = thread_index(); i < problem.batch; i += thread_count())
      sum[0] += problem.loss[i];
    block.reduce<Sum>(sum);
    if (thread_index() == 0) *static_cast<R*>(task.total) = R(sum[0] * (task.scale / count));
  }
  if (!problem.gradient || count == 1.0) return;
  const R factor = R(1.0 / count);
  R* const gradient = static_cast<R*>(problem.gradient);
  const int64_t size = problem.batch * problem.batch, packs = size / kPack<R>;
  const int64_t first = int64_t(block_index()) * thread_count() + thread_index();
  const int64_t step = int64_t(block_count()) * thread_count();
  for (int64_t at = first; at < packs; at += step) {
    Pack<R>* const place = reinterpret_cast<Pack<R>*>(gradient) + at;
    Pack<R> pack = *place;
    KDK_UNROLL
    for (int k = 0; k < kPack<R>; ++k) pack.x[k] *= factor;
    *place = pack;
  }
  for (int64_t at = packs * kPack<R> + first; at < size; at += step) gradient[at] *= factor;
}

template <class R>
void run(const TupleTask& task, const TuplePlan& plan, void* stream) {
  launch<tuple_pairs<R>>({plan.blocks, plan.threads, 1, size_t(plan.shared)}, stream, task);
  const int blocks = task.mean && task.problem.gradient ? plan.closing_blocks : 1;
  launch<close_tuples<R>>({blocks, kClosingThreads, 1, kBlockExchange}, stream, task);
}

}  // namespace

void KDK_JOIN(KDK_RULE, _tuple_pairs)(const TupleTask& task, const TuplePlan& plan, bool wide,
                                      void* stream) {
  wide ? run<double>(task, plan, stream) : run<float>(task, plan, stream);
}

}  // namespace kdkernels::cuda
