// A call of a row loss as tests/cuda_emulator.py packs it, for the emulated kernels and for the CPU's.
#pragma once

#include <cstring>

#include "../../csrc/problem.h"

namespace kdkernels {

struct View {
  void* data;
  int64_t type, class_stride, dims;
  int64_t size[kMaxRowDims], stride[kMaxRowDims];
};

inline Rows rows_of(const View& view) {
  Rows rows{view.data, Scalar(view.type), view.class_stride, int32_t(view.dims), {}, {}};
  for (int64_t dim = 0; dim < view.dims; ++dim) {
    rows.size[dim] = view.size[dim];
    rows.stride[dim] = view.stride[dim];
  }
  return rows;
}

struct RowCall {
  View student, teacher, gradient;
  const int64_t* target;
  const void* token_weight;
  const void* hard_token_weight;
  const void* row_temperature;
  const void* upstream;
  int64_t upstream_stride;
  void *loss, *total, *parts;
  int64_t rows, classes, ignore_index, reduction, standardize;
  double temperature, scale, hard;
  double options[4];
  int64_t arch, multiprocessors, block_shared, most_cluster;
  int64_t seed;
  int64_t plan[9];  // in: traversal or -1; out: the plan
};

inline RowProblem problem_of(const RowCall& call) {
  RowProblem problem{};
  problem.student = rows_of(call.student);
  problem.teacher = rows_of(call.teacher);
  problem.gradient = rows_of(call.gradient);
  problem.target = call.target;
  problem.token_weight = call.token_weight;
  problem.hard_token_weight = call.hard_token_weight;
  problem.row_temperature = call.row_temperature;
  problem.upstream = call.upstream;
  problem.loss = call.loss;
  problem.parts = call.parts;
  problem.rows = call.rows;
  problem.classes = call.classes;
  problem.ignore_index = call.ignore_index;
  problem.temperature = call.temperature;
  problem.scale = call.scale;
  problem.hard = call.hard;
  problem.standardize = call.standardize != 0;
  std::memcpy(problem.options.value, call.options, sizeof call.options);
  return problem;
}

}  // namespace kdkernels
