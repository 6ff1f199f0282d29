// kdkernels::row and kdkernels::row_backward on CUDA tensors; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../row_arguments.h"
#include "ops_bridge.h"
#include "rows.h"

namespace kdkernels::cuda {
namespace {

RowProblem checked_problem(const RowArguments& a, const Logits& logits) {
  STD_TORCH_CHECK(!a.target || (a.target->is_cuda() &&
                                a.target->get_device_index() == a.student.get_device_index()),
                  "target must be on the student's device");
  const RowProblem problem = row_problem(a, logits);
  STD_TORCH_CHECK(problem.target || !reads_target(a.rule) || logits.rows == 0,
                  "target must be a Tensor of class indices, got None");
  return problem;
}

void run(const RowArguments& a, const RowRun& run, const Context& context) {
  const RowPlan plan = plan_rows(shape_of(run.problem), context.device);
  Tensor memory = workspace(a.student, workspace_bytes(run, plan));
  run_rows(a.rule, run, plan, static_cast<char*>(memory.mutable_data_ptr()), context.stream);
}

std::tuple<Tensor, Tensor> row(const Tensor& student, const Tensor& teacher,
                               std::optional<Tensor> target, std::string rule,
                               std::vector<double> options, double temperature, double scale,
                               bool standardize, int64_t ignore_index, int64_t class_dim,
                               int64_t reduction, bool need_gradient) {
  const RowArguments a{student, teacher, target, rule, options, temperature, scale,
                       standardize, ignore_index, class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  const Context context(student, {&teacher});
  Tensor gradient = empty_gradient(student, need_gradient);
  if (logits.rows == 0)
    return {torch::stable::new_zeros(
                student,
                reduction == kNone ? row_shape(student, class_dim) : std::vector<int64_t>{},
                logits.loss_type()),
            gradient};
  Tensor loss = torch::stable::new_empty(
      student, reduction == kNone ? row_shape(student, class_dim) : std::vector<int64_t>{},
      logits.loss_type());
  RowRun work{checked_problem(a, logits), 0, reduction, nullptr};
  (reduction == kNone ? work.problem.loss : work.total) = loss.mutable_data_ptr();
  if (need_gradient)
    work.problem.gradient = rows_of(gradient, class_dim, gradient.mutable_data_ptr());
  run(a, work, context);
  return {loss, gradient};
}

Tensor row_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                    std::optional<Tensor> target, std::string rule, std::vector<double> options,
                    double temperature, double scale, bool standardize, int64_t ignore_index,
                    int64_t class_dim, int64_t reduction) {
  const RowArguments a{student, teacher, target, rule, options, temperature, scale,
                       standardize, ignore_index, class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  const Context context(student, {&teacher, &upstream});
  Tensor gradient = torch::stable::empty_like(student);
  if (logits.rows == 0) return gradient;
  const Tensor by_row = factors(upstream, logits.loss_type());
  const bool one = reduction != kNone;
  STD_TORCH_CHECK(by_row.numel() == (one ? 1 : logits.rows), "upstream must be of the loss's shape");
  RowRun work{checked_problem(a, logits), one ? 0 : 1, reduction, nullptr};
  work.problem.upstream = by_row.const_data_ptr();
  work.problem.gradient = rows_of(gradient, class_dim, gradient.mutable_data_ptr());
  run(a, work, context);
  return gradient;
}

}  // namespace
}  // namespace kdkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("row", TORCH_BOX(&kdkernels::cuda::row));
  m.impl("row_backward", TORCH_BOX(&kdkernels::cuda::row_backward));
}
