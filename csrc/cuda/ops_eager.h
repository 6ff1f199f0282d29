// The part of the module kdkernels._cuda in ops_eager.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace kdkernels::cuda {
void bind_eager(pybind11::module_& m);
}
