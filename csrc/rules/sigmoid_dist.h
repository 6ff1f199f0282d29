// DIST over sigmoids. Specification: kdkernels/reference/sigmoid_dist.py.
#pragma once

#include "dist.h"

namespace kdkernels::rules::sigmoid_dist {

struct Rule : dist::Rule {
  static constexpr Family family = Family::correlation;
  static constexpr bool sigmoid = true;  // of the sigmoids of all logits
  static constexpr bool cuda = false;    // Triton serves GPUs: the CUDA kernels are written for softmaxes
};

}  // namespace kdkernels::rules::sigmoid_dist
