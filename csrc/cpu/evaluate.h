// Running a problem on plain pointers: shared by the operators (ops_*.cpp) and by the eager entry
// points of the pybind11 module.
#pragma once

#include <string>

#include "dispatch.h"

namespace kdkernels::cpu {

// Divides the scales by the valid rows for kMean. Throws std::invalid_argument where a rule or a
// cross-entropy that reads the targets finds one out of range.
void finish(RowProblem& problem, const Kernels& kernels, int64_t reduction);

// Runs the rows, with the values at problem.loss (kNone) or their sum returned.
double run(RowProblem& problem, const Kernels& kernels, bool wide, int64_t reduction,
           ParallelFor parallel_for);

// Runs a correlation; `inter` and `intra` are divided by their counts for kMean.
double run(CorrelationProblem& problem, const Kernels& kernels, bool wide, int64_t reduction,
           ParallelFor parallel_for);

// Runs the forward pass, or the backward pass where there is a gradient. Throws std::invalid_argument
// where a target that is read or a present id is out of range, and where a row has an id twice.
void run(TopKProblem& problem, const Kernels& kernels, bool wide, ParallelFor parallel_for);

// The loss of rows against K ids, by the kernels of a dense loss on the small logits: their sum, where
// `reduction` is kMean over the rows that count. Of `dense` the caller gives the teacher's small logits, the
// weights and the options.
double run(TopKLossProblem& problem, const Kernels& kernels, const Kernels& dense_kernels, bool wide,
           int64_t reduction, ParallelFor parallel_for);

}  // namespace kdkernels::cpu
