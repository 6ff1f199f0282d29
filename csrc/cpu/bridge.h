// What only the operators on CPU tensors need of csrc/bridge.h.
#pragma once

#include "../bridge.h"
#include "evaluate.h"
#include "parallel.h"

namespace kdkernels {

using cpu::parallel_for;

// A 0-d floating-point tensor as a number.
inline double number(const Tensor& x) {
  STD_TORCH_CHECK(x.numel() == 1, "upstream must be one number");
  const Tensor wide = torch::stable::to(x, ScalarType::Double);
  return *static_cast<const double*>(wide.const_data_ptr());
}

// The loss as a 0-d tensor.
inline Tensor scalar_loss(const Tensor& like, double value, bool wide) {
  Tensor loss = torch::stable::new_empty(like, {}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) *static_cast<double*>(loss.mutable_data_ptr()) = value;
  else *static_cast<float*>(loss.mutable_data_ptr()) = float(value);
  return loss;
}

}  // namespace kdkernels
