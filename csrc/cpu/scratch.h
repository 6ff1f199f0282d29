// Scratch memory, allocated by code that is compiled for the baseline instruction set.
#pragma once

#include <cstddef>

namespace kdkernels::cpu {

// At least `bytes` bytes, aligned to 64, valid until this thread's next call; kept between calls.
void* scratch(std::size_t bytes);

// A buffer shared by the threads of one call.
struct Buffer {
  void* data;
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

}  // namespace kdkernels::cpu
