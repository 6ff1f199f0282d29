// kdkernels::row and kdkernels::row_backward on the CPU; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "bridge.h"

namespace kdkernels {
namespace {

using cpu::RowProblem;

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

// Fills the problem; counts the valid rows and checks the targets on the way.
RowProblem row_problem(const RowArguments& a, const Logits& logits, bool decoupled) {
  RowProblem problem{};
  problem.student = rows_of(a.student, a.class_dim, a.student.const_data_ptr());
  problem.teacher = rows_of(a.teacher, a.class_dim, a.teacher.const_data_ptr());
  problem.rows = logits.rows;
  problem.classes = logits.classes;
  problem.ignore_index = a.ignore_index;
  problem.temperature = a.temperature;
  problem.standardize = a.standardize;
  STD_TORCH_CHECK(a.options.size() <= 4, "options must be at most 4 numbers");
  for (size_t i = 0; i < a.options.size(); ++i) problem.options.value[i] = a.options[i];
  int64_t valid = logits.rows;
  if (a.target) {
    STD_TORCH_CHECK(a.target->scalar_type() == ScalarType::Long && a.target->is_contiguous() &&
                        a.target->numel() == logits.rows,
                    "target must be contiguous int64, one for each row");
    problem.target = static_cast<const int64_t*>(a.target->const_data_ptr());
    valid = 0;
    for (int64_t row = 0; row < logits.rows; ++row) {
      const int64_t target = problem.target[row];
      if (target == a.ignore_index) continue;
      ++valid;
      STD_TORCH_CHECK(!decoupled || (target >= 0 && target < logits.classes),
                      "target must be in [0, ", logits.classes, ") or ignore_index=",
                      a.ignore_index, ", got ", target);
    }
  } else {
    STD_TORCH_CHECK(!decoupled, "target must be a Tensor of class indices, got None");
  }
  problem.scale = a.scale / (a.reduction == kMean ? double(valid > 0 ? valid : 1) : 1.0);
  return problem;
}

void run(const RowArguments& a, const RowProblem& problem, bool wide) {
  const auto& kernels = cpu::kernels(a.rule);
  STD_TORCH_CHECK(kernels.row_f32, "rule must be a row loss, got ", a.rule);
  if (problem.rows == 0) return;
  (wide ? kernels.row_f64 : kernels.row_f32)(problem, parallel_for);
}

bool is_decoupled(const std::string& rule) {
  return cpu::kernels(rule).family == Family::decoupled;
}

std::tuple<Tensor, Tensor> row(const Tensor& student, const Tensor& teacher,
                               std::optional<Tensor> target, std::string rule,
                               std::vector<double> options, double temperature, double scale,
                               bool standardize, int64_t ignore_index, int64_t class_dim,
                               int64_t reduction, bool need_gradient) {
  const RowArguments a{student, teacher, target, rule, options, temperature, scale,
                       standardize, ignore_index, class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  RowProblem problem = row_problem(a, logits, is_decoupled(rule));
  Tensor gradient = empty_gradient(student, need_gradient);
  problem.gradient = rows_of(need_gradient ? gradient : student, class_dim,
                             need_gradient ? gradient.mutable_data_ptr() : nullptr);
  if (reduction == kNone) {
    Tensor loss = torch::stable::new_empty(student, row_shape(student, class_dim), logits.loss_type());
    problem.loss = loss.mutable_data_ptr();
    run(a, problem, logits.wide);
    return {loss, gradient};
  }
  const Values values(logits.rows, logits.wide);
  problem.loss = values.buffer.data;
  run(a, problem, logits.wide);
  return {values.sum(student), gradient};
}

Tensor row_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                    std::optional<Tensor> target, std::string rule, std::vector<double> options,
                    double temperature, double scale, bool standardize, int64_t ignore_index,
                    int64_t class_dim, int64_t reduction) {
  const RowArguments a{student, teacher, target, rule, options, temperature, scale,
                       standardize, ignore_index, class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  RowProblem problem = row_problem(a, logits, is_decoupled(rule));
  Tensor gradient = torch::stable::empty_like(student);
  problem.gradient = rows_of(gradient, class_dim, gradient.mutable_data_ptr());
  Tensor factors = upstream;
  if (reduction == kNone) {
    factors = torch::stable::contiguous(torch::stable::to(upstream, logits.loss_type()));
    STD_TORCH_CHECK(factors.numel() == logits.rows, "upstream must be one number a row");
    problem.upstream = factors.const_data_ptr();
  } else {
    problem.scale *= number(upstream);
  }
  const Values values(logits.rows, logits.wide);
  problem.loss = values.buffer.data;
  run(a, problem, logits.wide);
  return gradient;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("row", TORCH_BOX(&kdkernels::row));
  m.impl("row_backward", TORCH_BOX(&kdkernels::row_backward));
}
