// The names of csrc/cuda/device.cuh on the CPU; launch.h has emulate(), which runs a kernel.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.h"

#define KDK_DEVICE inline
#define KDK_KERNEL
#define KDK_BOUNDS(threads, blocks)

namespace kdkernels::cuda {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

KDK_DEVICE int thread_index() { return emulator::self().thread; }
KDK_DEVICE int thread_count() { return (emulator::self(), emulator::launch->shape.threads); }
KDK_DEVICE int block_index() { return emulator::block().index; }
KDK_DEVICE int block_count() { return (emulator::self(), emulator::launch->shape.blocks); }

KDK_DEVICE char* shared_memory() { return emulator::block().shared; }

KDK_DEVICE void sync_block() { emulator::meet(emulator::block().group, emulator::Wait::block); }
KDK_DEVICE void sync_warp() {
  emulator::meet(emulator::warp_of(emulator::self(), emulator::Wait::warp), emulator::Wait::warp);
}
KDK_DEVICE void sync_grid() {
  emulator::self();
  if (!emulator::launch->shape.cooperative) emulator::fail("sync_grid in an ordinary launch");
  emulator::meet(emulator::launch->grid, emulator::Wait::grid);
}

template <class X>
KDK_DEVICE X shuffle(X x, int lane) {
  static_assert(std::is_arithmetic_v<X> || std::is_same_v<X, f16> || std::is_same_v<X, bf16>);
  using namespace emulator;
  Warp& warp = warp_of(self(), Wait::shuffle);
  // The warp's count is of whole shuffles: it is the same for all lanes until the last arrives.
  uint64_t* const value = warp.value[warp.shuffles % 2];
  std::memcpy(&value[self().thread % 32], &x, sizeof x);
  if (warp.waiting.size() == 31) ++warp.shuffles;
  meet(warp, Wait::shuffle);
  std::memcpy(&x, &value[lane & 31], sizeof x);
  return x;
}
template <class X>
KDK_DEVICE X shuffle_xor(X x, int mask) {
  if (mask < 0 || mask > 31) emulator::fail("shuffle_xor: the mask must be 0 to 31");
  return shuffle(x, (thread_index() ^ mask) & 31);
}

KDK_DEVICE float warp_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = std::fmax(x, shuffle_xor(x, mask));
  return x;
}

KDK_DEVICE int cluster_rank() { return emulator::block().rank; }
KDK_DEVICE int cluster_size() { return (emulator::self(), emulator::launch->shape.cluster); }
KDK_DEVICE void sync_cluster() {
  emulator::meet(emulator::block().cluster->group, emulator::Wait::cluster);
}
template <class X>
KDK_DEVICE X* cluster_shared(X* p, int rank) {
  emulator::Block& block = emulator::block();
  if (emulator::launch->owner(p, sizeof(X)) != &block)
    emulator::fail("cluster_shared: not in the block's shared memory");
  if (rank < 0 || rank >= cluster_size()) emulator::fail("cluster_shared: no such rank");
  return reinterpret_cast<X*>(uintptr_t(p) - uintptr_t(block.shared) +
                              uintptr_t(block.cluster->first[rank].shared));
}

