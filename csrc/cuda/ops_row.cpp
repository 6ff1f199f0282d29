// kdkernels::row and kdkernels::row_backward on CUDA tensors; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops_bridge.h"
#include "rows.h"

namespace kdkernels::cuda {
namespace {

// Everything but outputs and upstream; target and weights are where the student is.
RowProblem checked_problem(const RowCall& call, const Tensor& student, const Tensor& teacher,
                           const RowTensors& of_rows, const Logits& logits) {
  of_rows.each([&](const char* name, const std::optional<Tensor>& x) {
    STD_TORCH_CHECK(!x || (x->is_cuda() && x->get_device_index() == student.get_device_index()),
                    name, " must be on the student's device");
  });
  const RowProblem problem = row_problem(call, student, teacher, of_rows, logits);
  expect_divergence_alone(problem, call.parts);
  STD_TORCH_CHECK(problem.target || !reads_target(call.rule) || logits.rows == 0,
                  "target must be a Tensor of class indices, got None");
  return problem;
}

void run(const RowCall& call, const Tensor& like, const RowRun& run, const Context& context) {
  const RowPlan plan = plan_rows(shape_of(run.problem), context.device);
  Tensor memory = workspace(like, workspace_bytes(run, plan));
  run_rows(call.rule, run, plan, static_cast<char*>(memory.mutable_data_ptr()),
           context.ticket(run.total), context.stream);
}

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
  const Context context(student, {&teacher});
  Tensor gradient = empty_gradient(student, need_gradient);
  const auto shape =
      reduction == kNone ? row_shape(student, class_dim) : std::vector<int64_t>{};
  if (logits.rows == 0)
    return {torch::stable::new_zeros(student, shape, logits.loss_type()), gradient,
            empty_parts(call, student, logits)};
  Tensor loss = torch::stable::new_empty(student, shape, logits.loss_type());
  RowRun work{checked_problem(call, student, teacher, of_rows, logits), 0, reduction,
              nullptr};
  (reduction == kNone ? work.problem.loss : work.total) = loss.mutable_data_ptr();
  if (need_gradient)
    work.problem.gradient = rows_of(gradient, class_dim, gradient.mutable_data_ptr());
  run(call, student, work, context);
  return {loss, gradient, empty_parts(call, student, logits)};
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
  const Context context(student, {&teacher, &upstream});
  Tensor gradient = torch::stable::empty_like(student);
  if (logits.rows == 0) return gradient;
  const Tensor by_row = factors(upstream, logits.loss_type());
  const bool one = reduction != kNone;
  STD_TORCH_CHECK(by_row.numel() == (one ? 1 : logits.rows), "upstream must be of the loss's shape");
  RowRun work{checked_problem(call, student, teacher, of_rows, logits), one ? 0 : 1,
              reduction, nullptr};
  work.problem.upstream = by_row.const_data_ptr();
  work.problem.gradient = rows_of(gradient, class_dim, gradient.mutable_data_ptr());
  run(call, student, work, context);
  return gradient;
}

}  // namespace
}  // namespace kdkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("row", TORCH_BOX(&kdkernels::cuda::row));
  m.impl("row_backward", TORCH_BOX(&kdkernels::cuda::row_backward));
}
