// kdkernels::correlation and its backward on the CPU; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/bridge.h"

namespace kdkernels {
namespace {

// The gradient is written where one is given, multiplied by `factor`.
double run(const CorrelationCall& call, const Tensor& student, const Tensor& teacher,
           const std::optional<Tensor>& counted, const Logits& logits, double factor,
           const Tensor* gradient) {
  CorrelationProblem problem = correlation_problem(call, student, teacher, counted, logits);
  problem.inter *= factor;
  problem.intra *= factor;
  if (gradient) problem.gradient = rows_of(*gradient, call.class_dim, gradient->mutable_data_ptr());
  return cpu::run(problem, cpu::kernels(call.rule), logits.wide, call.reduction, parallel_for);
}

std::tuple<Tensor, Tensor> correlation(const Tensor& student, const Tensor& teacher,
                                       std::optional<Tensor> counted, std::string rule,
                                       std::vector<double> numbers, std::optional<Tensor> symbolic,
                                       int64_t class_dim, int64_t reduction, bool need_gradient) {
  const CorrelationCall call{rule, numbers_of(numbers, symbolic), class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  Tensor gradient = empty_gradient(student, need_gradient);
  const double value =
      run(call, student, teacher, counted, logits, 1.0, need_gradient ? &gradient : nullptr);
  return {scalar_loss(student, value, logits.wide), gradient};
}

Tensor correlation_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                            std::optional<Tensor> counted, std::string rule,
                            std::vector<double> numbers, std::optional<Tensor> symbolic,
                            int64_t class_dim, int64_t reduction) {
  const CorrelationCall call{rule, numbers_of(numbers, symbolic), class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  Tensor gradient = empty_gradient(student);
  run(call, student, teacher, counted, logits, number(upstream), &gradient);
  return gradient;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("correlation", TORCH_BOX(&kdkernels::correlation));
  m.impl("correlation_backward", TORCH_BOX(&kdkernels::correlation_backward));
}
