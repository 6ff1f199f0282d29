// What the kernels use of the device, and nothing else: tests/emulator/device.h gives the same names
// on the CPU, so that every kernel runs under the tests of a machine without a GPU.
//
// Grids and blocks have one dimension. All lanes of a warp take part in a shuffle, all threads of a
// block in its barriers, all blocks of a cluster or of a cooperative grid in theirs.
#pragma once

#if defined(KDK_EMULATED)
#include "device.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define KDK_DEVICE __device__ __forceinline__
#define KDK_KERNEL __global__
#define KDK_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)

namespace kdkernels::cuda {

using f16 = __half;
using bf16 = __nv_bfloat16;

KDK_DEVICE int thread_index() { return int(threadIdx.x); }
KDK_DEVICE int thread_count() { return int(blockDim.x); }
KDK_DEVICE int block_index() { return int(blockIdx.x); }
KDK_DEVICE int block_count() { return int(gridDim.x); }

// The block's dynamic shared memory, 128-byte aligned; there is no other.
KDK_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char kdk_shared_memory[];
  return kdk_shared_memory;
}

KDK_DEVICE void sync_block() { __syncthreads(); }
KDK_DEVICE void sync_warp() { __syncwarp(); }
// Among all blocks of a cooperative launch; orders their accesses to global memory.
KDK_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

