// Correlation of up to 1024 classes in one cooperative launch. (1) Tiles of rows: softmaxes in the
// registers of a few lanes a row, from there through shared memory to the columns' moments. (2) The
// columns combined. (3) The rows again, and their gradient. Inputs that fit the L2 cache are read from
// memory once (3 N C bytes an element's size), others twice (5 N C).
#include "correlation.cuh"
#include "launch.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

using R = float;

// Rows of one dtype, next to each other: straight into registers.
template <class T, int kLanes, int kElements>
class Direct {
 public:
  static constexpr bool kStaged = false;
  KDK_DEVICE Direct(const CorrelationProblem& problem, int64_t row, bool vector, R*, R*)
      : source_(RowPointers<T>(problem, row), int(problem.classes), vector, row < problem.rows,
                thread_index() % kLanes, kLanes) {}
  KDK_DEVICE int index(int j) const { return source_.index(j); }
  KDK_DEVICE void read(R (&s)[kElements], R (&t)[kElements]) const {
    int j = 0;
    source_.each([&](R a, R b) {
      s[j] = a;
      t[j++] = b;
    });
  }
  KDK_DEVICE void write(const R (&g)[kElements]) const {
    int j = 0;
    source_.emit([&](R, R) { return g[j++]; });
  }

 private:
  Registers<T, kElements> source_;
};

// Rows of any dtypes and strides, staged in shared memory.
template <int kLanes, int kElements>
class Staged {
 public:
  static constexpr bool kStaged = true;
  KDK_DEVICE Staged(const CorrelationProblem& problem, int64_t row, bool, R* s, R* t)
      : s_(s), t_(t), classes_(int(problem.classes)), exists_(row < problem.rows) {}
  KDK_DEVICE int index(int j) const { return j * kLanes + thread_index() % kLanes; }
  KDK_DEVICE void read(R (&s)[kElements], R (&t)[kElements]) const {
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) {
      const bool inside = index(j) < classes_;
      s[j] = !inside ? -R(INFINITY) : exists_ ? s_[index(j)] : R(0);
      t[j] = !inside ? -R(INFINITY) : exists_ ? t_[index(j)] : R(0);
    }
  }
  KDK_DEVICE void write(const R (&g)[kElements]) const {
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j)
      if (exists_ && index(j) < classes_) s_[index(j)] = g[j];
  }

 private:
  R *s_, *t_;
  int classes_;
  bool exists_;
};

// Calls f(row of the tile, class) for each element, neighbours by neighbouring threads.
template <class F>
KDK_DEVICE void for_tile(int rows, int classes, bool rows_adjacent, const F& f) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int warps = thread_count() / kWarp;
  if (rows_adjacent) {
    for (int c = warp; c < classes; c += warps)
      for (int r = lane; r < rows; r += kWarp) f(r, c);
  } else {
    for (int r = warp; r < rows; r += warps)
      for (int c = lane; c < classes; c += kWarp) f(r, c);
  }
}