namespace emulator {

inline void check_aligned(const char* call, const void* p, size_t to = 16) {
  if (uintptr_t(p) % to != 0)
    fail(std::string(call) + ": misaligned, not a multiple of " + std::to_string(to));
}
inline void check_global(const char* call, const void* p) {
  if (launch && launch->owner(p, 1)) fail(std::string(call) + ": the address is in shared memory");
}
inline void check_shared(const char* call, const void* p, size_t bytes) {
  if (launch->owner(p, bytes) != &block())
    fail(std::string(call) + ": the address is not in the block's shared memory");
}

// Of the running thread's block, or of another one's in its cluster.
inline BarrierState& barrier_state(const char* call, uint64_t* barrier, Block& owner = block()) {
  const auto demand = [&](bool holds, const char* what) {
    if (!holds) fail(std::string(call) + ": " + what);
  };
  for (BarrierState& state : owner.barriers) {
    if (state.address != barrier) continue;
    demand(*barrier == kInitialised, "the barrier's memory was overwritten");
    demand(state.fenced, "no fence_barriers after barrier_init");
    const bool knows = &owner == &block() ? self().thread == state.owner || owner.syncs > state.syncs
                                          : owner.meetings > state.meetings;
    demand(knows, "the block has not synchronised since barrier_init");
    return state;
  }
  fail(std::string(call) + ": the barrier was not initialised");
}

// Before a bulk copy: whoever has read there by load16_shared has called fence_bulk since.
inline void check_fenced(const void* to, uint32_t bytes) {
  const Fiber* const first =
      &launch->fibers[size_t(&block() - launch->blocks.data()) * size_t(launch->shape.threads)];
  for (int thread = 0; thread < launch->shape.threads; ++thread)
    for (const uintptr_t at : first[thread].unfenced)
      if (at - uintptr_t(to) < bytes)
        fail("bulk_load: thread " + std::to_string(thread) +
             " has read there, and not called fence_bulk since");
}

}  // namespace emulator

using Barrier = uint64_t;

KDK_DEVICE uint32_t shared_address(const void* p) {
  emulator::check_shared("shared_address", p, 1);
  return uint32_t(static_cast<const char*>(p) - shared_memory());
}
KDK_DEVICE void barrier_init(Barrier* barrier) {
  emulator::check_aligned("barrier_init", barrier, 8);
  emulator::check_shared("barrier_init", barrier, sizeof *barrier);
  for (const auto& state : emulator::block().barriers)
    if (state.address == barrier) emulator::fail("barrier_init: the barrier is initialised");
  *barrier = emulator::kInitialised;
  emulator::BarrierState state{};
  state.address = barrier;
  state.owner = thread_index();
  state.waits.resize(thread_count());
  emulator::block().barriers.push_back(state);
}
KDK_DEVICE void fence_barriers() {
  for (auto& state : emulator::block().barriers) {
    if (state.owner != thread_index() || state.fenced) continue;
    state.fenced = true;
    state.syncs = emulator::block().syncs;
    state.meetings = emulator::block().meetings;
  }
}
KDK_DEVICE void barrier_expect(Barrier* barrier, uint32_t bytes) {
  emulator::pause();
  auto& state = emulator::barrier_state("barrier_expect", barrier);
  if (state.announced) emulator::fail("barrier_expect: the use before is not complete");
  if (bytes >= 1u << 20) emulator::fail("barrier_expect: a use copies less than 1 MiB");
  state.announced = true;
  state.missing += bytes;
  if (state.missing < 0) emulator::fail("barrier_expect: more bytes were copied than announced");
  emulator::launch->complete_use(state);
}
// The copy is made at some later time, from what the source holds then; until then the target is
// NaN, so that whoever reads without waiting notices.
KDK_DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  emulator::pause();
  auto& state = emulator::barrier_state("bulk_load", barrier);
  emulator::check_aligned("bulk_load, target", to);
  emulator::check_aligned("bulk_load, source", from);
  if (bytes % 16 != 0) emulator::fail("bulk_load: the size is not a multiple of 16");
  if (bytes > 0) emulator::check_shared("bulk_load, target", to, bytes);
  emulator::check_global("bulk_load, source", from);
  emulator::check_fenced(to, bytes);
  std::memset(to, 0xff, bytes);
  emulator::launch->copies.push_back({&emulator::block(), &state, to, from, bytes, {}});
  emulator::pause();
}
struct alignas(16) Four {
  float x[4];
};
// Stored at some later time; until then the target is NaN.
KDK_DEVICE void store_remote(float* mine, const Four& v, Barrier* barrier, int rank) {
  emulator::pause();
  emulator::check_aligned("store_remote", mine);
  emulator::check_shared("store_remote", mine, sizeof v);
  emulator::Block& owner = emulator::block().cluster->first[rank];
  auto& state = emulator::barrier_state("store_remote", cluster_shared(barrier, rank), owner);
  if (owner.finished == thread_count()) emulator::fail("store_remote: the block has returned");
  state.stored = true;
  float* const there = cluster_shared(mine, rank);
  std::memset(there, 0xff, sizeof v);
  emulator::Copy copy{&owner, &state, there, nullptr, sizeof v, {}};
  std::memcpy(copy.held, &v, sizeof v);
  emulator::launch->copies.push_back(copy);
  emulator::pause();
}
namespace emulator {

// What is stored from another block is seen by a wait of the cluster's scope alone.
inline void wait_for(Barrier* barrier, uint32_t parity, bool cluster) {
  pause();
  auto& state = barrier_state("barrier_wait", barrier);
  const uint64_t use = state.waits[thread_index()]++;
  if (parity != use % 2)
    fail("barrier_wait: wrong parity " + std::to_string(parity) + " for use " +
         std::to_string(use) + " of the barrier");
  if (state.uses <= use) {
    self().waits = Wait::copies;
    state.waiting.push_back(&self());
    launch->suspend();
  }
  if (state.uses > use + 1)
    fail("barrier_wait: the use after the one waited for may be over before it is seen");
  if (state.stored && !cluster)
    fail("barrier_wait: other blocks have stored: barrier_wait_cluster sees it");
}

}  // namespace emulator

