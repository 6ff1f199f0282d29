// Correlation of up to 1024 classes that correlation_columns.cu does not take, in one cooperative
// launch. (1) Tiles of rows: softmaxes in the registers of a few lanes a row, from there through
// shared memory to the columns' moments. (2) The columns combined. (3) The rows again, and their gradient. Inputs that fit the L2 cache are read from
// memory once (3 N C bytes an element's size), others twice (5 N C). Short rows take few lanes, since
// what is computed once a row costs a warp as much as thirty classes.
#include <type_traits>

#include "correlation.cuh"
#include "launch.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

using R = float;

struct alignas(8) Both {  // of student and teacher: logits, then softmaxes
  R q, p;
};

// Rows of one dtype and whole packs: straight into registers.
template <class T, int kLanes, int kElements>
class Direct {
 public:
  static constexpr bool kStaged = false;
  static constexpr int kWidth = kPack<T>;  // neighbouring classes of a lane
  KDK_DEVICE Direct(const CorrelationProblem& problem, int64_t row, Both*)
      : source_(RowPointers<T>(problem, row), int(problem.classes), true, row < problem.rows,
                thread_index() % kLanes, kLanes),
        left_(int(problem.classes) - thread_index() % kLanes * kWidth) {}
  KDK_DEVICE bool inside(int j) const { return j / kWidth * kWidth * kLanes < left_; }
  KDK_DEVICE int place(int j) const { return source_.place(j); }
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
  int left_;  // classes from this lane's first on
};

// Rows of any dtypes and strides, staged in shared memory.
template <int kLanes, int kElements>
class Staged {
 public:
  static constexpr bool kStaged = true;
  static constexpr int kWidth = 1;
  KDK_DEVICE Staged(const CorrelationProblem& problem, int64_t row, Both* staged)
      : mine_(staged + thread_index() % kLanes),
        left_(int(problem.classes) - thread_index() % kLanes),
        exists_(row < problem.rows) {}
  KDK_DEVICE bool inside(int j) const { return j * kLanes < left_; }
  KDK_DEVICE int place(int j) const { return j * kLanes + thread_index() % kLanes; }
  KDK_DEVICE void read(R (&s)[kElements], R (&t)[kElements]) const {
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) {
      const R fill = inside(j) ? R(0) : -R(INFINITY);
      const Both logits = inside(j) && exists_ ? mine_[j * kLanes] : Both{fill, fill};
      s[j] = logits.q;
      t[j] = logits.p;
    }
  }
  KDK_DEVICE void write(const R (&g)[kElements]) const {
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j)
      if (exists_ && inside(j)) mine_[j * kLanes].q = g[j];
  }

 private:
  Both* mine_;
  int left_;  // classes from this lane's first on
  bool exists_;
};

// Calls f(element of the tensor, its place in the tile) for `rows` rows from `row` on, neighbours by
// neighbouring threads. Pointers step from class to class: an address from indices costs more than the
// copy.
template <class T, class F>
KDK_DEVICE void for_tile(const Rows& x, T* data, int64_t row, int rows, int classes, int pitch,
                         bool rows_adjacent, Both* tile, const F& f) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int warps = thread_count() / kWarp;
  const int row_step = rows_adjacent ? kWarp : warps, class_step = rows_adjacent ? warps : kWarp;
  const int first = rows_adjacent ? warp : lane;
  const int64_t step = class_step * x.class_stride;
  for (int r = rows_adjacent ? lane : warp; r < rows; r += row_step) {
    T* at = data + x.offset(row + r) + first * x.class_stride;
    Both* const end = tile + r * pitch + classes;
    for (Both* place = tile + r * pitch + first; place < end; place += class_step, at += step)
      f(*at, *place);
  }
}

