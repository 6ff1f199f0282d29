// kdkernels::correlation and its backward on the CPU; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bridge.h"

namespace kdkernels {
namespace {

using cpu::CorrelationProblem;

void run(CorrelationProblem& problem, const Tensor& student, const Tensor& teacher,
         const std::string& rule, const Logits& logits, double inter, double intra, double tau,
         double eps, int64_t class_dim, int64_t reduction) {
  const auto& kernels = cpu::kernels(rule);
  STD_TORCH_CHECK(kernels.correlation_f32, "rule must be a correlation loss, got ", rule);
  STD_TORCH_CHECK(reduction != kNone, "reduction must be 'mean' or 'sum', got 'none'");
  problem.student = rows_of(student, class_dim, student.const_data_ptr());
  problem.teacher = rows_of(teacher, class_dim, teacher.const_data_ptr());
  problem.rows = logits.rows;
  problem.classes = logits.classes;
  problem.inter = inter / (reduction == kMean ? double(logits.rows) : 1.0);
  problem.intra = intra / (reduction == kMean ? double(logits.classes) : 1.0);
  problem.tau = tau;
  problem.eps = eps;
  (logits.wide ? kernels.correlation_f64 : kernels.correlation_f32)(problem, parallel_for);
}

std::tuple<Tensor, Tensor> correlation(const Tensor& student, const Tensor& teacher,
                                       std::string rule, double inter, double intra, double tau,
                                       double eps, int64_t class_dim, int64_t reduction,
                                       bool need_gradient) {
  const Logits logits = check(student, teacher, class_dim);
  Tensor gradient = empty_gradient(student, need_gradient);
  CorrelationProblem problem{};
  problem.gradient = rows_of(need_gradient ? gradient : student, class_dim,
                             need_gradient ? gradient.mutable_data_ptr() : nullptr);
  if (logits.rows == 0) return {Values(0, logits.wide).sum(student), gradient};
  const Values values(logits.rows + logits.classes, logits.wide);
  problem.loss = values.buffer.data;
  run(problem, student, teacher, rule, logits, inter, intra, tau, eps, class_dim, reduction);
  return {values.sum(student), gradient};
}

Tensor correlation_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                            std::string rule, double inter, double intra, double tau, double eps,
                            int64_t class_dim, int64_t reduction) {
  const Logits logits = check(student, teacher, class_dim);
  Tensor gradient = torch::stable::empty_like(student);
  if (logits.rows == 0) return gradient;
  CorrelationProblem problem{};
  problem.gradient = rows_of(gradient, class_dim, gradient.mutable_data_ptr());
  const Values values(logits.rows + logits.classes, logits.wide);
  problem.loss = values.buffer.data;
  const double factor = number(upstream);
  run(problem, student, teacher, rule, logits, inter * factor, intra * factor, tau, eps, class_dim,
      reduction);
  return gradient;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("correlation", TORCH_BOX(&kdkernels::correlation));
  m.impl("correlation_backward", TORCH_BOX(&kdkernels::correlation_backward));
}