KDK_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  emulator::wait_for(barrier, parity, false);
}
KDK_DEVICE void barrier_wait_cluster(Barrier* barrier, uint32_t parity) {
  emulator::wait_for(barrier, parity, true);
}
KDK_DEVICE void fence_bulk() {
  emulator::self().unfenced.clear();
  emulator::pause();
}

// Made when it is waited for, from what the source holds then; until then the target is NaN.
KDK_DEVICE void copy16_async(void* to, const void* from) {
  emulator::check_aligned("copy16_async, target", to);
  emulator::check_aligned("copy16_async, source", from);
  emulator::check_shared("copy16_async, target", to, 16);
  emulator::check_global("copy16_async, source", from);
  std::memset(to, 0xff, 16);
  emulator::self().ahead.push_back({to, from, emulator::self().commits});
  emulator::pause();
}
KDK_DEVICE void commit_copies() { ++emulator::self().commits; }
template <int kGroups = 0>
KDK_DEVICE void wait_copies() {
  emulator::pause();
  auto& fiber = emulator::self();
  size_t left = 0;
  for (const auto& copy : fiber.ahead) {
    if (copy.group == fiber.commits) emulator::fail("wait_copies: a copy was not committed");
    if (copy.group + kGroups < fiber.commits) std::memcpy(copy.to, copy.from, 16);
    else fiber.ahead[left++] = copy;
  }
  fiber.ahead.resize(left);
}

KDK_DEVICE bool arrives_last(unsigned* counter, unsigned arrivals) {
  emulator::check_aligned("arrives_last", counter, alignof(unsigned));
  emulator::check_global("arrives_last", counter);
  emulator::pause();
  const unsigned before = *counter;
  if (before >= arrivals) emulator::fail("arrives_last: the counter did not begin at 0");
  *counter = before + 1 == arrivals ? 0 : before + 1;
  emulator::pause();
  return before == arrivals - 1;
}
template <class X>
KDK_DEVICE X load_fresh(const X* p) {
  emulator::check_aligned("load_fresh", p, alignof(X));
  emulator::check_global("load_fresh", p);
  emulator::pause();
  return *p;
}

struct alignas(16) Bits16 {
  uint32_t word[4];
};
KDK_DEVICE Bits16 load16(const void* p) {
  emulator::check_aligned("load16", p);
  emulator::check_global("load16", p);
  if (emulator::launch && emulator::launch->written.count(uintptr_t(p) / 16))
    emulator::fail("load16: this launch has written there: load16_written");
  Bits16 v;
  std::memcpy(&v, p, 16);
  return v;
}
KDK_DEVICE Bits16 load16_written(const void* p) {
  emulator::check_aligned("load16_written", p);
  emulator::check_global("load16_written", p);
  Bits16 v;
  std::memcpy(&v, p, 16);
  return v;
}
KDK_DEVICE Bits16 load16_shared(const void* p) {
  emulator::check_aligned("load16_shared", p);
  if (emulator::launch && !emulator::launch->owner(p, 16))
    emulator::fail("load16_shared: the address is not in shared memory");
  if (emulator::launch && !emulator::block().barriers.empty())
    emulator::self().unfenced.insert(uintptr_t(p));
  Bits16 v;
  std::memcpy(&v, p, 16);
  return v;
}
KDK_DEVICE void store16(void* p, const Bits16& v) {
  emulator::check_aligned("store16", p);
  emulator::check_global("store16", p);
  if (emulator::launch) emulator::launch->written.insert(uintptr_t(p) / 16);
  std::memcpy(p, &v, 16);
}