template <class Source, int kLanes, int kElements>
KDK_KERNEL void KDK_BOUNDS(kTileThreads, tile_blocks(kElements))
    correlate(KDK_PARAMETER CorrelationTask task, KDK_PARAMETER CorrelationPlan plan,
              KDK_PARAMETER bool rows_adjacent) {
  const CorrelationProblem& problem = task.problem;
  const int classes = int(problem.classes), pitch = classes | 1;  // odd: rows in different banks
  const int items = classes * plan.groups;
  R* const moments = reinterpret_cast<R*>(shared_memory() + kBlockExchange);
  R* const tile_q = moments + kMoments * items;
  R* const tile_p = tile_q + plan.tile * pitch;
  const int64_t tiles = (problem.rows + plan.tile - 1) / plan.tile;
  const int row_of_pass = thread_index() / kLanes, rows_of_pass = kTileThreads / kLanes;
  const int rows_of_group = (plan.tile + plan.groups - 1) / plan.groups;
  const auto rows_in = [&](int64_t tile) {
    const int64_t left = problem.rows - tile * plan.tile;
    return int(left < plan.tile ? left : plan.tile);
  };
  const auto stage = [&](int64_t tile) {
    for_tile(rows_in(tile), classes, rows_adjacent, [&](int r, int c) {
      const int64_t row = tile * plan.tile + r;
      tile_q[r * pitch + c] = load_element<R>(
          problem.student, problem.student.offset(row) + c * problem.student.class_stride);
      tile_p[r * pitch + c] = load_element<R>(
          problem.teacher, problem.teacher.offset(row) + c * problem.teacher.class_stride);
    });
    sync_block();
  };

  // (1) A row past the end of its tile is computed on zeros, with its warp, and goes nowhere.
  double total = 0;
  int done = 0;  // tiles of this block
  for (int64_t tile = block_index(); tile < tiles; tile += block_count(), ++done) {
    const int count = rows_in(tile);
    if constexpr (Source::kStaged) stage(tile);
    for (int first = 0; first < count; first += rows_of_pass) {
      const int r = first + row_of_pass;
      const Source source(problem, r < count ? tile * plan.tile + r : problem.rows, plan.vector,
                          tile_q + r * pitch, tile_p + r * pitch);
      const auto inside = [&](int j) { return source.index(j) < classes; };
      RowPair<Rule, R, kLanes, kElements> pair;
      source.read(pair.q, pair.p);
      const R value = pair.relate(problem, inside);
      if (r >= count) continue;
      if (thread_index() % kLanes == 0) total += double(value);
      KDK_UNROLL
      for (int j = 0; j < kElements; ++j) {
        if (!inside(j)) continue;
        tile_q[r * pitch + source.index(j)] = pair.q[j];
        tile_p[r * pitch + source.index(j)] = pair.p[j];
      }
    }
    sync_block();
    for (int item = thread_index(); item < items; item += kTileThreads) {
      const int c = item % classes, group = item / classes;
      const int begin = group * rows_of_group;
      const int full = plan.tile - begin < rows_of_group ? plan.tile - begin : rows_of_group;
      const int end = begin + full < count ? begin + full : count;
      Moments<R> sum;
      R before = R(done) * R(full > 0 ? full : 0);
      if (done) {
        sum = {moments[item], moments[items + item], moments[2 * items + item],
               moments[3 * items + item], moments[4 * items + item]};
      }
      for (int first = begin; first < end; first += kCachedRows) {
        const int cached = end - first < kCachedRows ? end - first : kCachedRows;
        R q[kCachedRows], p[kCachedRows];
        KDK_UNROLL
        for (int r = 0; r < kCachedRows; ++r) {
          q[r] = r < cached ? tile_q[(first + r) * pitch + c] : R(0);
          p[r] = r < cached ? tile_p[(first + r) * pitch + c] : R(0);
        }
        sum.merge(moments_of(q, p, cached), before, R(cached));
        before += R(cached);
      }
      moments[item] = sum.mean_q;
      moments[items + item] = sum.mean_p;
      moments[2 * items + item] = sum.qq;
      moments[3 * items + item] = sum.pp;
      moments[4 * items + item] = sum.qp;
      if (tile + block_count() >= tiles) {
        const int part = block_index() * plan.groups + group;
        store_partial<R>(task, plan.parts, part, c, sum);
        if (c == 0) task.counts[part] = int64_t(before);
      }
    }
    sync_block();
  }

  // (2)
  sync_grid();
  total += combine_columns<Rule, R>(task, plan.parts, moments);
  keep_total(task, total);
  sync_grid();
  finish_total<R>(task);
  if (!problem.gradient.data) return;

  // (3)
  Column<R>* const columns = reinterpret_cast<Column<R>*>(shared_memory() + kBlockExchange);
  sync_block();
  for (int c = thread_index(); c < classes; c += kTileThreads) {
    const Column<R>* const from = static_cast<const Column<R>*>(task.columns) + c;
    columns[c] = {load_fresh(&from->mean_q), load_fresh(&from->mean_p), load_fresh(&from->of_q),
                  load_fresh(&from->of_p)};
  }
  sync_block();
  const R factor = gradient_factor<R>(task);
  for (int64_t tile = block_index(); tile < tiles; tile += block_count()) {
    const int count = rows_in(tile);
    if constexpr (Source::kStaged) stage(tile);
    for (int first = 0; first < count; first += rows_of_pass) {
      const int r = first + row_of_pass;
      const Source source(problem, r < count ? tile * plan.tile + r : problem.rows, plan.vector,
                          tile_q + r * pitch, tile_p + r * pitch);
      const auto inside = [&](int j) { return source.index(j) < classes; };
      RowPair<Rule, R, kLanes, kElements> pair;
      source.read(pair.q, pair.p);
      pair.relate(problem, inside);
      pair.differentiate(problem, factor, inside, [&](int j) { return columns[source.index(j)]; });
      source.write(pair.q);
    }
    if constexpr (Source::kStaged) {
      sync_block();
      for_tile(count, classes, rows_adjacent, [&](int r, int c) {
        store_element<R>(problem.gradient,
                         problem.gradient.offset(tile * plan.tile + r) +
                             c * problem.gradient.class_stride,
                         tile_q[r * pitch + c]);
      });
      sync_block();
    }
  }
}

template <template <int, int> class Source>
void run(const CorrelationTask& task, const CorrelationPlan& plan, bool rows_adjacent,
         void* stream) {
  const LaunchShape shape{plan.blocks, plan.threads, 1, size_t(plan.shared), true};
  if (plan.lanes == 4)
    return launch<correlate<Source<4, 8>, 4, 8>>(shape, stream, task, plan, rows_adjacent);
  if (plan.lanes == 16)
    return launch<correlate<Source<16, 8>, 16, 8>>(shape, stream, task, plan, rows_adjacent);
  if (plan.elements == 8)
    return launch<correlate<Source<32, 8>, 32, 8>>(shape, stream, task, plan, rows_adjacent);
  if (plan.elements == 16)
    return launch<correlate<Source<32, 16>, 32, 16>>(shape, stream, task, plan, rows_adjacent);
  launch<correlate<Source<32, 32>, 32, 32>>(shape, stream, task, plan, rows_adjacent);
}

template <int kLanes, int kElements>
using DirectF16 = Direct<f16, kLanes, kElements>;
template <int kLanes, int kElements>
using DirectBF16 = Direct<bf16, kLanes, kElements>;
template <int kLanes, int kElements>
using DirectF32 = Direct<float, kLanes, kElements>;

}  // namespace

void KDK_JOIN(KDK_RULE, _correlation_tile)(const CorrelationTask& task,
                                           const CorrelationPlan& plan, void* stream) {
  const Rows& student = task.problem.student;
  if (plan.traversal == CorrelationTraversal::staged)
    return run<Staged>(task, plan, student.class_stride != 1 && student.stride[student.dims - 1] == 1,
                       stream);
  switch (student.type) {
    case Scalar::f16: return run<DirectF16>(task, plan, false, stream);
    case Scalar::bf16: return run<DirectBF16>(task, plan, false, stream);
    default: return run<DirectF32>(task, plan, false, stream);
  }
}

}  // namespace kdkernels::cuda
