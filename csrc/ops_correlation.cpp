// kdkernels::correlation and its backward on the CPU; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/bridge.h"

namespace kdkernels {
namespace {


struct CorrelationArguments {
  const Tensor& student;
  const Tensor& teacher;
  const std::string& rule;
  double inter, intra, tau, eps;
  int64_t class_dim, reduction;
};

// Runs the problem; the gradient is written where one is given.
double run(const CorrelationArguments& a, const Logits& logits, const Tensor* gradient) {
  CorrelationProblem problem{};
  problem.student = rows_of(a.student, a.class_dim, a.student.const_data_ptr());
  problem.teacher = rows_of(a.teacher, a.class_dim, a.teacher.const_data_ptr());
  if (gradient) problem.gradient = rows_of(*gradient, a.class_dim, gradient->mutable_data_ptr());
  problem.rows = logits.rows;
  problem.classes = logits.classes;
  problem.inter = a.inter;
  problem.intra = a.intra;
  problem.tau = a.tau;
  problem.eps = a.eps;
  return cpu::run(problem, cpu::kernels(a.rule), logits.wide, a.reduction, parallel_for);
}

std::tuple<Tensor, Tensor> correlation(const Tensor& student, const Tensor& teacher,
                                       std::string rule, double inter, double intra, double tau,
                                       double eps, int64_t class_dim, int64_t reduction,
                                       bool need_gradient) {
  const Logits logits = check(student, teacher, class_dim);
  Tensor gradient = empty_gradient(student, need_gradient);
  const double value = run({student, teacher, rule, inter, intra, tau, eps, class_dim, reduction},
                           logits, need_gradient ? &gradient : nullptr);
  return {scalar_loss(student, value, logits.wide), gradient};
}

Tensor correlation_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                            std::string rule, double inter, double intra, double tau, double eps,
                            int64_t class_dim, int64_t reduction) {
  const Logits logits = check(student, teacher, class_dim);
  Tensor gradient = empty_gradient(student);
  const double factor = number(upstream);
  run({student, teacher, rule, inter * factor, intra * factor, tau, eps, class_dim, reduction},
      logits, &gradient);
  return gradient;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("correlation", TORCH_BOX(&kdkernels::correlation));
  m.impl("correlation_backward", TORCH_BOX(&kdkernels::correlation_backward));
}