namespace emulator {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace emulator

// Defined below, where the conversions are.
template <class T>
KDK_DEVICE float element(const Bits16& bits, int k);
template <class T>
KDK_DEVICE Bits16 larger(const Bits16& a, const Bits16& b);

KDK_DEVICE float widen(f16 x) {
  using namespace emulator;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | rest << 13);
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + 0x38000000u));
  return float_of(sign | bits_of(float(rest) * 0x1p-24f));
}
KDK_DEVICE float widen(bf16 x) { return emulator::float_of(uint32_t(x.bits) << 16); }
KDK_DEVICE float widen(float x) { return x; }
KDK_DEVICE double widen(double x) { return x; }
template <class T>
KDK_DEVICE T narrow(double x) {
  return T(x);
}
template <class T>
KDK_DEVICE T narrow(float x) {
  return T(x);
}
// To nearest, ties to even; every NaN becomes the device's one NaN, 0x7fff.
template <>
KDK_DEVICE f16 narrow<f16>(float x) {
  using namespace emulator;
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  uint32_t rest = bits_of(x) & 0x7fffffffu;
  if (rest > 0x7f800000u) return {0x7fff};
  if (rest >= 0x47800000u) return {uint16_t(sign | 0x7c00)};  // 2^16 and more
  // Below 2^-14 the numbers are multiples of 2^-24, as those above 1/2 are in float.
  if (rest < 0x38800000u)
    return {uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)))};
  rest += 0xfff + (rest >> 13 & 1);
  return {uint16_t(sign | (rest - 0x38000000u) >> 13)};
}
template <>
KDK_DEVICE bf16 narrow<bf16>(float x) {
  const uint32_t bits = emulator::bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

KDK_DEVICE float power_of_two(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}
KDK_DEVICE double power_of_two(double x) { return std::exp2(x); }
// Through memory, or the compiler might contract the product with a sum.
KDK_DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
KDK_DEVICE double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
KDK_DEVICE float power_below(float x) {
  return emulator::float_of(emulator::bits_of(x) & 0x7f800000u);
}
KDK_DEVICE float larger(float a, float b) { return std::fmax(a, b); }
KDK_DEVICE double larger(double a, double b) { return std::fmax(a, b); }
KDK_DEVICE float product(float a, float b) {
  float c = a * b;
  asm("" : "+m"(c));
  return c;
}
KDK_DEVICE double product(double a, double b) {
  double c = a * b;
  asm("" : "+m"(c));
  return c;
}

template <class T>
KDK_DEVICE T typed_element(const Bits16& bits, int k) {
  T x;
  std::memcpy(&x, reinterpret_cast<const char*>(&bits) + k * sizeof x, sizeof x);
  return x;
}
template <class T>
KDK_DEVICE float element(const Bits16& bits, int k) {
  return widen(typed_element<T>(bits, k));
}
template <class T>
KDK_DEVICE Bits16 larger(const Bits16& a, const Bits16& b) {
  Bits16 most;
  for (unsigned k = 0; k < 16 / sizeof(T); ++k) {
    const T x = typed_element<T>(a, k), y = typed_element<T>(b, k);
    const bool first = std::isnan(widen(y)) || widen(x) >= widen(y);
    std::memcpy(reinterpret_cast<char*>(&most) + k * sizeof x, first ? &x : &y, sizeof x);
  }
  return most;
}

}  // namespace kdkernels::cuda
