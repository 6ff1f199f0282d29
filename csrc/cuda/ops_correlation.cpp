// kdkernels::correlation and its backward on CUDA tensors; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "correlation.h"
#include "ops_bridge.h"

namespace kdkernels::cuda {
namespace {

// The loss into `total`, and the gradient where one is given.
void run(const CorrelationCall& call, const Tensor& student, const Tensor& teacher,
         const std::optional<Tensor>& counted, const Logits& logits, const Tensor* upstream,
         Tensor& total, Tensor* gradient, const Context& context) {
  STD_TORCH_CHECK(call.reduction != kNone, "reduction must be 'mean' or 'sum', got 'none'");
  CorrelationProblem problem = correlation_problem(call, student, teacher, counted, logits);
  if (gradient)
    problem.gradient = rows_of(*gradient, call.class_dim, gradient->mutable_data_ptr());
  const CorrelationRun work{problem, upstream ? upstream->const_data_ptr() : nullptr,
                            call.reduction, total.mutable_data_ptr()};
  const CorrelationPlan plan = plan_correlation(shape_of(problem), context.device);
  Tensor memory = workspace(student, workspace_bytes(work, plan));
  run_correlation(call.rule, work, plan, static_cast<char*>(memory.mutable_data_ptr()),
                  context.stream);
}

std::tuple<Tensor, Tensor> correlation(const Tensor& student, const Tensor& teacher,
                                       std::optional<Tensor> counted, std::string rule,
                                       std::vector<double> numbers, std::optional<Tensor> symbolic,
                                       int64_t class_dim, int64_t reduction, bool need_gradient) {
  const CorrelationCall call{rule, numbers_of(numbers, symbolic), class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  const Context context(student, {&teacher});
  Tensor gradient = empty_gradient(student, need_gradient);
  if (logits.rows == 0)
    return {torch::stable::new_zeros(student, {}, logits.loss_type()), gradient};
  Tensor loss = torch::stable::new_empty(student, {}, logits.loss_type());
  run(call, student, teacher, counted, logits, nullptr, loss, need_gradient ? &gradient : nullptr,
      context);
  return {loss, gradient};
}

Tensor correlation_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                            std::optional<Tensor> counted, std::string rule,
                            std::vector<double> numbers, std::optional<Tensor> symbolic,
                            int64_t class_dim, int64_t reduction) {
  const CorrelationCall call{rule, numbers_of(numbers, symbolic), class_dim, reduction};
  const Logits logits = check(student, teacher, class_dim);
  const Context context(student, {&teacher, &upstream});
  Tensor gradient = torch::stable::empty_like(student);
  if (logits.rows == 0) return gradient;
  STD_TORCH_CHECK(upstream.numel() == 1, "upstream must be one number");
  const Tensor factor = factors(upstream, logits.loss_type());
  Tensor loss = torch::stable::new_empty(student, {}, logits.loss_type());  // not wanted
  run(call, student, teacher, counted, logits, &factor, loss, &gradient, context);
  return gradient;
}

}  // namespace
}  // namespace kdkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("correlation", TORCH_BOX(&kdkernels::cuda::correlation));
  m.impl("correlation_backward", TORCH_BOX(&kdkernels::cuda::correlation_backward));
}
