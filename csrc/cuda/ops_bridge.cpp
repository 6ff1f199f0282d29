// The device as the operators see it, and the pybind11 module kdkernels._cuda. Importing it registers
// the operators for CUDA tensors (ops_*.cpp are part of the same library).
#include "ops_bridge.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "common.h"
#include "ops_eager.h"
#include "rows.h"

namespace kdkernels::cuda {
const Device& device_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;  // references stay valid
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  return known.emplace(index, describe_device(index)).first->second;
}

void* current_stream(int index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == 0,
                  "aoti_torch_get_current_cuda_stream failed");
  return stream;
}

namespace {

std::map<std::string, std::string> build_info() {
  return {{"CUDA", KDK_CUDA_TOOLKIT}, {"architectures", KDK_CUDA_ARCHS}};
}

std::string driver() {
  const int version = driver_version();
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::vector<std::string> rules(const std::string& family) {
#define KDK_NAME(rule) #rule,
  if (family == "divergence" || family == "decoupled") {
    std::vector<std::string> names;
    for (const char* name : {KDK_ROW_RULES(KDK_NAME)})
      if (reads_target(name) == (family == "decoupled")) names.push_back(name);
    return names;
  }
  if (family == "correlation") return {KDK_CORRELATION_RULES(KDK_NAME)};
  if (family == "embedding") return {KDK_FACTOR_RULES(KDK_NAME) KDK_TUPLE_RULES(KDK_NAME)};
#undef KDK_NAME
  return {};
}

std::map<std::string, int> device_info(int index) {
  const Device& device = [&]() -> const Device& {
    const pybind11::gil_scoped_release release;  // the device may have to wake up
    return device_of(index);
  }();
  return {{"arch", device.arch},
          {"multiprocessors", device.multiprocessors},
          {"block_shared", device.block_shared},
          {"most_cluster", device.most_cluster}};
}

}  // namespace
}  // namespace kdkernels::cuda

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of kdkernels.";
  m.def("build_info", &kdkernels::cuda::build_info, "How the extension was built.");
  m.def("driver", &kdkernels::cuda::driver, "The newest CUDA that the driver knows, such as 12.8.");
  m.def("device_info", &kdkernels::cuda::device_info, "What the plans know of a device.");
  m.def("rules", &kdkernels::cuda::rules, "The rules of a family.");
  kdkernels::cuda::bind_eager(m);
}