// The value of the lane whose index differs by the bits of `mask`, or of lane `lane`.
template <class X>
KDK_DEVICE X shuffle_xor(X x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class X>
KDK_DEVICE X shuffle(X x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

// The largest of the lanes' numbers, none of them NaN, in all lanes.
KDK_DEVICE float warp_max(float x) {
  // As integers in the order of the numbers: all bits but the sign of a negative one are flipped.
  const auto ordered = [](int bits) { return bits ^ int(unsigned(bits >> 31) >> 1); };
  return __int_as_float(ordered(__reduce_max_sync(0xffffffffu, ordered(__float_as_int(x)))));
}

// Thread-block clusters (sm_90 and later). `cluster_shared` is where block `rank` of the cluster
// keeps what this block keeps at `p`; sync_cluster orders accesses to it.
KDK_DEVICE int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
KDK_DEVICE int cluster_size() {
  int size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
KDK_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __syncthreads();
#endif
}
template <class X>
KDK_DEVICE X* cluster_shared(X* p, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<X*>(address);
#else
  return p;
#endif
}

// A barrier in shared memory for bulk copies, or for what other blocks of the cluster store. One thread calls
// barrier_init, then fence_barriers; the block synchronises, or the cluster; one thread calls
// barrier_expect, and a use is over when so many bytes have come by bulk_load or store_remote. All
// wait. The n-th use of a barrier (from 0) has parity n % 2.
using Barrier = uint64_t;

KDK_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
KDK_DEVICE void barrier_init(Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
#endif
}
KDK_DEVICE void fence_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Announces one use of the barrier in which `bytes` are written.
KDK_DEVICE void barrier_expect(Barrier* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}
// Starts a copy into this block's shared memory; addresses and size are multiples of 16 bytes.
KDK_DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}
KDK_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
// Stores 16 bytes where block `rank` of the cluster keeps what this block keeps at `mine`, a multiple of 16
// bytes, for that block's own `barrier`.
struct alignas(16) Four {
  float x[4];
};
KDK_DEVICE void store_remote(float* mine, const Four& v, Barrier* barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .b32 there, bar;\n\t"
      "mapa.shared::cluster.u32 there, %0, %2;\n\t"
      "mapa.shared::cluster.u32 bar, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [bar];\n\t}" ::
          "r"(shared_address(mine)),
      "r"(shared_address(barrier)), "r"(rank), "f"(v.x[0]), "f"(v.x[1]), "f"(v.x[2]), "f"(v.x[3])
      : "memory");
#endif
}
// For what other blocks have stored.
KDK_DEVICE void barrier_wait_cluster(Barrier* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
// Shared memory that ordinary accesses have finished with may be the target of a bulk copy: called by
// each thread that accessed it, before the block synchronises.
KDK_DEVICE void fence_bulk() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Starts to copy 16 bytes, at multiples of 16, into this block's shared memory. wait_copies waits for this
// thread's committed copies, but for the last kGroups commits; other threads see them after a barrier.
KDK_DEVICE void copy16_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
KDK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups = 0>
KDK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Whether this is the last of so many arrivals at a counter that begins at 0; the last one leaves it at 0.
// What a thread wrote to global memory before it arrived is visible to whoever arrives later.
KDK_DEVICE bool arrives_last(unsigned* counter, unsigned arrivals) {
  __threadfence();
  const unsigned before = atomicInc(counter, arrivals - 1);
  __threadfence();
  return before == arrivals - 1;
}
// Reads what another block of the same launch wrote (never through the L1 cache).
template <class X>
KDK_DEVICE X load_fresh(const X* p) {
  return __ldcg(p);
}

// 16 bytes at an address that is a multiple of 16. Read once, written once: streaming accesses.
struct alignas(16) Bits16 {
  uint32_t word[4];
};
KDK_DEVICE Bits16 load16(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
// Of what this launch wrote, after sync_grid, which empties the L1 cache.
KDK_DEVICE Bits16 load16_written(const void* p) { return *static_cast<const Bits16*>(p); }
KDK_DEVICE Bits16 load16_shared(const void* p) { return *static_cast<const Bits16*>(p); }
KDK_DEVICE void store16(void* p, const Bits16& v) {
  __stcs(static_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}

// Element k of 16 bytes of T, as a float; and the larger of each pair of elements (NaN loses).
template <class T>
KDK_DEVICE float element(const Bits16& bits, int k);
template <>
KDK_DEVICE float element<float>(const Bits16& bits, int k) {
  return __uint_as_float(bits.word[k]);
}
template <>
KDK_DEVICE float element<bf16>(const Bits16& bits, int k) {
  const uint32_t word = bits.word[k / 2];
  return __uint_as_float(k % 2 ? word & 0xffff0000u : word << 16);
}
template <>
KDK_DEVICE float element<f16>(const Bits16& bits, int k) {
  const uint32_t word = bits.word[k / 2];
  return __half2float(__ushort_as_half(uint16_t(k % 2 ? word >> 16 : word)));
}
template <class T>
KDK_DEVICE Bits16 larger(const Bits16& a, const Bits16& b);
template <>
KDK_DEVICE Bits16 larger<float>(const Bits16& a, const Bits16& b) {
  Bits16 most;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    most.word[i] = __float_as_uint(fmaxf(__uint_as_float(a.word[i]), __uint_as_float(b.word[i])));
  return most;
}
template <>
KDK_DEVICE Bits16 larger<bf16>(const Bits16& a, const Bits16& b) {
  Bits16 most;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(most.word[i]) : "r"(a.word[i]), "r"(b.word[i]));
  return most;
}
template <>
KDK_DEVICE Bits16 larger<f16>(const Bits16& a, const Bits16& b) {
  Bits16 most;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm("max.f16x2 %0, %1, %2;" : "=r"(most.word[i]) : "r"(a.word[i]), "r"(b.word[i]));
  return most;
}

KDK_DEVICE float widen(f16 x) { return __half2float(x); }
KDK_DEVICE float widen(bf16 x) { return __bfloat162float(x); }
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
template <>
KDK_DEVICE f16 narrow<f16>(float x) {
  return __float2half_rn(x);
}
template <>
KDK_DEVICE bf16 narrow<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// 2^x to 2 ulp (denormal results are 0); below, exactly rounded products that are never contracted.
KDK_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KDK_DEVICE double power_of_two(double x) { return exp2(x); }
KDK_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
KDK_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
// The largest power of two that is not larger than x > 0.
KDK_DEVICE float power_below(float x) {
  return __uint_as_float(__float_as_uint(x) & 0x7f800000u);
}
KDK_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // of numbers: NaN loses
KDK_DEVICE double larger(double a, double b) { return fmax(a, b); }
KDK_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
KDK_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }

}  // namespace kdkernels::cuda

#endif

#if defined(__CUDACC__)
#define KDK_PRAGMA(text) _Pragma(#text)
#define KDK_UNROLL _Pragma("unroll")
#define KDK_UNROLL_BY(times) KDK_PRAGMA(unroll times)
#define KDK_PARAMETER const __grid_constant__  // of a kernel: read where it lies
#else
#define KDK_UNROLL
#define KDK_UNROLL_BY(times)
#define KDK_PARAMETER const
#endif
