// The launcher of the emulator: runs a kernel's threads as fibers in an order drawn from a seed.
//
// A fiber runs until it waits, or until a point where another may be chosen, so a result that
// depends on a missing barrier changes with the seed. What a GPU leaves undefined is an error here
// wherever it can be noticed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_set>
#include <vector>

#include "fibers.h"

namespace kdkernels::cuda {

// Determines every choice of the launches after it was set.
inline uint64_t emulator_seed = 1;
// Of all kernels so far.
inline int emulator_launches = 0;

struct LaunchShape {
  int blocks, threads;
  int cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

namespace emulator {

enum class Wait { nothing, block, warp, cluster, grid, shuffle, copies };
inline const char* name_of(Wait wait) {
  constexpr const char* kNames[] = {"nothing",   "sync_block", "sync_warp",   "sync_cluster",
                                    "sync_grid", "shuffle",    "barrier_wait"};
  return kNames[int(wait)];
}

struct Block;

struct Fiber {
  Context context;
  char* stack = nullptr;
  Block* block = nullptr;
  int thread = 0;
  Wait waits = Wait::nothing;
  bool finished = false;
  struct Ahead {  // an asynchronous copy of this thread
    void* to;
    const void* from;
    uint64_t group;  // commits before its own
  };
  std::vector<Ahead> ahead;
  uint64_t commits = 0;
  std::unordered_set<uintptr_t> unfenced;  // sixteens of bytes that it read since its last fence_bulk
};

// Threads that wait for each other.
struct Group {
  int size = 0;
  std::vector<Fiber*> waiting;
};

struct Warp : Group {
  unsigned shuffles = 0;
  uint64_t value[2][32];  // of this shuffle, and of the one before, which some may yet have to read
};

// What the emulator keeps of a Barrier in shared memory, which itself holds kInitialised only.
struct BarrierState {
  uint64_t* address;
  int owner;              // the thread that initialised it
  bool fenced = false;
  uint64_t syncs = 0, meetings = 0;  // of the block when it was fenced
  uint64_t uses = 0;      // completed
  bool announced = false;
  int64_t missing = 0;    // bytes announced and not copied; negative if copied before they were
  std::vector<uint64_t> waits;   // of each thread
  bool stored = false;           // store_remote has used it
  std::vector<Fiber*> waiting;
};
constexpr uint64_t kInitialised = 0xba551e55ba551e55u;

struct Cluster {
  Group group;
  Block* first = nullptr;
};

struct Block {
  int index = 0, rank = 0, finished = 0;
  uint64_t syncs = 0, meetings = 0;  // of the block, and of its cluster
  char* shared = nullptr;
  Group group;
  Cluster* cluster = nullptr;
  std::vector<Warp> warps;
  std::deque<BarrierState> barriers;
};

struct Copy {
  Block* block;
  BarrierState* barrier;
  void* to;
  const void* from;  // null: `held`
  uint32_t bytes;
  char held[16];
};

class Launch;
inline thread_local Launch* launch = nullptr;
inline thread_local Fiber* running = nullptr;

class Launch {
 public:
  const LaunchShape shape;
  std::vector<Block> blocks;  // those that run now
  std::vector<Fiber> fibers;
  std::vector<Fiber*> runnable;
  std::vector<Copy> copies;
  std::unordered_set<uintptr_t> written;  // sixteens of bytes of global memory, by store16
  Group grid;
  std::exception_ptr error;

  Launch(const LaunchShape& s, std::function<void()> body) : shape(s), body_(std::move(body)) {
    const auto demand = [](bool holds, const char* what) {
      if (!holds) throw std::runtime_error(std::string("emulate: ") + what);
    };
    demand(!launch, "a kernel cannot launch another");
    demand(s.blocks > 0 && s.threads > 0 && s.threads <= 1024, "blocks of 1 to 1024 threads");
    demand(s.cluster > 0 && s.cluster <= 16 && s.blocks % s.cluster == 0,
           "clusters of 1 to 16 blocks must divide the grid");
    demand(s.shared_bytes <= 232448, "a block has at most 227 KB of shared memory");
    const int together = s.cooperative ? s.blocks : s.cluster;
    blocks.resize(together);
    clusters_.resize(together / s.cluster);
    fibers.resize(size_t(together) * s.threads);
    stride_ = (2 * kGuard + s.shared_bytes + 255) / 256 * 256;
    shared_.resize(256 + together * stride_);
    state_ = emulator_seed;
  }

  void run() {
    launch = this;
    const struct Leave {
      ~Leave() { launch = nullptr, running = nullptr; }
    } leave;
    const int together = int(blocks.size());
    std::vector<int> order(shape.blocks / together);
    for (size_t i = 0; i < order.size(); ++i) {
      const size_t j = random(unsigned(i + 1));
      order[i] = order[j];
      order[j] = int(i);
    }
    for (int wave : order) run_together(wave * together);
  }

