// The pybind11 module kdkernels._C: what was built and what this machine uses of it.
//
// Importing it registers the operators (ops_*.cpp are part of the same library).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/dispatch.h"

namespace {

std::map<std::string, std::string> build_info() {
  std::string compiled;
  for (const std::string& isa : kdkernels::cpu::capabilities())
    compiled += (compiled.empty() ? "" : " ") + isa;
  return {{"compiler", __VERSION__},
          {"torch target", KDK_TORCH_TARGET},
          {"instruction sets", compiled}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of kdkernels.";
  m.def("build_info", &build_info, "How the extension was built.");
  m.def("cpu_capability", &kdkernels::cpu::capability, "The instruction set in use.");
  m.def("cpu_capabilities", &kdkernels::cpu::capabilities, "The instruction sets compiled in.");
  m.def("rules", &kdkernels::cpu::rules, "The rules of a family.", pybind11::arg("family"));
}
