// The arguments of kdkernels::row and its backward as a problem, for CPU and CUDA alike.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "bridge.h"

namespace kdkernels {

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

// Without a gradient; the scale not yet divided by the rows.
inline RowProblem row_problem(const RowArguments& a, const Logits& logits) {
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
    STD_TORCH_CHECK(a.target->scalar_type() == ScalarType::Long && a.target->is_contiguous() &&
                        a.target->numel() == logits.rows,
                    "target must be contiguous int64, one for each row");
    require_memory(*a.target, "target");
    problem.target = static_cast<const int64_t*>(a.target->const_data_ptr());
  }
  return problem;
}

}  // namespace kdkernels
