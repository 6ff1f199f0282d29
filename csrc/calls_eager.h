// The calls as the eager entry points of both extensions receive them: the tuples of
// kdkernels/_calls.py, of whose fields `symbolic` is always None there.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "calls.h"

namespace kdkernels {

template <class T>
T field(const pybind11::tuple& call, size_t index) {
  return pybind11::cast<T>(call[index]);
}

inline RowCall row_call(const pybind11::tuple& call) {
  return {field<std::string>(call, 0), field<Numbers>(call, 1), field<bool>(call, 3),
          field<bool>(call, 4),        field<int64_t>(call, 5), field<int64_t>(call, 6),
          field<int64_t>(call, 7)};
}

inline TopKCall topk_call(const pybind11::tuple& call) {
  return {field<Numbers>(call, 0), field<bool>(call, 2), field<bool>(call, 3),
          field<bool>(call, 4),    field<bool>(call, 5), field<int64_t>(call, 6)};
}

inline CorrelationCall correlation_call(const pybind11::tuple& call) {
  return {field<std::string>(call, 0), field<Numbers>(call, 1), field<int64_t>(call, 3),
          field<int64_t>(call, 4)};
}

// Addresses of what a row has one number of, in the order of the family's constants; 0 for none.
struct RowAddresses {
  std::uintptr_t target, token_weight, hard_token_weight, row_temperature;

  explicit RowAddresses(const pybind11::tuple& given)
      : target(field<std::uintptr_t>(given, 0)),
        token_weight(field<std::uintptr_t>(given, 1)),
        hard_token_weight(field<std::uintptr_t>(given, 2)),
        row_temperature(field<std::uintptr_t>(given, 3)) {}
  void fill(RowProblem& problem) const {
    problem.target = reinterpret_cast<const int64_t*>(target);
    problem.token_weight = reinterpret_cast<const void*>(token_weight);
    problem.hard_token_weight = reinterpret_cast<const void*>(hard_token_weight);
    problem.row_temperature = reinterpret_cast<const void*>(row_temperature);
  }
};

// Addresses and dtype codes of student, teacher and gradient, all contiguous.
struct Pair {
  std::uintptr_t student, teacher, gradient;
  int student_type, teacher_type;

  bool wide() const { return student_type == 0 || teacher_type == 0; }

  template <class Problem>
  void fill(Problem& problem, int64_t rows, int64_t classes) const {
    const auto view = [&](std::uintptr_t data, int type) {
      return contiguous_rows(reinterpret_cast<void*>(data), Scalar(type), rows, classes);
    };
    problem.student = view(student, student_type);
    problem.teacher = view(teacher, teacher_type);
    problem.gradient = view(gradient, student_type);
    problem.rows = rows;
    problem.classes = classes;
  }
};

}  // namespace kdkernels
