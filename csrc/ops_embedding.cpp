// The operators of the embedding losses on the CPU; schemas in kdkernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/bridge.h"

namespace kdkernels {
namespace {

struct Factors {
  double value;
  bool wide;
  Tensor inheritance_gradient, exploration_gradient;
};

Factors run(const FactorCall& call, const Tensor& inheritance, const Tensor& exploration,
            const Tensor& teacher, double factor, bool need_inheritance, bool need_exploration) {
  const bool wide = check(inheritance, teacher, 1).wide || check(exploration, teacher, 1).wide;
  STD_TORCH_CHECK(teacher.dim() == 2, "teacher_factor must be (B, D)");
  Factors out{0.0, wide, empty_gradient(inheritance, need_inheritance),
              empty_gradient(exploration, need_exploration)};
  FactorProblem problem{};
  problem.samples = teacher.size(0);
  problem.width = teacher.size(1);
  call.fill(problem);
  if (problem.samples == 0) return out;
  problem.inheritance = rows_of(inheritance, 1, inheritance.const_data_ptr());
  problem.exploration = rows_of(exploration, 1, exploration.const_data_ptr());
  problem.teacher = rows_of(teacher, 1, teacher.const_data_ptr());
  if (need_inheritance)
    problem.inheritance_gradient =
        rows_of(out.inheritance_gradient, 1, out.inheritance_gradient.mutable_data_ptr());
  if (need_exploration)
    problem.exploration_gradient =
        rows_of(out.exploration_gradient, 1, out.exploration_gradient.mutable_data_ptr());
  factor /= (call.cosine ? 1.0 : double(problem.width)) *
            (call.reduction == kMean ? double(problem.samples) : 1.0);
  problem.inheritance_weight *= factor;
  problem.exploration_weight *= factor;
  std::vector<double> values(problem.samples);
  problem.loss = values.data();
  const auto& kernels = cpu::kernels("iekd");
  (wide ? kernels.factors_f64 : kernels.factors_f32)(problem, parallel_for);
  for (const double value : values) out.value += value;
  return out;
}

std::tuple<Tensor, Tensor, Tensor> iekd(const Tensor& inheritance, const Tensor& exploration,
                                        const Tensor& teacher, std::vector<double> numbers,
                                        std::optional<Tensor> symbolic, bool cosine,
                                        int64_t reduction, bool need_inheritance,
                                        bool need_exploration) {
  const FactorCall call{numbers_of(numbers, symbolic), cosine, reduction};
  const Factors out =
      run(call, inheritance, exploration, teacher, 1.0, need_inheritance, need_exploration);
  return {scalar_loss(teacher, out.value, out.wide), out.inheritance_gradient,
          out.exploration_gradient};
}

std::tuple<Tensor, Tensor> iekd_backward(const Tensor& upstream, const Tensor& inheritance,
                                         const Tensor& exploration, const Tensor& teacher,
                                         std::vector<double> numbers,
                                         std::optional<Tensor> symbolic, bool cosine,
                                         int64_t reduction, bool need_inheritance,
                                         bool need_exploration) {
  const FactorCall call{numbers_of(numbers, symbolic), cosine, reduction};
  const Factors out = run(call, inheritance, exploration, teacher, number(upstream),
                          need_inheritance, need_exploration);
  return {out.inheritance_gradient, out.exploration_gradient};
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
    STD_TORCH_CHECK(x->dim() == 2 && x->size(0) == batch && x->size(1) == batch && x->is_contiguous(),
                    "distances must be (B, B) and contiguous");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous(),
                  "target must be contiguous int64");
  Tensor gradient = empty_gradient(student, need_gradient);
  double value = 0.0;
  if (batch) {
    std::vector<double> values(batch);
    std::vector<int64_t> counts(batch);
    TupleProblem problem{student.const_data_ptr(),
                         teacher.const_data_ptr(),
                         need_gradient ? gradient.mutable_data_ptr() : nullptr,
                         static_cast<const int64_t*>(target.const_data_ptr()),
                         values.data(),
                         counts.data(),
                         batch,
                         0.0,
                         0.0};
    call.fill(problem);
    const auto& kernels = cpu::kernels("tuple_matching");
    (wide ? kernels.tuples_f64 : kernels.tuples_f32)(problem, parallel_for);
    int64_t tuples = 0;
    for (int64_t i = 0; i < batch; ++i) {
      value += values[i];
      tuples += counts[i];
    }
    const double factor = call.scale() / (reduction == kMean && tuples ? double(tuples) : 1.0);
    value *= factor;
    const auto multiply = [&](auto* data) {
      for (int64_t i = 0; i < batch * batch; ++i) data[i] *= factor;
    };
    if (need_gradient && wide) multiply(static_cast<double*>(problem.gradient));
    else if (need_gradient) multiply(static_cast<float*>(problem.gradient));
  }
  return {scalar_loss(student, value, wide), gradient};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("iekd", TORCH_BOX(&kdkernels::iekd));
  m.impl("iekd_backward", TORCH_BOX(&kdkernels::iekd_backward));
  m.impl("tuple_matching", TORCH_BOX(&kdkernels::tuple_matching));
}
