// The CPU's row traversals with the rules of this folder, for tests/rule_library.py. KDK_RULES and KDK_ISAS
// as for csrc/cpu/dispatch.cpp, which is linked too.
#include <stdexcept>
#include <string>

#include "../../csrc/cpu/evaluate.h"
#include "../emulator/calls.h"

using namespace kdkernels;

namespace kdkernels::cpu {
#define X(rule, isa) extern const Kernels rule##_##isa;
#define DECLARE(rule) KDK_ISAS(rule)
KDK_RULES(DECLARE)
#undef DECLARE
#undef X
}  // namespace kdkernels::cpu

namespace {

const cpu::Kernels& find(const std::string& name) {
#define X(rule, isa) \
  if (name == #rule "_" #isa) return cpu::rule##_##isa;
#define LIST(rule) KDK_ISAS(rule)
  KDK_RULES(LIST)
#undef LIST
#undef X
  throw std::invalid_argument("no kernels " + name);
}

void serial(int64_t count, int64_t, cpu::Task task, void* context) { task(context, 0, count); }

}  // namespace

// `name` is a rule and an instruction set, such as toy_avx2. Null, or the text of the error.
extern "C" __attribute__((visibility("default"))) const char* run_row(const char* name,
                                                                       const RowCall* call) {
  static std::string text;
  try {
    const cpu::Kernels& kernels = find(name);
    RowProblem problem = problem_of(*call);
    const bool wide = problem.student.type == Scalar::f64 || problem.teacher.type == Scalar::f64;
    cpu::finish(problem, kernels, call->reduction);
    const double value = cpu::run(problem, kernels, wide, call->reduction, serial);
    if (call->total && wide) *static_cast<double*>(call->total) = value;
    if (call->total && !wide) *static_cast<float*>(call->total) = float(value);
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

// The instruction sets that this machine has.
extern "C" __attribute__((visibility("default"))) const char* supported() {
  static std::string names;
  names.clear();
  for (const std::string& name : cpu::capabilities()) {
    names += (names.empty() ? "" : " ") + name;
    if (name == cpu::capability()) break;
  }
  return names.c_str();
}
