// What is asked of CUDA's runtime beside launches: devices, versions, the counters of streams. Plain C++;
// tests/emulator/runtime has a runtime without a GPU, on which tests/test_cuda_runtime.py runs this file.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

#include "common.h"
#include "errors.h"

namespace kdkernels::cuda {
namespace {

// While it lives a device is the current one; then the one before is again.
class Current {
 public:
  explicit Current(int index) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != index;
    if (changed_) check(cudaSetDevice(index), "cudaSetDevice");
  }
  ~Current() {
    if (changed_ && cudaSetDevice(before_) != cudaSuccess) (void)cudaGetLastError();
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Whether a question was answered; an error stays nobody's.
bool told(cudaError_t status) {
  if (status != cudaSuccess) (void)cudaGetLastError();
  return status == cudaSuccess;
}

}  // namespace

Device describe_device(int index) {
  const Current current(index);
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, index), "cudaDeviceGetAttribute");
    return value;
  };
  Device device{attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
                    attribute(cudaDevAttrComputeCapabilityMinor),
                attribute(cudaDevAttrMultiProcessorCount),
                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), 0};
  const void* const probe = probe_kernel();
  // Code that was translated from PTX lacks what its architecture lacked.
  cudaFuncAttributes built;
  check(cudaFuncGetAttributes(&built, probe), "cudaFuncGetAttributes");
  device.arch = std::min(device.arch, built.ptxVersion);
  if (device.arch < 90 || !attribute(cudaDevAttrClusterLaunch)) return device;
  // Slices of a GPU and small ones have fewer blocks in a cluster. First of blocks that take half of the memory.
  const int shared = device.block_shared / 2;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = size_t(shared);
  int most = 0;
  const bool known =
      told(cudaFuncSetAttribute(probe, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) &&
      told(cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) &&
      told(cudaOccupancyMaxPotentialClusterSize(&most, probe, &config));
  device.most_cluster = known ? std::min(most, 16) : 0;
  // Then how many clusters of each size there is room for, if a block takes all of it.
  const bool whole = known && told(cudaFuncSetAttribute(
                                  probe, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  device.block_shared));
  config.dynamicSmemBytes = size_t(device.block_shared);
  for (int i = 0; i < 4; ++i) {
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {2u << i, 1, 1};
    config.gridDim = dim3(2u << i);
    config.attrs = &size;
    config.numAttrs = 1;
    int found = 0;
    const bool fits = whole && told(cudaOccupancyMaxActiveClusters(&found, probe, &config));
    device.clusters[i] = fits ? found : 0;
  }
  return device;
}

void use_device(int index) { check(cudaSetDevice(index), "cudaSetDevice"); }

int driver_version() {
  int version = 0;
  return told(cudaDriverGetVersion(&version)) ? version : 0;
}

namespace {

// Counters for streams, each in a sector of its own. They are never given back: torch's streams are few and
// live as long as the process.
class Tickets {
 public:
  // The next one of the current device, or null.
  char* next(int device) {
    Page& page = pages_[device];
    if (page.left == 0) {
      // Memory may be taken while another thread captures its stream.
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      const bool relaxed = told(cudaThreadExchangeStreamCaptureMode(&mode));
      void* memory = nullptr;
      const bool taken = told(cudaMalloc(&memory, kPage));
      if (relaxed) (void)told(cudaThreadExchangeStreamCaptureMode(&mode));
      if (!taken) return nullptr;
      page = {static_cast<char*>(memory), kPage / kEach};
    }
    return page.memory + kEach * size_t(--page.left);
  }

 private:
  static constexpr int kPage = 4096, kEach = 32;
  struct Page {
    char* memory = nullptr;
    int left = 0;
  };
  std::map<int, Page> pages_;
};

}  // namespace

unsigned* stream_ticket(int device, void* stream) {
  const auto handle = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (!told(cudaStreamIsCapturing(handle, &status)) || status != cudaStreamCaptureStatusNone)
    return nullptr;
  // A handle may come back, of another stream, while kernels of the one before still run; an id does not.
  unsigned long long id = 0;
  if (!told(cudaStreamGetId(handle, &id))) return nullptr;
  static std::mutex mutex;
  static Tickets tickets;
  static std::map<std::pair<int, unsigned long long>, unsigned*> known;
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned*& ticket = known[{device, id}];
  if (ticket) return ticket;
  char* const fresh = tickets.next(device);
  if (!fresh || !told(cudaMemsetAsync(fresh, 0, sizeof(unsigned), handle))) return nullptr;
  return ticket = reinterpret_cast<unsigned*>(fresh);
}

}  // namespace kdkernels::cuda
