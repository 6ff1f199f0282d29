// The operators of the embedding losses on CUDA tensors; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "embedding.h"
#include "ops_bridge.h"

namespace kdkernels::cuda {
namespace {

// Checked: equal shapes of (samples, width), one device.
ScalarType loss_type(const Tensor& inheritance, const Tensor& exploration, const Tensor& teacher) {
  const bool wide = check(inheritance, teacher, 1).wide || check(exploration, teacher, 1).wide;
  STD_TORCH_CHECK(teacher.dim() == 2, "teacher_factor must be (B, D)");
  for (const Tensor* x : {&inheritance, &exploration})
    STD_TORCH_CHECK(x->get_device_index() == teacher.get_device_index(),
                    "factors must be on one device");
  return wide ? ScalarType::Double : ScalarType::Float;
}

// The gradients, and the loss where `total` is not null.
std::tuple<Tensor, Tensor> run(const FactorCall& call, const Tensor& inheritance,
                               const Tensor& exploration, const Tensor& teacher,
                               const Tensor* upstream, void* total, const Context& context,
                               bool need_inheritance, bool need_exploration) {
  Tensor inheritance_gradient = empty_gradient(inheritance, need_inheritance);
  Tensor exploration_gradient = empty_gradient(exploration, need_exploration);
  FactorProblem problem{};
  problem.samples = teacher.size(0);
  problem.width = teacher.size(1);
  call.fill(problem);
  const bool nothing = !total && !need_inheritance && !need_exploration;
  if (problem.samples == 0 || nothing) return {inheritance_gradient, exploration_gradient};
  problem.inheritance = rows_of(inheritance, 1, inheritance.const_data_ptr());
  problem.exploration = rows_of(exploration, 1, exploration.const_data_ptr());
  problem.teacher = rows_of(teacher, 1, teacher.const_data_ptr());
  if (need_inheritance)
    problem.inheritance_gradient =
        rows_of(inheritance_gradient, 1, inheritance_gradient.mutable_data_ptr());
  if (need_exploration)
    problem.exploration_gradient =
        rows_of(exploration_gradient, 1, exploration_gradient.mutable_data_ptr());
  const void* const factor = upstream ? upstream->const_data_ptr() : nullptr;
  const FactorRun work{problem, factor, call.reduction, total};
  const FactorPlan plan = plan_factors(shape_of(problem), context.device);
  Tensor memory = workspace(teacher, workspace_bytes(work, plan));
  run_factors("iekd", work, plan, static_cast<char*>(memory.mutable_data_ptr()),
              context.ticket(total), context.stream);
  return {inheritance_gradient, exploration_gradient};
}

std::tuple<Tensor, Tensor, Tensor> iekd(const Tensor& inheritance, const Tensor& exploration,
                                        const Tensor& teacher, std::vector<double> numbers,
                                        std::optional<Tensor> symbolic, bool cosine,
                                        int64_t reduction, bool need_inheritance,
                                        bool need_exploration) {
  const FactorCall call{numbers_of(numbers, symbolic), cosine, reduction};
  const ScalarType type = loss_type(inheritance, exploration, teacher);
  const Context context(teacher);
  Tensor loss = teacher.size(0) ? torch::stable::new_empty(teacher, {}, type)
                                : torch::stable::new_zeros(teacher, {}, type);
  const auto [first, second] = run(call, inheritance, exploration, teacher, nullptr,
                                   loss.mutable_data_ptr(), context, need_inheritance,
                                   need_exploration);
  return {loss, first, second};
}

std::tuple<Tensor, Tensor> iekd_backward(const Tensor& upstream, const Tensor& inheritance,
                                         const Tensor& exploration, const Tensor& teacher,
                                         std::vector<double> numbers,
                                         std::optional<Tensor> symbolic, bool cosine,
                                         int64_t reduction, bool need_inheritance,
                                         bool need_exploration) {
  const FactorCall call{numbers_of(numbers, symbolic), cosine, reduction};
  const ScalarType type = loss_type(inheritance, exploration, teacher);
  STD_TORCH_CHECK(upstream.numel() == 1 &&
                      upstream.get_device_index() == teacher.get_device_index(),
                  "upstream must be one number on the factors' device");
  const Context context(teacher);
  const Tensor factor = factors(upstream, type);
  return run(call, inheritance, exploration, teacher, &factor, nullptr, context, need_inheritance,
             need_exploration);
}

std::tuple<Tensor, Tensor> tuple_matching(const Tensor& student, const Tensor& teacher,
                                          const Tensor& target, std::vector<double> numbers,
                                          std::optional<Tensor> symbolic, int64_t reduction,
                                          bool need_gradient) {
  const TupleCall call{numbers_of(numbers, symbolic), reduction};
  const bool wide = student.scalar_type() == ScalarType::Double;
  const int64_t batch = target.numel();
  STD_TORCH_CHECK((wide || student.scalar_type() == ScalarType::Float) &&
                      teacher.scalar_type() == student.scalar_type(),
                  "distances must be both float32 or both float64");
  for (const Tensor* x : {&student, &teacher})
    STD_TORCH_CHECK(x->dim() == 2 && x->size(0) == batch && x->size(1) == batch &&
                        x->is_contiguous(),
                    "distances must be (B, B) and contiguous");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous(),
                  "target must be contiguous int64");
  for (const Tensor* x : {&teacher, &target})
    STD_TORCH_CHECK(x->get_device_index() == student.get_device_index(),
                    "distances and target must be on one device");
  const Context context(student);
  Tensor gradient = empty_gradient(student, need_gradient);
  if (batch == 0) return {torch::stable::new_zeros(student, {}), gradient};
  Tensor loss = torch::stable::new_empty(student, {});
  TupleProblem problem{};
  problem.student = student.const_data_ptr();
  problem.teacher = teacher.const_data_ptr();
  problem.gradient = need_gradient ? gradient.mutable_data_ptr() : nullptr;
  problem.target = static_cast<const int64_t*>(target.const_data_ptr());
  problem.batch = batch;
  call.fill(problem);
  const TupleRun work{problem, wide, call.scale(), reduction, loss.mutable_data_ptr()};
  const TuplePlan plan = plan_tuples(batch, wide, need_gradient, context.device);
  Tensor memory = workspace(student, workspace_bytes(work, plan));
  run_tuples("tuple_matching", work, plan, static_cast<char*>(memory.mutable_data_ptr()),
             context.stream);
  return {loss, gradient};
}

}  // namespace
}  // namespace kdkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("iekd", TORCH_BOX(&kdkernels::cuda::iekd));
  m.impl("iekd_backward", TORCH_BOX(&kdkernels::cuda::iekd_backward));
  m.impl("tuple_matching", TORCH_BOX(&kdkernels::cuda::tuple_matching));
}
