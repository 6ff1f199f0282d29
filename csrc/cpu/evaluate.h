// Running a problem on plain pointers: shared by the operators (ops_*.cpp) and by the eager entry
// points of the pybind11 module.
#pragma once

#include <string>

#include "dispatch.h"

namespace kdkernels::cpu {

// Fills what depends on the targets: `scale` over the valid rows for kMean. Throws
// std::invalid_argument where a rule that reads the targets finds one out of range.
void finish(RowProblem& problem, const Kernels& kernels, double scale, int64_t reduction);

// Runs the rows, with the values at problem.loss (kNone) or their sum returned.
double run(RowProblem& problem, const Kernels& kernels, bool wide, int64_t reduction,
           ParallelFor parallel_for);

// Runs a correlation; `inter` and `intra` are divided by their counts for kMean.
double run(CorrelationProblem& problem, const Kernels& kernels, bool wide, int64_t reduction,
           ParallelFor parallel_for);

}  // namespace kdkernels::cpu
