// Correlation of up to 512 classes in one cooperative launch, for rows without number. A few lanes
// share a row, and keep to their classes: the moments of the columns stay in their registers from row
// to row (Welford's recurrence), as do the columns' terms for the gradient. Tiles of rows come
// ahead of their use through asynchronous copies. (1) Rows: softmaxes, relations, moments. (2) The
// columns combined. (3) The rows again, from their saved terms, and their gradient. Memory is read
// twice and written once (5 N C bytes an element's size), or read once where the cache holds the inputs.
#include "correlation.cuh"
#include "correlation_copies.cuh"
#include "launch.cuh"
#include "unit.cuh"

namespace kdkernels::cuda {
namespace {

using R = float;

// Which row of a pass a thread takes, and which classes: lane, lane + lanes, ...
template <int kElements>
struct Seat {
  int lanes, lane, row, rows;  // rows of a pass
  int classes;                 // of this lane: kElements, or one or two less

  KDK_DEVICE explicit Seat(const CorrelationProblem& problem, const CorrelationPlan& plan)
      : lanes(plan.lanes), lane(thread_index() & (plan.lanes - 1)), rows(kTileThreads / plan.lanes) {
    const int warps = kTileThreads / kWarp, warp = thread_index() / kWarp;
    row = plan.spread ? thread_index() % kWarp / lanes * warps + warp : thread_index() / lanes;
    classes = (int(problem.classes) - lane + lanes - 1) / lanes;
  }
  KDK_DEVICE bool inside(int j) const { return j < kElements - 2 || j < classes; }
  KDK_DEVICE int at(int j) const { return lane + j * lanes; }

