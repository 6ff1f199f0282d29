// What every loss needs beside its own kernel: the valid rows counted, a stored gradient scaled.
#include "common.h"
#include "groups.cuh"
#include "launch.cuh"
#include "sources.cuh"

namespace kdkernels::cuda {
namespace {

constexpr int kThreads = 256;

// Valid rows in one part for each block, and the row kernel's ticket at 0.
KDK_KERNEL void KDK_BOUNDS(kThreads, 1)
    count_rows(KDK_PARAMETER int64_t rows, const int64_t* target, KDK_PARAMETER int64_t ignored,
               int64_t* counts, unsigned* ticket) {
  if (block_index() == 0 && thread_index() == 0) *ticket = 0;
  if (!counts) return;
  int64_t valid[1] = {0};
  for (int64_t row = int64_t(block_index()) * thread_count() + thread_index(); row < rows;
       row += int64_t(block_count()) * thread_count())
    valid[0] += target[row] != ignored;
  Block block;
  block.reduce<Sum>(valid);
  if (thread_index() == 0) counts[block_index()] = valid[0];
}

template <class T, class R>
KDK_DEVICE T scaled(T x, R factor) {
  const R y = R(widen(x)) * factor;
  if constexpr (sizeof(T) == 2) return narrow<T>(float(y));
  else return narrow<T>(y);
}

// gradient *= upstream. The usual upstream gradient is 1: then nothing is read, and the host never
// waits to find out.
template <class T, class R>
KDK_KERNEL void KDK_BOUNDS(kThreads, 1)
    scale_by(T* gradient, KDK_PARAMETER int64_t size, const R* upstream) {
  const R factor = *upstream;
  if (factor == R(1)) return;
  const int64_t packs = size / kPack<T>, step = int64_t(block_count()) * thread_count();
  const int64_t first = int64_t(block_index()) * thread_count() + thread_index();
  for (int64_t at = first; at < packs; at += step) {
    Pack<T> pack = *reinterpret_cast<const Pack<T>*>(gradient + at * kPack<T>);
    KDK_UNROLL
    for (int k = 0; k < kPack<T>; ++k) pack.x[k] = scaled(pack.x[k], factor);
    *reinterpret_cast<Pack<T>*>(gradient + at * kPack<T>) = pack;
  }
  for (int64_t at = packs * kPack<T> + first; at < size; at += step)
    gradient[at] = scaled(gradient[at], factor);
}

template <class T>
void scale_typed(void* gradient, int64_t size, const void* upstream, Scalar upstream_type,
                 int blocks, void* stream) {
  const LaunchShape shape{blocks, kThreads};
  T* const data = static_cast<T*>(gradient);
  if (upstream_type == Scalar::f64)
    return launch<scale_by<T, double>>(shape, stream, data, size,
                                       static_cast<const double*>(upstream));
  launch<scale_by<T, float>>(shape, stream, data, size, static_cast<const float*>(upstream));
}

}  // namespace

int count_parts(int64_t rows) {
  return int(rows <= 4096 ? 1 : rows >= 128 * 4096 ? 128 : (rows + 4095) / 4096);
}

void prepare_rows(const int64_t* target, int64_t rows, int64_t ignored, int64_t* counts, int parts,
                  unsigned* ticket, void* stream) {
  launch<count_rows>({counts ? parts : 1, counts ? kThreads : 32, 1, kBlockExchange}, stream, rows,
                     target, ignored, counts, ticket);
}

void scale(void* gradient, Scalar type, int64_t size, const void* upstream, Scalar upstream_type,
           const Device& device, void* stream) {
  const int64_t wanted = size / (kThreads * 16) + 1, most = 8 * device.multiprocessors;
  const int blocks = int(wanted < most ? wanted : most);
  switch (type) {
    case Scalar::f64:
      return scale_typed<double>(gradient, size, upstream, upstream_type, blocks, stream);
    case Scalar::f32:
      return scale_typed<float>(gradient, size, upstream, upstream_type, blocks, stream);
    case Scalar::f16:
      return scale_typed<f16>(gradient, size, upstream, upstream_type, blocks, stream);
    default: return scale_typed<bf16>(gradient, size, upstream, upstream_type, blocks, stream);
  }
}

#if !defined(KDK_EMULATED)
namespace {
__global__ void probe() {}
}  // namespace

const void* probe_kernel() { return reinterpret_cast<const void*>(&probe); }
#endif

}  // namespace kdkernels::cuda
