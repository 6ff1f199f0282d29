// Rows of logits against K ids: specification in kdkernels/reference/topk.py.
#pragma once

#include "math.h"

namespace kdkernels::rules::topk {

// No mathematics of a loss: the dense losses' rules run on what the traversal gives.
struct Rule {
  static constexpr Family family = Family::sparse;
  static constexpr bool cuda = false;  // Triton's traversal serves CUDA tensors
};

}  // namespace kdkernels::rules::topk
