// Tiles of rows between memory and shared memory, sixteen bytes at a time, as they are.
#pragma once

#include "correlation.h"
#include "packs.cuh"

namespace kdkernels::cuda {

struct Tile {
  int64_t row;  // the first
  int rows;
  int64_t run, within;  // the run that holds it, 0 but for planes, and the first row's place in it
};

// The tiles of a problem whose tensors lie alike (CorrelationPlan::layout), T in all of them. Element
// (row, class) of a tile lies at row * row_pitch + class * class_pitch in shared memory.
template <class T>
class Tiles {
 public:
  KDK_DEVICE Tiles(const CorrelationProblem& problem, const CorrelationPlan& plan)
      : problem_(problem),
        plan_(plan),
        planes_(plan.layout == TileLayout::planes),
        classes_(int(problem.classes)),
        run_(planes_ ? plan.run : problem.rows),
        in_run_(unsigned((run_ + plan.tile - 1) / plan.tile)),
        packs_(packs_of(plan.tile)),
        step_(thread_count() / packs_),
        rest_(thread_count() % packs_) {}

  KDK_DEVICE unsigned count() const {
    return planes_ ? in_run_ * unsigned(problem_.rows / run_) : in_run_;
  }
  KDK_DEVICE Tile tile(unsigned index) const {
    const unsigned run = planes_ ? index / in_run_ : 0;
    const int64_t within = int64_t(index - run * in_run_) * plan_.tile, left = run_ - within;
    return {run * run_ + within, int(left < plan_.tile ? left : plan_.tile), run, within};
  }

  // Starts to copy the logits of a tile: by `barrier`, announced here, or as this thread's copies.
  KDK_DEVICE void fetch(const Tile& tile, T* student, T* teacher, Barrier* barrier) const {
    const T* const s = at(problem_.student, tile);
    const T* const t = at(problem_.teacher, tile);
    const int64_t from_s = step(problem_.student), from_t = step(problem_.teacher);
    each_rest(tile, [&](int place) {
      student[place] = s[place];
      teacher[place] = t[place];
    });
    if (plan_.bulk) {
      const int elements = packs_of(tile.rows) * kPack<T>, lines = lines_of(tile);
      const unsigned bytes = unsigned(elements) * unsigned(sizeof(T));
      if (thread_index() == 0) barrier_expect(barrier, 2 * bytes * unsigned(lines));
      // A warp's copies start one after the other: lines are dealt out to warps.
      const int first = thread_index() % 32 * (thread_count() / 32) + thread_index() / 32;
      for (int line = first; line < lines && bytes > 0; line += thread_count()) {
        bulk_load(student + line * pitch(), s + line * from_s, bytes, barrier);
        bulk_load(teacher + line * pitch(), t + line * from_t, bytes, barrier);
      }
      return;
    }
    each_pack(tile, [&](int line, int within, int place) {
      copy16_async(student + place, s + line * from_s + within);
      copy16_async(teacher + place, t + line * from_t + within);
    });
    commit_copies();
  }

  KDK_DEVICE void store(const Tile& tile, const T* gradient) const {
    T* const g = at(problem_.gradient, tile);
    const int64_t to = step(problem_.gradient);
    each_pack(tile, [&](int line, int within, int place) {
      store16(g + line * to + within, load16_shared(gradient + place));
    });
    each_rest(tile, [&](int place) { g[place] = gradient[place]; });
  }

 private:
  // Packs of a line: of the whole tile, a row, or a class.
  KDK_DEVICE int packs_of(int rows) const {
    const int elements = planes_                              ? rows
                         : plan_.layout == TileLayout::flat ? rows * classes_
                                                              : classes_;
    return elements / kPack<T>;
  }
  KDK_DEVICE T* at(const Rows& x, const Tile& tile) const {
    return static_cast<T*>(x.data) + (planes_ ? (x.dims > 1 ? tile.run * x.stride[0] : 0) + tile.within
                                              : tile.within * x.stride[0]);
  }
  KDK_DEVICE int64_t step(const Rows& x) const { return planes_ ? x.class_stride : x.stride[0]; }

  KDK_DEVICE int lines_of(const Tile& tile) const {
    return planes_ ? classes_ : plan_.layout == TileLayout::flat ? 1 : tile.rows;
  }
  KDK_DEVICE int pitch() const { return planes_ ? plan_.class_pitch : plan_.row_pitch; }

  // f(line, element of the line, place in shared memory) for this thread's packs.
  template <class F>
  KDK_DEVICE void each_pack(const Tile& tile, const F& f) const {
    if (plan_.layout == TileLayout::flat) {
      const int elements = packs_of(tile.rows) * kPack<T>;
      KDK_UNROLL_BY(2)
      for (int i = thread_index() * kPack<T>; i < elements; i += thread_count() * kPack<T>)
        f(0, i, i);
      return;
    }
    const int lines = lines_of(tile);
    int packs = packs_, step = step_, rest = rest_;
    if (planes_ && tile.rows != plan_.tile) {
      packs = packs_of(tile.rows);
      step = thread_count() / packs;
      rest = thread_count() % packs;
    }
    int line = thread_index() / packs, pack = thread_index() % packs;
    while (line < lines) {
      f(line, pack * kPack<T>, line * pitch() + pack * kPack<T>);
      line += step;
      pack += rest;
      if (pack >= packs) {
        pack -= packs;
        ++line;
      }
    }
  }
  // The elements of the last flat tile that are no whole pack.
  template <class F>
  KDK_DEVICE void each_rest(const Tile& tile, const F& f) const {
    if (plan_.layout != TileLayout::flat) return;
    const int place = packs_of(tile.rows) * kPack<T> + thread_index();
    if (place < tile.rows * classes_) f(place);
  }

  const CorrelationProblem& problem_;
  const CorrelationPlan& plan_;
  bool planes_;
  int classes_;
  int64_t run_;              // rows of a run
  unsigned in_run_;          // tiles of a run
  int packs_, step_, rest_;  // of a line; what the block's threads step over, in lines and packs
};

}  // namespace kdkernels::cuda
