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
          field<int64_t>(call, 4),     field<int64_t>(call, 5), field<int64_t>(call, 6)};
}

inline CorrelationCall correlation_call(const pybind11::tuple& call) {
  return {field<std::string>(call, 0), field<Numbers>(call, 1), field<int64_t>(call, 3),
          field<int64_t>(call, 4)};
}

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
