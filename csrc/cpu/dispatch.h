// The table of compiled rules, and the instruction set in use.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace kdkernels::cpu {

// Instruction sets compiled in, weakest first, and the one in use: the strongest that this machine
// supports, or the environment variable KDKERNELS_CPU_CAPABILITY.
std::vector<std::string> capabilities();
const std::string& capability();

// The kernels of a rule for the instruction set in use; throws if there is no such rule.
const Kernels& kernels(const std::string& rule);

// The names of the rules of a family: "divergence", "decoupled", "correlation", "embedding"
// or "sparse".
std::vector<std::string> rules(const std::string& family);

}  // namespace kdkernels::cpu