  unsigned random(unsigned below) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;  // splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return unsigned(((z ^ (z >> 31)) >> 32) * below >> 32);
  }

  void resume(std::vector<Fiber*>& waiting) {
    runnable.insert(runnable.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }
  void suspend() { switch_context(running->context, scheduler_); }

  void complete_use(BarrierState& barrier) {
    if (!barrier.announced || barrier.missing != 0) return;
    barrier.announced = false;
    ++barrier.uses;
    resume(barrier.waiting);
  }

  // The block, of those that run, in whose shared memory the bytes lie.
  Block* owner(const void* p, size_t bytes) {
    const size_t offset = uintptr_t(p) - uintptr_t(blocks[0].shared);
    const size_t within = offset % stride_;
    if (offset / stride_ >= blocks.size() || within > shape.shared_bytes) return nullptr;
    return bytes <= shape.shared_bytes - within ? &blocks[offset / stride_] : nullptr;
  }

 private:
  static constexpr size_t kGuard = 1024;
  static constexpr unsigned char kGuardByte = 0x5a;

  static void fiber_main() {
    Launch& here = *launch;
    entered(here.scheduler_);
    try {
      here.body_();
      if (!running->ahead.empty())
        throw std::runtime_error("a thread ended before copies that it did not wait for");
    } catch (...) {
      here.error = std::current_exception();
    }
    running->finished = true;
    switch_context(running->context, here.scheduler_, true);
  }

  void run_together(int first_block) {
    // A multiple of 128, as device.cuh promises, and of nothing more.
    char* base = shared_.data() + (128 - uintptr_t(shared_.data())) % 256;
    std::memset(base, kGuardByte, stride_ * blocks.size());
    runnable.clear();
    for (size_t i = 0; i < blocks.size(); ++i) {
      Block& block = blocks[i];
      block.index = first_block + int(i);
      block.rank = int(i) % shape.cluster;
      block.finished = 0;
      block.syncs = block.meetings = 0;
      block.group.size = shape.threads;
      block.barriers.clear();
      block.shared = base + i * stride_ + kGuard;
      std::memset(block.shared, 0xff, shape.shared_bytes);  // a NaN in every format
      block.cluster = &clusters_[i / shape.cluster];
      block.cluster->first = &blocks[i - block.rank];
      block.cluster->group.size = shape.threads * shape.cluster;
      block.warps.resize((shape.threads + 31) / 32);
      for (Warp& warp : block.warps) warp.size = 32;
      for (int thread = 0; thread < shape.threads; ++thread) {
        const size_t index = i * shape.threads + thread;
        Fiber& fiber = fibers[index];
        fiber.stack = stacks().at(index);
        fiber.block = &block;
        fiber.thread = thread;
        fiber.waits = Wait::nothing;
        fiber.finished = false;
        fiber.commits = 0;
        fiber.unfenced.clear();
        prepare(fiber.context, fiber.stack, fiber_main);
        runnable.push_back(&fiber);
      }
    }
    grid.size = shape.threads * shape.blocks;
    size_t finished = 0;
    while (!runnable.empty() || !copies.empty()) {
      if (!copies.empty() && (runnable.empty() || random(16) == 0)) {
        complete_copy();
        continue;
      }
      const size_t choice = random(unsigned(runnable.size()));
      running = runnable[choice];
      runnable[choice] = runnable.back();
      runnable.pop_back();
      running->waits = Wait::nothing;
      switch_context(scheduler_, running->context);
      if (error) std::rethrow_exception(error);
      if (running->finished) {
        ++finished;
        finish(*running);
      }
      running = nullptr;
    }
    if (finished != fibers.size()) throw std::runtime_error(deadlock());
  }

  void complete_copy() {
    const size_t choice = random(unsigned(copies.size()));
    const Copy copy = copies[choice];
    copies[choice] = copies.back();
    copies.pop_back();
    std::memcpy(copy.to, copy.from ? copy.from : copy.held, copy.bytes);
    copy.barrier->missing -= copy.bytes;
    if (copy.barrier->announced && copy.barrier->missing < 0)
      throw std::runtime_error("emulate: block " + std::to_string(copy.block->index) +
                               ": bulk_load copied more bytes than barrier_expect announced");
    complete_use(*copy.barrier);
  }

  void finish(const Fiber& fiber) {
    Block& block = *fiber.block;
    const auto demand = [&](bool holds, const std::string& what) {
      if (!holds)
        throw std::runtime_error("emulate: block " + std::to_string(block.index) + what);
    };
    demand(!overrun(fiber.stack),
           ", thread " + std::to_string(fiber.thread) + ": more stack than the emulator has");
    if (++block.finished < shape.threads) return;
    for (const Copy& copy : copies)
      demand(copy.block != &block, " ended before bulk copies that nobody waited for");
    for (const BarrierState& barrier : block.barriers)
      demand(!barrier.announced && barrier.missing == 0 &&
                 *std::max_element(barrier.waits.begin(), barrier.waits.end()) == barrier.uses,
             " ended before bulk copies or stores that nobody waited for");
    for (size_t i = 0; i < kGuard; ++i) {
      demand(uint8_t(block.shared[shape.shared_bytes + i]) == kGuardByte,
             ": shared memory overflow, written " + std::to_string(i) + " bytes after its end");
      demand(uint8_t(block.shared[-1 - ptrdiff_t(i)]) == kGuardByte,
             ": shared memory overflow, written " + std::to_string(i + 1) + " bytes before it");
    }
    // Other blocks of the cluster must not read it any more.
    std::memset(block.shared, 0xff, shape.shared_bytes);
  }

  // Who waits for what: one line for each kind of wait of the first blocks that are not done.
  std::string deadlock() const {
    std::string text = "emulate: deadlock";
    int listed = 0;
    for (const Block& block : blocks) {
      if (block.finished == shape.threads) continue;
      if (listed++ == 4) break;
      const Fiber* const first = &fibers[(&block - blocks.data()) * size_t(shape.threads)];
      for (int kind = 0; kind <= int(Wait::copies); ++kind) {
        const auto counts = [&](const Fiber& f) {
          return kind == 0 ? f.finished : !f.finished && int(f.waits) == kind;
        };
        const Fiber* const one = std::find_if(first, first + shape.threads, counts);
        if (one == first + shape.threads) continue;
        const auto threads = std::count_if(first, first + shape.threads, counts);
        text += "\n  block " + std::to_string(block.index) + ", thread " +
                std::to_string(one->thread) + (kind ? " waits in " : " has returned") +
                (kind ? name_of(Wait(kind)) : "") + " (so " + std::to_string(threads) +
                " of the block's " + std::to_string(shape.threads) + " threads)";
      }
      for (const BarrierState& barrier : block.barriers)
        if (barrier.missing != 0)
          text += "\n  block " + std::to_string(block.index) + ": a barrier lacks " +
                  std::to_string(barrier.missing) + " bytes of those announced";
    }
    return text;
  }

  std::function<void()> body_;
  Context scheduler_;
  std::vector<Cluster> clusters_;
  std::vector<char> shared_;
  size_t stride_ = 0;
  uint64_t state_ = 0;
};

// Ends the launch; the other fibers are abandoned where they wait.
[[noreturn]] inline void fail(const std::string& what) {
  if (!running) throw std::runtime_error("emulate: " + what);
  throw std::runtime_error("emulate: block " + std::to_string(running->block->index) +
                           ", thread " + std::to_string(running->thread) + ": " + what);
}

inline Fiber& self() {
  if (!running) fail("called outside a kernel");
  return *running;
}
inline Block& block() { return *self().block; }

// A point where another thread may be chosen.
inline void pause() {
  Fiber& fiber = self();
  if (launch->random(4) != 0) return;
  launch->runnable.push_back(&fiber);
  launch->suspend();
}

// Waits for all threads of the group; true in the thread that came last.
inline void meet(Group& group, Wait wait) {
  Fiber& fiber = self();
  if (!group.waiting.empty() && group.waiting[0]->waits != wait)
    fail(std::string("is in ") + name_of(wait) + ", but thread " +
         std::to_string(group.waiting[0]->thread) + " of its warp waits in " +
         name_of(group.waiting[0]->waits));
  fiber.waits = wait;
  group.waiting.push_back(&fiber);
  if (int(group.waiting.size()) == group.size) {
    if (wait != Wait::warp && wait != Wait::shuffle)
      for (Fiber* one : group.waiting) {
        one->block->syncs += one->thread == 0;
        one->block->meetings += one->thread == 0 && wait != Wait::block;
      }
    launch->resume(group.waiting);
  }
  launch->suspend();
}

inline Warp& warp_of(const Fiber& fiber, Wait wait) {
  Warp& warp = fiber.block->warps[fiber.thread / 32];
  if (fiber.thread / 32 == launch->shape.threads / 32)
    fail(std::string(name_of(wait)) + " in a warp of fewer than 32 threads");
  return warp;
}

}  // namespace emulator

// Runs kernel(args...) in every thread of the grid. Throws std::runtime_error for what a GPU would
// answer with a hang, a fault or an undefined result.
template <class Kernel, class... Args>
void emulate(const LaunchShape& shape, Kernel kernel, Args... args) {
  static_assert((std::is_trivially_copyable_v<Args> && ...), "a launch copies arguments bytewise");
  static_assert((sizeof(Args) + ... + 0) <= 4096, "a launch takes at most 4096 bytes of arguments");
  ++emulator_launches;
  emulator::Launch(shape, [&] { kernel(args...); }).run();
}

}  // namespace kdkernels::cuda
