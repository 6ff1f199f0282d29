// Between PyTorch's tensors and the kernels' plain structs.
//
// Only PyTorch's stable ABI is used, so one build serves every torch >= 2.10. The arguments are
// checked in Python; what is checked here again guards memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "calls.h"

namespace kdkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Scalar scalar_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Scalar::f64;
    case ScalarType::Float: return Scalar::f32;
    case ScalarType::Half: return Scalar::f16;
    case ScalarType::BFloat16: return Scalar::bf16;
    default: STD_TORCH_CHECK(false, "logits must be float64, float32, float16 or bfloat16");
  }
}

// The rows of a tensor in place; the dimensions other than the classes merged where they can be.
inline Rows rows_of(const Tensor& x, int64_t class_dim, const void* data) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  Rows rows{const_cast<void*>(data), scalar_of(x), strides[class_dim], 0, {}, {}};
  for (int64_t dim = 0; dim < int64_t(sizes.size()); ++dim) {
    if (dim == class_dim || sizes[dim] == 1) continue;
    const int last = rows.dims - 1;
    if (last >= 0 && rows.stride[last] == strides[dim] * sizes[dim]) {
      rows.size[last] *= sizes[dim];
      rows.stride[last] = strides[dim];
    } else {
      STD_TORCH_CHECK(rows.dims < kMaxRowDims, "logits must have fewer dimensions");
      rows.size[rows.dims] = sizes[dim];
      rows.stride[rows.dims++] = strides[dim];
    }
  }
  if (rows.dims == 0) rows.size[rows.dims++] = 1;
  return rows;
}

inline std::vector<int64_t> row_shape(const Tensor& x, int64_t class_dim) {
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim < x.dim(); ++dim)
    if (dim != class_dim) shape.push_back(x.size(dim));
  return shape;
}

// A freed storage (sharded training resizes them to 0) leaves an address that must not be read.
inline void require_memory(const Tensor& x, const char* name) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  if (bytes == 0 && x.numel() > 0)
    throw std::invalid_argument(std::string(name) +
                                " must be a Tensor with memory, got one whose storage was freed");
}

struct Logits {
  bool wide;  // float64 arithmetic
  int64_t rows, classes;
  ScalarType loss_type() const { return wide ? ScalarType::Double : ScalarType::Float; }
};

inline Logits check(const Tensor& student, const Tensor& teacher, int64_t class_dim) {
  STD_TORCH_CHECK(class_dim >= 0 && class_dim < student.dim() && teacher.dim() == student.dim(),
                  "teacher_logits must be of the student's shape");
  for (int64_t dim = 0; dim < student.dim(); ++dim)
    STD_TORCH_CHECK(student.size(dim) == teacher.size(dim),
                    "teacher_logits must be of the student's shape");
  require_memory(student, "student_logits");
  require_memory(teacher, "teacher_logits");
  const int64_t classes = student.size(class_dim);
  STD_TORCH_CHECK(classes > 0, "student_logits must be of at least one class");
  const bool wide =
      scalar_of(student) == Scalar::f64 || scalar_of(teacher) == Scalar::f64;
  return {wide, student.numel() / classes, classes};
}

// The numbers that count: those of the tensor, where a compiler has put them into one.
inline Numbers numbers_of(const std::vector<double>& numbers, const std::optional<Tensor>& symbolic) {
  if (!symbolic) return numbers;
  STD_TORCH_CHECK(symbolic->scalar_type() == ScalarType::Double && symbolic->is_contiguous() &&
                      !symbolic->is_cuda() && symbolic->dim() == 1,
                  "numbers must be one float64 tensor on the CPU");
  const double* data = static_cast<const double*>(symbolic->const_data_ptr());
  return Numbers(data, data + symbolic->numel());
}

// What a row has one number of; the names are those of the family's constants in kdkernels/_calls.py.
struct RowTensors {
  std::optional<Tensor> target, token_weight, hard_token_weight, row_temperature;

  template <class F>
  void each(F&& f) const {
    f("target", target);
    f("token_weight", token_weight);
    f("hard_token_weight", hard_token_weight);
    f("row_temperature", row_temperature);
  }
};

inline const void* row_numbers(const char* name, const std::optional<Tensor>& x, ScalarType type,
                               int64_t rows) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == type && x->is_contiguous() && x->numel() == rows, name,
                  type == ScalarType::Long   ? " must be contiguous int64, one for each row"
                  : type == ScalarType::Bool ? " must be contiguous bools, one for each row"
                                             : " must be contiguous, one for each row, of the loss's dtype");
  require_memory(*x, name);
  return x->const_data_ptr();
}

// Without a gradient.
inline RowProblem row_problem(const RowCall& call, const Tensor& student, const Tensor& teacher,
                              const RowTensors& of_rows, const Logits& logits) {
  RowProblem problem{};
  problem.student = rows_of(student, call.class_dim, student.const_data_ptr());
  problem.teacher = rows_of(teacher, call.class_dim, teacher.const_data_ptr());
  problem.gradient = rows_of(student, call.class_dim, nullptr);
  problem.rows = logits.rows;
  problem.classes = logits.classes;
  call.fill(problem);
  const auto numbers = [&](const char* name, const std::optional<Tensor>& x) {
    return row_numbers(name, x, logits.loss_type(), logits.rows);
  };
  problem.target = static_cast<const int64_t*>(
      row_numbers("target", of_rows.target, ScalarType::Long, logits.rows));
  problem.token_weight = numbers("token_weight", of_rows.token_weight);
  problem.hard_token_weight = numbers("hard_token_weight", of_rows.hard_token_weight);
  problem.row_temperature = numbers("row_temperature", of_rows.row_temperature);
  return problem;
}

inline CorrelationProblem correlation_problem(const CorrelationCall& call, const Tensor& student,
                                              const Tensor& teacher,
                                              const std::optional<Tensor>& counted,
                                              const Logits& logits) {
  CorrelationProblem problem{};
  problem.student = rows_of(student, call.class_dim, student.const_data_ptr());
  problem.teacher = rows_of(teacher, call.class_dim, teacher.const_data_ptr());
  problem.gradient = rows_of(student, call.class_dim, nullptr);
  problem.rows = logits.rows;
  problem.classes = logits.classes;
  call.fill(problem);
  problem.counted = static_cast<const uint8_t*>(
      row_numbers("counted", counted, ScalarType::Bool, logits.rows));
  return problem;
}

// What the stable ABI says where memory is short names its own source alone.
template <class Allocate>
Tensor allocated(const char* what, int64_t elements, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    throw std::runtime_error(std::string("memory must be enough for ") + what + " of " +
                             std::to_string(elements) + " elements, got too little");
  }
}

// What RowProblem::parts points to, or nothing.
inline Tensor empty_parts(const RowCall& call, const Tensor& student, const Logits& logits) {
  if (!call.parts) return torch::stable::new_empty(student, {0}, logits.loss_type());
  std::vector<int64_t> shape = row_shape(student, call.class_dim);
  shape.insert(shape.begin(), 3);
  return torch::stable::new_empty(student, shape, logits.loss_type());
}

inline Tensor empty_gradient(const Tensor& student, bool wanted = true) {
  if (!wanted) return torch::stable::new_empty(student, {0});
  return allocated("a gradient", student.numel(), [&] { return torch::stable::empty_like(student); });
}

}  // namespace kdkernels
