// kdkernels::row and kdkernels::row_backward on the CPU; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/bridge.h"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> row(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
    std::optional<Tensor> token_weight, std::optional<Tensor> hard_token_weight,
    std::optional<Tensor> row_temperature, std::string rule, std::vector<double> numbers,
    std::optional<Tensor> symbolic, bool standardize, bool parts, int64_t ignore_index,
    int64_t class_dim, int64_t reduction, bool need_gradient) {
  const RowCall call{rule,  numbers_of(numbers, symbolic), standardize, parts, ignore_index,
                     class_dim, reduction};
  const RowTensors of_rows{target, token_weight, hard_token_weight, row_temperature};
  const Logits logits = check(student, teacher, class_dim);
  const auto& kernels = cpu::kernels(rule);
  RowProblem problem = row_problem(call, student, teacher, of_rows, logits);
  cpu::finish(problem, kernels, reduction);
  Tensor gradient = empty_gradient(student, need_gradient);
  if (need_gradient) problem.gradient = rows_of(gradient, class_dim, gradient.mutable_data_ptr());
  Tensor separate = empty_parts(call, student, logits);
  if (parts) problem.parts = separate.mutable_data_ptr();
  if (reduction == kNone) {
    Tensor loss = allocated("the loss", logits.rows, [&] {
      return torch::stable::new_empty(student, row_shape(student, class_dim), logits.loss_type());
    });
    problem.loss = loss.mutable_data_ptr();
    cpu::run(problem, kernels, logits.wide, reduction, parallel_for);
    return {loss, gradient, separate};
  }
  const double value = cpu::run(problem, kernels, logits.wide, reduction, parallel_for);
  return {scalar_loss(student, value, logits.wide), gradient, separate};
}

Tensor row_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                    std::optional<Tensor> target, std::optional<Tensor> token_weight,
                    std::optional<Tensor> hard_token_weight, std::optional<Tensor> row_temperature,
                    std::string rule, std::vector<double> numbers, std::optional<Tensor> symbolic,
                    bool standardize, bool parts, int64_t ignore_index, int64_t class_dim,
                    int64_t reduction) {
  const RowCall call{rule,  numbers_of(numbers, symbolic), standardize, parts, ignore_index,
                     class_dim, reduction};
  const RowTensors of_rows{target, token_weight, hard_token_weight, row_temperature};
  const Logits logits = check(student, teacher, class_dim);
  const auto& kernels = cpu::kernels(rule);
  RowProblem problem = row_problem(call, student, teacher, of_rows, logits);
  cpu::finish(problem, kernels, reduction);
  Tensor gradient = empty_gradient(student);
  problem.gradient = rows_of(gradient, class_dim, gradient.mutable_data_ptr());
  Tensor factors = upstream;
  if (reduction == kNone) {
    factors = torch::stable::contiguous(torch::stable::to(upstream, logits.loss_type()));
    STD_TORCH_CHECK(factors.numel() == logits.rows, "upstream must be one number a row");
    problem.upstream = factors.const_data_ptr();
  } else {
    const double factor = number(upstream);
    problem.scale *= factor;
    problem.hard *= factor;
  }
  cpu::run(problem, kernels, logits.wide, kSum, parallel_for);  // the values are not wanted
  return gradient;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("row", TORCH_BOX(&kdkernels::row));
  m.impl("row_backward", TORCH_BOX(&kdkernels::row_backward));
}