  template <class Op, int N>
  KDK_DEVICE void reduce(R (&x)[N]) const {
    reduce_lanes<Op>(x, lanes);
  }
};

// This lane's logits of a row, -inf in place of classes that it does not have.
template <class T, int kElements>
KDK_DEVICE void read_row(const Seat<kElements>& seat, const T* s, const T* t, int step,
                         R (&q)[kElements], R (&p)[kElements]) {
  KDK_UNROLL
  for (int j = 0; j < kElements; ++j) {
    q[j] = p[j] = -R(INFINITY);
    if (seat.inside(j)) {
      q[j] = widen(s[j * step]);
      p[j] = widen(t[j * step]);
    }
  }
}

// Logits to softmaxes. Returns the row's value.
template <int kElements>
KDK_DEVICE R relate(const CorrelationProblem& problem, const Seat<kElements>& seat, R k,
                    R (&q)[kElements], R (&p)[kElements], RowTerms<R>& terms) {
  R most[2] = {-R(INFINITY), -R(INFINITY)};
  KDK_UNROLL
  for (int j = 0; j < kElements; ++j) {
    most[0] = larger(q[j], most[0]);
    most[1] = larger(p[j], most[1]);
  }
  seat.template reduce<Max>(most);
  const Exponent<R> exponent_s(most[0], k), exponent_t(most[1], k);
  R z[2] = {0, 0};
  KDK_UNROLL
  for (int j = 0; j < kElements; ++j) {
    q[j] = exponent_s(q[j]);
    p[j] = exponent_t(p[j]);
    z[0] += q[j];
    z[1] += p[j];
  }
  seat.template reduce<Sum>(z);
  // Of C equal logits z is C, and q just what the mean is.
  const R inverse[2] = {reciprocal(z[0]), reciprocal(z[1])};
  const R mean = R(1.0 / double(problem.classes));
  R sums[3] = {0, 0, 0};
  KDK_UNROLL
  for (int j = 0; j < kElements; ++j) {
    q[j] = product(q[j], inverse[0]);
    p[j] = product(p[j], inverse[1]);
    const R centre = seat.inside(j) ? mean : R(0);  // q and p are 0 there
    const R a = q[j] - centre, b = p[j] - centre;
    sums[0] = multiply_add(a, a, sums[0]);
    sums[1] = multiply_add(b, b, sums[1]);
    sums[2] = multiply_add(a, b, sums[2]);
  }
  seat.template reduce<Sum>(sums);
  R of_q, of_p;
  const R value = Rule::relation(sums[0], sums[1], sums[2], R(problem.eps), of_p, of_q);
  const R inter = R(problem.inter);
  terms = {most[0], inverse[0], most[1], inverse[1], of_q * inter, of_p * inter};
  return value * inter;
}

// One row more, the `count`-th, in the moments of this lane's columns.
template <int kElements>
KDK_DEVICE void add_row(const R (&q)[kElements], const R (&p)[kElements], int count,
                        Moments<R> (&columns)[kElements]) {
  const R share = Moments<R>::share_of(count);
  KDK_UNROLL
  for (int j = 0; j < kElements; ++j) {
    columns[j].add(q[j], p[j], share);
  }
}

// The moments of all rows of the block, to part `block_index` of the partial moments: the rows of a
// warp are merged by its lanes, the warps in order through shared memory.
template <int kElements>
KDK_DEVICE void store_moments(const CorrelationTask& task, const Seat<kElements>& seat, int parts,
                              int count, Moments<R> (&columns)[kElements], R* scratch) {
  const int classes = int(task.problem.classes), warp = thread_index() / kWarp;
  for (int mask = seat.lanes; mask < kWarp; mask *= 2) {
    const int others = shuffle_xor(count, mask);
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) {
      Moments<R>& m = columns[j];
      const Moments<R> other{shuffle_xor(m.mean_q, mask), shuffle_xor(m.mean_p, mask),
                             shuffle_xor(m.qq, mask), shuffle_xor(m.pp, mask),
                             shuffle_xor(m.qp, mask)};
      if (others > 0) m.merge(other, R(count), R(others));
    }
    count += others;
  }
  constexpr int kWarps = kTileThreads / kWarp;
  int* const counts = reinterpret_cast<int*>(scratch + kWarps * kMoments * classes);
  sync_block();
  if (thread_index() % kWarp < seat.lanes) {
    R* const mine = scratch + warp * kMoments * classes;
    KDK_UNROLL
    for (int j = 0; j < kElements; ++j) {
      if (!seat.inside(j)) continue;
      R* const at = mine + seat.at(j);
      at[0] = columns[j].mean_q;
      at[classes] = columns[j].mean_p;
      at[2 * classes] = columns[j].qq;
      at[3 * classes] = columns[j].pp;
      at[4 * classes] = columns[j].qp;
    }
    if (seat.lane == 0) counts[warp] = count;
  }
  sync_block();
  for (int c = thread_index(); c < classes; c += kTileThreads) {
    Moments<R> sum;
    int before = 0;
    for (int w = 0; w < kWarps; ++w) {
      const R* const at = scratch + w * kMoments * classes + c;
      const Moments<R> m{at[0], at[classes], at[2 * classes], at[3 * classes], at[4 * classes]};
      if (counts[w] > 0) sum.merge(m, R(before), R(counts[w]));
      before += counts[w];
    }
    store_partial<R>(task, parts, block_index(), c, sum);
    if (c == 0) task.counts[block_index()] = before;
  }
}

// The gradient of one row by this lane's logits, in the place of q.
template <int kElements>
KDK_DEVICE void differentiate(const CorrelationProblem& problem, const Seat<kElements>& seat, R k,
                              R factor, const RowTerms<R>& terms,
                              const Column<R> (&columns)[kElements], R (&q)[kElements],
                              R (&p)[kElements]) {
  const Softmax<R> softmax_s(terms.most_s, terms.inverse_s, k);
  const Softmax<R> softmax_t(terms.most_t, terms.inverse_t, k);
  const R mean = R(1.0 / double(problem.classes));
  const R of_q = terms.of_q * factor, of_p = terms.of_p * factor, base = (of_q + of_p) * mean;
  R along[1] = {0};
  KDK_UNROLL
  for (int j = 0; j < kElements; ++j) {
    q[j] = softmax_s(q[j]);
    p[j] = softmax_t(p[j]);
    p[j] = slope_of(q[j], p[j], of_q, of_p, base, columns[j]);
    along[0] = multiply_add(q[j], p[j], along[0]);
  }
  seat.template reduce<Sum>(along);
  KDK_UNROLL
  for (int j = 0; j < kElements; ++j) q[j] *= p[j] - along[0];
}

template <class T, int kElements>
KDK_KERNEL void KDK_BOUNDS(kTileThreads, column_blocks(kElements))
    correlate_columns(KDK_PARAMETER CorrelationTask task, KDK_PARAMETER CorrelationPlan plan) {
  const CorrelationProblem& problem = task.problem;
  const Tiles<T> tiles(problem, plan);
  const Seat<kElements> seat(problem, plan);
  const R k = R(1.0 / problem.tau) * R(kLog2E);
  Barrier* const barriers = reinterpret_cast<Barrier*>(shared_memory() + kBlockExchange);
  char* const stages = shared_memory() + kBlockExchange + kBarrierBytes;
  RowTerms<R>* const rows = static_cast<RowTerms<R>*>(task.rows);
  const int begin = seat.lane * plan.class_pitch, step = seat.lanes * plan.class_pitch;
  const int mine = int((tiles.count() - 1 - block_index()) / block_count()) + 1;  // tiles
  const auto tile_at = [&](int i) {
    return tiles.tile(unsigned(block_index()) + unsigned(i) * unsigned(block_count()));
  };
  const auto student = [&](int stage) {
    return reinterpret_cast<T*>(stages + stage * 2 * kColumnTile);
  };
  const auto teacher = [&](int stage) {
    return reinterpret_cast<T*>(stages + stage * 2 * kColumnTile + kColumnTile);
  };
  unsigned phases = 0;  // a bit for each stage
  if (plan.bulk && thread_index() == 0) {
    barrier_init(barriers);
    barrier_init(barriers + 1);
    fence_barriers();
  }
  // f(tile, stage) for all tiles of this block, forwards or backwards, each after its copies.
  const auto each_tile = [&](bool forwards, const auto& f) {
    const auto nth = [&](int i) { return tile_at(forwards ? i : mine - 1 - i); };
    if (plan.bulk) fence_bulk();
    sync_block();  // nobody uses the stages any more
    Tile now = nth(0);
    tiles.fetch(now, student(0), teacher(0), barriers);
    for (int i = 0; i < mine; ++i) {
      const int stage = i % 2;
      if (plan.bulk) {
        barrier_wait(barriers + stage, phases >> stage & 1);
        phases ^= 1u << stage;
        fence_bulk();
      } else {
        wait_copies();
      }
      sync_block();  // all copies have come, and nobody reads the other stage any more
      Tile next{};
      if (i + 1 < mine) {
        next = nth(i + 1);
        tiles.fetch(next, student(1 - stage), teacher(1 - stage), barriers + 1 - stage);
      }
      f(now, stage);
      now = next;
    }
  };

  // (1) A row past the end of its tile is computed as the first one and goes nowhere.
  double total = 0;
  {
    Moments<R> columns[kElements];
    int count = 0;
    each_tile(true, [&](const Tile& tile, int stage) {
      for (int first = 0; first < tile.rows; first += seat.rows) {
        const int r = first + seat.row;
        const bool exists = r < tile.rows;
        const int at = (exists ? r : 0) * plan.row_pitch + begin;
        R q[kElements], p[kElements];
        RowTerms<R> terms;
        read_row(seat, student(stage) + at, teacher(stage) + at, step, q, p);
        const R value = relate(problem, seat, k, q, p, terms);
        if (!exists) continue;
        add_row(q, p, ++count, columns);
        if (seat.lane != 0) continue;
        total += double(value);
        if (problem.gradient.data) rows[tile.row + r] = terms;
      }
    });
    store_moments(task, seat, plan.parts, count, columns, reinterpret_cast<R*>(stages));
  }

  // (2)
  sync_grid();
  total += combine_columns<Rule, R>(task, plan.parts, reinterpret_cast<R*>(stages));
  keep_total(task, total);
  sync_grid();
  finish_total<R>(task);
  if (!problem.gradient.data) return;

  // (3) Backwards: the last tiles may still be in the cache.
  const R factor = gradient_factor<R>(task);
  Column<R> columns[kElements];
  KDK_UNROLL
  for (int j = 0; j < kElements; ++j) {
    columns[j] = {0, 0, 0, 0};
    if (!seat.inside(j)) continue;
    const int c = seat.at(j);
    columns[j] = {*column_term<R>(task, 0, c), *column_term<R>(task, 1, c),
                  *column_term<R>(task, 2, c) * factor, *column_term<R>(task, 3, c) * factor};
  }
  each_tile(false, [&](const Tile& tile, int stage) {
    T* const logits = student(stage);
    for (int first = 0; first < tile.rows; first += seat.rows) {
      const int r = first + seat.row;
      const bool exists = r < tile.rows;
      const int at = (exists ? r : 0) * plan.row_pitch + begin;
      R q[kElements], p[kElements];
      // A row past the end reads what nobody overwrites.
      const T* const t = teacher(stage) + at;
      read_row(seat, exists ? logits + at : t, t, step, q, p);
      differentiate(problem, seat, k, factor, rows[tile.row + (exists ? r : 0)], columns, q, p);
      if (!exists) continue;
      KDK_UNROLL
      for (int j = 0; j < kElements; ++j)
        if (seat.inside(j)) logits[at + j * step] = narrow<T>(q[j]);
    }
    sync_block();
    tiles.store(tile, logits);
  });
}

template <class T>
void run(const CorrelationTask& task, const CorrelationPlan& plan, void* stream) {
  const LaunchShape shape{plan.blocks, plan.threads, 1, size_t(plan.shared), true};
#define KDK_COLUMNS(elements) \
  case elements: return launch<correlate_columns<T, elements>>(shape, stream, task, plan);
  switch (plan.elements) {
    KDK_COLUMNS(4)
    KDK_COLUMNS(6)
    KDK_COLUMNS(8)
    KDK_COLUMNS(10)
    KDK_COLUMNS(12)
    KDK_COLUMNS(14)
    KDK_COLUMNS(16)
    KDK_COLUMNS(18)
    KDK_COLUMNS(19)
    KDK_COLUMNS(20)
  }
#undef KDK_COLUMNS
}

}  // namespace

void KDK_JOIN(KDK_RULE, _correlation_columns)(const CorrelationTask& task,
                                              const CorrelationPlan& plan, void* stream) {
  with_type(task.problem.student.type,
            [&](auto of) { run<typename decltype(of)::type>(task, plan, stream); });
}

}  // namespace kdkernels::cuda
