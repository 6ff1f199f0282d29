// Running a row loss on the device: plan, workspace, launches. Plain pointers, no PyTorch.
#pragma once

#include <string>

#include "task.h"

namespace kdkernels::cuda {

struct RowRun {
  RowProblem problem;       // scale not yet divided by the rows; loss null unless reduction is none
  int64_t upstream_stride;  // of problem.upstream
  int64_t reduction;
  void* total;  // where the sum goes, in the working type, or null
};

RowShape shape_of(const RowProblem& problem);

// Bytes that run_rows needs, 256-byte aligned, of any content.
int64_t workspace_bytes(const RowRun& run, const RowPlan& plan);

// A launch on the stream, after one that counts where the valid of many rows count; nothing waits for the
// device. `ticket` is the stream's counter (common.h), or null: then there is a launch before in any case.
void run_rows(const std::string& rule, const RowRun& run, const RowPlan& plan, char* workspace,
              unsigned* ticket, void* stream);

// Whether a rule needs targets; throws for a name that is not a row loss.
bool reads_target(const std::string& rule);

// Throws where a call asks for what Triton's kernels alone give on a GPU: kdkernels/_rowrun.py goes there.
void expect_divergence_alone(const RowProblem& problem, bool parts);

}  // namespace kdkernels::cuda
