// Launching a kernel: on the caller's stream, with every error raised.
#pragma once

#include "device.cuh"
#include "task.h"

namespace kdkernels::cuda {

template <class T>
struct Type {
  using type = T;
};
// f(Type<T>{}) for elements of this type, which is not double.
template <class F>
void with_type(Scalar type, const F& f) {
  switch (type) {
    case Scalar::f16: return f(Type<f16>{});
    case Scalar::bf16: return f(Type<bf16>{});
    default: return f(Type<float>{});
  }
}

}  // namespace kdkernels::cuda

#if defined(KDK_EMULATED)

#include "launch.h"

namespace kdkernels::cuda {
template <auto kKernel, class... Args>
void launch(const LaunchShape& shape, void*, const Args&... args) {
  emulate(shape, kKernel, args...);
}
}  // namespace kdkernels::cuda

#else

#include <atomic>

#include "errors.h"

namespace kdkernels::cuda {

struct LaunchShape {
  int blocks, threads;
  int cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

// Raises the kernel's limits, once for each device.
template <auto kKernel>
void raise_limits() {
  static std::atomic<uint64_t> done{0};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const uint64_t bit = uint64_t(1) << (device % 64);
  if (device < 64 && (done.load(std::memory_order_relaxed) & bit)) return;
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kKernel), "cudaFuncGetAttributes");
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - int(attributes.sharedSizeBytes)),
        "cudaFuncSetAttribute");
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  if (major >= 9)
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
  done.fetch_or(bit, std::memory_order_relaxed);
}

template <auto kKernel, class... Args>
void launch(const LaunchShape& shape, void* stream, const Args&... args) {
  if (shape.shared_bytes > 48 * 1024 || shape.cluster > 1) raise_limits<kKernel>();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {unsigned(shape.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  check(cudaLaunchKernelEx(&config, kKernel, args...), "kernel launch");
}

}  // namespace kdkernels::cuda

#endif