// Calls f with a pointer of the tensor's dtype, so that loops over elements do not ask for it.
template <class F>
KDK_DEVICE void with_type(const Rows& x, const F& f) {
  switch (x.type) {
    case Scalar::f16: return f(static_cast<f16*>(x.data));
    case Scalar::bf16: return f(static_cast<bf16*>(x.data));
    default: return f(static_cast<float*>(x.data));
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
  Both* const softmaxes = reinterpret_cast<Both*>(moments + (kMoments * items + 1) / 2 * 2);
  const int64_t tiles = (problem.rows + plan.tile - 1) / plan.tile;
  const int row_of_pass = thread_index() / kLanes, rows_of_pass = kTileThreads / kLanes;
  const int rows_of_group = (plan.tile + plan.groups - 1) / plan.groups;
  const auto rows_in = [&](int64_t tile) {
    const int64_t left = problem.rows - tile * plan.tile;
    return int(left < plan.tile ? left : plan.tile);
  };
  const auto stage = [&](int64_t tile) {
    const auto copy = [&](const Rows& x, R Both::* to) {
      with_type(x, [&](const auto* data) {
        for_tile(x, data, tile * plan.tile, rows_in(tile), classes, pitch, rows_adjacent, softmaxes,
                 [&](const auto& from, Both& place) { place.*to = widen(from); });
      });
    };
    copy(problem.student, &Both::q);
    copy(problem.teacher, &Both::p);
    sync_block();
  };
  // A place of a row in shared memory holds one class: lanes of a warp have places next to each other,
  // though they load several classes next to each other.
  const int strip = classes / Source::kWidth;
  const auto class_at = [&](int place) { return place % strip * Source::kWidth + place / strip; };

  // (1) A row past the end of its tile is computed on zeros, with its warp, and goes nowhere.
  double total = 0;
  int done = 0;  // tiles of this block
  for (int64_t tile = block_index(); tile < tiles; tile += block_count(), ++done) {
    const int count = rows_in(tile);
    if constexpr (Source::kStaged) stage(tile);
    for (int first = 0; first < count; first += rows_of_pass) {
      const int r = first + row_of_pass;
      const Source source(problem, r < count ? tile * plan.tile + r : problem.rows,
                          softmaxes + r * pitch);
      const auto inside = [&](int j) { return source.inside(j); };
      RowPair<Rule, R, kLanes, kElements> pair;
      source.read(pair.q, pair.p);
      const R value = pair.relate(problem, inside);
      if (r >= count) continue;
      if (thread_index() % kLanes == 0) total += double(value);
      KDK_UNROLL
      for (int j = 0; j < kElements; ++j) {
        if (inside(j)) softmaxes[r * pitch + source.place(j)] = {pair.q[j], pair.p[j]};
      }
    }
    sync_block();
    for (int item = thread_index(); item < items; item += kTileThreads) {
      const int place = item % classes, group = item / classes;
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
        const Both* at = softmaxes + first * pitch + place;
        // Whole groups of rows, the usual ones, need no test for each row.
        if (cached == kCachedRows) {
          KDK_UNROLL
          for (int r = 0; r < kCachedRows; ++r, at += pitch) {
            q[r] = at->q;
            p[r] = at->p;
          }
          sum.merge(moments_of(q, p, kCachedRows), before, R(kCachedRows));
        } else {
          KDK_UNROLL
          for (int r = 0; r < kCachedRows; ++r, at += pitch) {
            const Both both = r < cached ? *at : Both{0, 0};
            q[r] = both.q;
            p[r] = both.p;
          }
          sum.merge(moments_of(q, p, cached), before, R(cached));
        }
        before += R(cached);
      }
      moments[item] = sum.mean_q;
      moments[items + item] = sum.mean_p;
      moments[2 * items + item] = sum.qq;
      moments[3 * items + item] = sum.pp;
      moments[4 * items + item] = sum.qp;
      if (tile + block_count() >= tiles) {
        const int part = block_index() * plan.groups + group;
        store_partial<R>(task, plan.parts, part, class_at(place), sum);
        if (place == 0) task.counts[part] = int64_t(before);
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
  for (int place = thread_index(); place < classes; place += kTileThreads) {
    const int c = class_at(place);
    columns[place] = {*column_term<R>(task, 0, c), *column_term<R>(task, 1, c),
                      *column_term<R>(task, 2, c), *column_term<R>(task, 3, c)};
  }
  sync_block();
  const R factor = gradient_factor<R>(task);
  for (int64_t tile = block_index(); tile < tiles; tile += block_count()) {
    const int count = rows_in(tile);
    if constexpr (Source::kStaged) stage(tile);
    for (int first = 0; first < count; first += rows_of_pass) {
      const int r = first + row_of_pass;
      const Source source(problem, r < count ? tile * plan.tile + r : problem.rows,
                          softmaxes + r * pitch);
      const auto inside = [&](int j) { return source.inside(j); };
      RowPair<Rule, R, kLanes, kElements> pair;
      source.read(pair.q, pair.p);
      pair.relate(problem, inside);
      pair.differentiate(problem, factor, inside, [&](int j) { return columns[source.place(j)]; });
      source.write(pair.q);
    }
    if constexpr (Source::kStaged) {
      sync_block();
      with_type(problem.gradient, [&](auto* data) {
        using T = std::remove_reference_t<decltype(*data)>;
        for_tile(problem.gradient, data, tile * plan.tile, count, classes, pitch, rows_adjacent,
                 softmaxes, [&](T& to, const Both& place) { to = narrow<T>(place.q); });
      });
      sync_block();
    }
  }
}

template <template <int, int> class Source, bool kShort>
void run(const CorrelationTask& task, const CorrelationPlan& plan, bool rows_adjacent,
         void* stream) {
  const LaunchShape shape{plan.blocks, plan.threads, 1, size_t(plan.shared), true};
#define KDK_TILE(lanes, elements)                                                                 \
  case lanes * 64 + elements:                                                                     \
    return launch<correlate<Source<lanes, elements>, lanes, elements>>(shape, stream, task, plan, \
                                                                       rows_adjacent);
  switch (plan.lanes * 64 + plan.elements) {
    KDK_TILE(32, 24)
    KDK_TILE(32, 32)
  }
  if constexpr (kShort) {
    switch (plan.lanes * 64 + plan.elements) {
      KDK_TILE(1, 24)
      KDK_TILE(1, 32)
      KDK_TILE(4, 24)
      KDK_TILE(4, 32)
      KDK_TILE(8, 24)
      KDK_TILE(8, 32)
    }
  }
#undef KDK_TILE
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
    return run<Staged, true>(task, plan,
                             student.class_stride != 1 && student.stride[student.dims - 1] == 1,
                             stream);
  switch (student.type) {
    case Scalar::f16: return run<DirectF16, false>(task, plan, false, stream);
    case Scalar::bf16: return run<DirectBF16, false>(task, plan, false, stream);
    default: return run<DirectF32, false>(task, plan, false, stream);
  }
}

}  // namespace kdkernels::cuda
