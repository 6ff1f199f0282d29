// kdkernels::topk and its gradient on the CPU; schemas in kdkernels/_ops_topk.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/bridge.h"

namespace kdkernels {
namespace {

// A contiguous tensor of a dtype, of so many elements.
const void* data_of(const char* name, const Tensor& x, ScalarType type, int64_t elements) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() == elements, name,
                  " must be contiguous, of the operator's shape and dtype");
  require_memory(x, name);
  return x.const_data_ptr();
}

// Rows whose classes lie together, maybe with a gap between the rows.
Rows rows_apart(const char* name, const Tensor& x, int64_t rows, int64_t classes) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == classes &&
                      (x.stride(1) == 1 || classes == 1) && (x.stride(0) >= classes || rows <= 1),
                  name, " must be (rows, classes), the classes of a row contiguous");
  require_memory(x, name);
  Rows made = contiguous_rows(const_cast<void*>(x.const_data_ptr()), scalar_of(x), rows, classes);
  made.stride[0] = x.stride(0);
  return made;
}

struct Setting {
  bool wide;
  ScalarType type;
  TopKProblem problem;
};

Setting setting(const TopKCall& call, const Tensor& student, const Tensor& ids,
                const std::optional<Tensor>& target, const std::optional<Tensor>& row_temperature) {
  STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0, "student must be (rows, classes)");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == student.size(0), "ids must be (rows, K)");
  Setting made{};
  made.wide = call.wide || scalar_of(student) == Scalar::f64;
  made.type = made.wide ? ScalarType::Double : ScalarType::Float;
  TopKProblem& problem = made.problem;
  problem.rows = student.size(0);
  problem.classes = student.size(1);
  problem.k = ids.size(1);
  problem.student = rows_apart("student_logits", student, problem.rows, problem.classes);
  problem.gradient = problem.student;
  problem.gradient.data = nullptr;
  call.fill(problem);
  problem.ids = static_cast<const int64_t*>(
      data_of("ids", ids, ScalarType::Long, problem.rows * problem.k));
  problem.target = static_cast<const int64_t*>(
      row_numbers("target", target, ScalarType::Long, problem.rows));
  problem.row_temperature =
      row_numbers("row_temperature", row_temperature, made.type, problem.rows);
  return made;
}

std::tuple<Tensor, Tensor> topk(const Tensor& student, const Tensor& ids,
                                std::optional<Tensor> target, std::optional<Tensor> row_temperature,
                                std::vector<double> numbers, std::optional<Tensor> symbolic,
                                bool wide, bool rest, bool hard, bool entropy,
                                int64_t ignore_index) {
  const TopKCall call{numbers_of(numbers, symbolic), wide, rest, hard, entropy, ignore_index};
  Setting made = setting(call, student, ids, target, row_temperature);
  TopKProblem& problem = made.problem;
  Tensor small = torch::stable::new_empty(student, {problem.rows, problem.k + 1}, made.type);
  Tensor of_rows = torch::stable::new_empty(student, {kTopKNumbers, problem.rows}, made.type);
  problem.small = small.mutable_data_ptr();
  problem.numbers = of_rows.mutable_data_ptr();
  cpu::run(problem, cpu::kernels("topk"), made.wide, parallel_for);
  return {small, of_rows};
}

void topk_gradient_into(Tensor into, const Tensor& small, const Tensor& of_rows,
                        const Tensor& small_upstream, std::optional<Tensor> hard_upstream,
                        const Tensor& student, const Tensor& ids, std::optional<Tensor> target,
                        std::optional<Tensor> row_temperature, std::vector<double> numbers,
                        std::optional<Tensor> symbolic, bool wide, bool rest, bool hard,
                        bool entropy, int64_t ignore_index) {
  hard = hard && hard_upstream;
  const TopKCall call{numbers_of(numbers, symbolic), wide, rest, hard, entropy, ignore_index};
  Setting made = setting(call, student, ids, target, row_temperature);
  TopKProblem& problem = made.problem;
  const int64_t columns = problem.rows * (problem.k + 1);
  STD_TORCH_CHECK(into.scalar_type() == student.scalar_type(), "into must be of the student's dtype");
  problem.gradient = rows_apart("into", into, problem.rows, problem.classes);
  problem.small = const_cast<void*>(data_of("small", small, made.type, columns));
  problem.numbers =
      const_cast<void*>(data_of("numbers", of_rows, made.type, kTopKNumbers * problem.rows));
  problem.small_upstream = data_of("small_upstream", small_upstream, made.type, columns);
  if (hard) problem.hard_upstream = data_of("hard_upstream", *hard_upstream, made.type, problem.rows);
  cpu::run(problem, cpu::kernels("topk"), made.wide, parallel_for);
}

Tensor topk_gradient(const Tensor& small, const Tensor& of_rows, const Tensor& small_upstream,
                     std::optional<Tensor> hard_upstream, const Tensor& student, const Tensor& ids,
                     std::optional<Tensor> target, std::optional<Tensor> row_temperature,
                     std::vector<double> numbers, std::optional<Tensor> symbolic, bool wide,
                     bool rest, bool hard, bool entropy, int64_t ignore_index) {
  Tensor gradient = empty_gradient(student);
  topk_gradient_into(gradient, small, of_rows, small_upstream, hard_upstream, student, ids, target,
                     row_temperature, numbers, symbolic, wide, rest, hard, entropy, ignore_index);
  return gradient;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("topk", TORCH_BOX(&kdkernels::topk));
  m.impl("topk_gradient", TORCH_BOX(&kdkernels::topk_gradient));
  m.impl("topk_gradient_into", TORCH_BOX(&kdkernels::topk_gradient_into));
}
