// What the operators on CUDA tensors share: device, stream, workspace.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>

#include "../bridge.h"
#include "common.h"
#include "task.h"

namespace kdkernels::cuda {

// What the kernels' plans need of a device; asked once.
const Device& device_of(int index);

// The current stream of a device.
void* current_stream(int index);

// While it lives the tensor's device is the current one. The others must be there too: a kernel would
// take an address of another device, or of the host, for its own.
struct Context {
  explicit Context(const Tensor& x, std::initializer_list<const Tensor*> others = {})
      : index(x.get_device_index()),
        guard(index),
        device(device_of(index)),
        stream(current_stream(index)) {
    for (const Tensor* other : others)
      STD_TORCH_CHECK(other->is_cuda() && other->get_device_index() == index,
                      "all tensors must be on one CUDA device");
    use_device(index);
  }

  // The stream's counter for a loss that is summed up, if one is.
  unsigned* ticket(const void* total) const {
    return total ? stream_ticket(index, stream) : nullptr;
  }

  int index;
  torch::stable::accelerator::DeviceGuard guard;
  const Device& device;
  void* stream;
};

// Memory of any content for the launches that follow on the current stream.
inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// The upstream gradient in the working type, a value a row or one for all.
inline Tensor factors(const Tensor& upstream, ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(upstream, type));
}

}  // namespace kdkernels::cuda
