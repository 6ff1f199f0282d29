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

struct RowArguments {
  const Tensor& student;
  const Tensor& teacher;
  const std::optional<Tensor>& target;
  const std::string& rule;
  const std::vector<double>& options;
  double temperature, scale;
  bool standardize;
  int64_t ignore_index, class_dim, reduction;
};

RowProblem row_problem(const RowArguments& a, const Logits& logits) {
  RowProblem problem{};
  problem.student = rows_of(a.student, a.class_dim, a.student.const_data_ptr());
  problem.teacher = rows_of(a.teacher, a.class_dim, a.teacher.const_data_ptr());
  problem.gradient = rows_of(a.student, a.class_dim, nullptr);
  problem.rows = logits.rows;
  problem.classes = logits.classes;
  problem.ignore_index = a.ignore_index;
  problem.temperature = a.temperature;
  problem.scale = a.scale;
  problem.standardize = a.standardize;
  STD_TORCH_CHECK(a.options.size() <= 4, "options must be at most 4 numbers");
  for (size_t i = 0; i < a.options.size(); ++i) problem.options.value[i] = a.options[i];
  if (a.target) {
    STD_TORCH_CHECK(a.target->is_cuda() &&
                        a.target->get_device_index() == a.student.get_device_index(),
                    "target must be on the student's device");
    STD_TORCH_CHECK(a.target->scalar_type() == ScalarType::Long && a.target->is_contiguous() &&
                        a.target->numel() == logits.rows,
                    "target must be contiguous int64, one for each row");
    problem.target = static_cast<const int64_t*>(a.target->const_data_ptr());
  }
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
  RowRun work{row_problem(a, logits), 0, reduction, nullptr};
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
  RowRun work{row_problem(a, logits), one ? 0 : 1, reduction, nullptr};
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
