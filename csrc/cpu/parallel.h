// torch's own thread pool (a second one in the process would fight with it), through the stable ABI.
#pragma once

#include "problem.h"

namespace kdkernels::cpu {

void parallel_for(int64_t count, int64_t grain, Task task, void* context);

}  // namespace kdkernels::cpu
