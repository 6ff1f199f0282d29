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
                           const std::optional<Tensor>& target,
                           const std::optional<Tensor>& token_weight, const Logits& logits) {
  const auto beside = [&](const std::optional<Tensor>& x) {
    return !x || (x->is_cuda() && x->get_device_index() == student.get_device_index());
  };
  STD_TORCH_CHECK(beside(target), "target must be on the student's device");
  STD_TORCH_CHECK(beside(token_weight), "token_weight must be on the student's device");
  const RowProblem problem = row_problem(call, student, teacher, target, token_weight, logits);
  STD_TORCH_CHECK(problem.target || !reads_target(call.rule) || logits.rows == 0,
                  "target must be a Tensor of class indices, got None");
  return problem;
}

void run(const RowCall& call, const Tensor& like, const RowRun& run, const Context& context) {
  const RowPlan plan = plan_rows(shape_of(run.problem), context.device);
  Tensor memory = workspace(like, workspace_bytes(run, plan));
  run_rows(call.rule, run, plan, static_cast<char*>(memory.mutable_data_ptr()), context.stream);
}

std::tuple<Tensor, Tensor> row(const Tensor& student, const Tensor& teacher,
                               std::optional<Tensor> target, std::optional<Tensor> token_weight,
                               std::string rule, std::vector<double> numbers,
                               std::optional<Tensor> symbolic,
                               bool standardize, int64_t ignore_index, int64_t class_dim,
                               int64_t reduction, bool need_gradient) {
  const RowCall call{rule, numbers_of(numbers, symbolic), standardize,
                     ignore_index, class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  const Context context(student, {&teacher});
  Tensor gradient = empty_gradient(student, need_gradient);
  const auto shape =
      reduction == kNone ? row_shape(student, class_dim) : std::vector<int64_t>{};
  if (logits.rows == 0)
    return {torch::stable::new_zeros(student, shape, logits.loss_type()), gradient};
  Tensor loss = torch::stable::new_empty(student, shape, logits.loss_type());
  RowRun work{checked_problem(call, student, teacher, target, token_weight, logits), 0, reduction,
              nullptr};
  (reduction == kNone ? work.problem.loss : work.total) = loss.mutable_data_ptr();
  if (need_gradient)
    work.problem.gradient = rows_of(gradient, class_dim, gradient.mutable_data_ptr());
  run(call, student, work, context);
  return {loss, gradient};
}

Tensor row_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                    std::optional<Tensor> target, std::optional<Tensor> token_weight,
                    std::string rule, std::vector<double> numbers, std::optional<Tensor> symbolic,
                    bool standardize, int64_t ignore_index,
                    int64_t class_dim, int64_t reduction) {
  const RowCall call{rule, numbers_of(numbers, symbolic), standardize,
                     ignore_index, class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  const Context context(student, {&teacher, &upstream});
  Tensor gradient = torch::stable::empty_like(student);
  if (logits.rows == 0) return gradient;
  const Tensor by_row = factors(upstream, logits.loss_type());
  const bool one = reduction != kNone;
  STD_TORCH_CHECK(by_row.numel() == (one ? 1 : logits.rows), "upstream must be of the loss's shape");
  RowRun work{checked_problem(call, student, teacher, target, token_weight, logits), one ? 0 : 1,
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
