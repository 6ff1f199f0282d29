// The runtime's errors, raised.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace kdkernels::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // not sticky: the next launch must not report it again
  throw std::runtime_error(std::string("kdkernels: ") + what + " failed: " +
                           cudaGetErrorString(status));
}

}  // namespace kdkernels::cuda
