#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace kdkernels::cpu {

void parallel_for(int64_t count, int64_t grain, Task task, void* context) {
  if (count <= grain) return task(context, 0, count);
  torch::stable::parallel_for(0, count, grain, [task, context](int64_t begin, int64_t end) {
    task(context, begin, end);
  });
}

}  // namespace kdkernels::cpu
