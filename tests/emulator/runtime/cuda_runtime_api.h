// What csrc/cuda/runtime.cpp asks of CUDA's runtime, without a GPU: devices that are described, one of them
// current for the runtime, streams, memory of the host, and errors where a check wants one.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101, cudaErrorUnknown = 999 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch,
};
enum cudaFuncAttribute {
  cudaFuncAttributeNonPortableClusterSizeAllowed,
  cudaFuncAttributeMaxDynamicSharedMemorySize,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct FakeStream {
  unsigned long long id;
  bool captured = false;
};
using cudaStream_t = FakeStream*;

struct FakeRuntime {
  struct Device {
    int arch, multiprocessors, block_shared, most_cluster;
  };
  std::vector<Device> devices{{90, 132, 232448, 16}, {80, 108, 166912, 0}, {90, 16, 232448, 8}};
  int current = 0, driver = 13000, ptx = 90;
  std::set<std::string> failing;  // functions that answer with an error
  cudaError_t last = cudaSuccess;
  std::set<int> contexts;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::vector<cudaStreamCaptureMode> modes_of_malloc;
  std::map<void*, cudaStream_t> cleared;  // by which stream
  int allocations = 0;

  cudaError_t answer(const char* name, bool good = true) {
    if (good && !failing.count(name)) return cudaSuccess;
    return last = cudaErrorUnknown;
  }
};
inline FakeRuntime fake;

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fake.last;
  fake.last = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "a fake error"; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake.driver;
  return fake.answer("cudaDriverGetVersion");
}
inline cudaError_t cudaGetDevice(int* index) {
  *index = fake.current;
  return fake.answer("cudaGetDevice");
}
inline cudaError_t cudaSetDevice(int index) {
  const cudaError_t status =
      fake.answer("cudaSetDevice", index >= 0 && index < int(fake.devices.size()));
  if (status == cudaSuccess) fake.contexts.insert(fake.current = index);
  return status;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int index) {
  const FakeRuntime::Device& device = fake.devices.at(size_t(index));
  const int values[] = {device.arch / 10, device.arch % 10, device.multiprocessors,
                        device.block_shared, device.most_cluster > 0};
  *value = values[name];
  return fake.answer("cudaDeviceGetAttribute");
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  fake.contexts.insert(fake.current);
  attributes->ptxVersion = fake.ptx;
  return fake.answer("cudaFuncGetAttributes");
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return fake.answer("cudaFuncSetAttribute");
}
inline cudaError_t cudaOccupancyMaxPotentialClusterSize(int* most, const void*,
                                                        const cudaLaunchConfig_t*) {
  *most = fake.devices[size_t(fake.current)].most_cluster;
  return fake.answer("cudaOccupancyMaxPotentialClusterSize");
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* found, const void*,
                                                  const cudaLaunchConfig_t* config) {
  *found = fake.devices[size_t(fake.current)].multiprocessors /
           int(config->attrs[0].val.clusterDim.x);
  return fake.answer("cudaOccupancyMaxActiveClusters");
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return fake.answer("cudaStreamIsCapturing");
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = stream->id;
  return fake.answer("cudaStreamGetId");
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake.mode);
  return fake.answer("cudaThreadExchangeStreamCaptureMode");
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  fake.modes_of_malloc.push_back(fake.mode);
  ++fake.allocations;
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xff, bytes);
  return fake.answer("cudaMalloc");
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  const cudaError_t status = fake.answer("cudaMemsetAsync");
  if (status != cudaSuccess) return status;
  std::memset(memory, value, bytes);
  fake.cleared[memory] = stream;
  return status;
}
