// What all plans need: sizes of tensors, their alignment, the arithmetic of launches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "task.h"

namespace kdkernels::cuda {

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }

// Blocks enough to fill the device several times; more than that are walked in turn, and few enough
// values are left for the block that adds them up.
inline int32_t blocks_for(int64_t units, const Device& device, int64_t each = 32) {
  return int32_t(std::min<int64_t>(units, each * device.multiprocessors));
}

// Shared memory of a block whose values are added up: the exchange, and a flag (totals.cuh).
constexpr int kBlockShared = kBlockExchange + 16;

inline int64_t element_bytes(Scalar type) {
  return type == Scalar::f64 ? 8 : type == Scalar::f32 ? 4 : 2;
}

inline bool is_wide(const Rows& student, const Rows& teacher) {
  return student.type == Scalar::f64 || teacher.type == Scalar::f64;
}

// Whether every row begins at, and holds, a multiple of 16 bytes.
inline bool whole_packs(const Rows& x, int64_t classes) {
  const int64_t bytes = element_bytes(x.type);
  bool whole = reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && classes * bytes % 16 == 0;
  for (int dim = 0; dim < x.dims; ++dim)
    whole = whole && (x.size[dim] == 1 || x.stride[dim] * bytes % 16 == 0);
  return whole;
}

// By how many bytes a row begins after the one before it, modulo 16; -1 where that differs from row to row.
inline int64_t row_pitch(const Rows& x) {
  int64_t pitch = 0, rows = 1;  // of the dimensions within
  for (int dim = x.dims - 1; dim >= 0; --dim) {
    if (x.size[dim] == 1) continue;
    const int64_t step = x.stride[dim] * element_bytes(x.type) % 16;
    if (rows == 1) pitch = step;
    if (step != pitch * rows % 16) return -1;
    rows *= x.size[dim];
  }
  return pitch;
}

// Whether each row of one begins at the same address modulo 16 bytes as that of the other; of rows at one
// distance only, which those of contiguous tensors are.
inline bool begin_alike(const Rows& a, const Rows& b) {
  const auto place = [](const Rows& x) { return reinterpret_cast<std::uintptr_t>(x.data) % 16; };
  return place(a) == place(b) && row_pitch(a) >= 0 && row_pitch(a) == row_pitch(b);
}

// Whether rows come in runs, at one distance, of which each class begins at, and holds, a multiple of 16
// bytes.
inline bool whole_runs(const Rows& x, int64_t run) {
  const int64_t bytes = element_bytes(x.type);
  const int last = x.dims - 1;
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && run * bytes % 16 == 0 &&
         x.stride[last] == 1 && x.size[last] == run && x.class_stride * bytes % 16 == 0 &&
         (last == 0 || (last == 1 && x.stride[0] * bytes % 16 == 0));
}

// `narrow`: nothing asks for more than float32 arithmetic and rows read in one way.
inline RowShape shape_of(const Rows& student, const Rows& teacher, const Rows& gradient,
                         int64_t rows, int64_t classes, bool narrow) {
  const auto all = [&](const auto& holds) {
    return holds(student) && holds(teacher) && (!gradient.data || holds(gradient));
  };
  const auto close = [&](const Rows& x) { return classes == 1 || x.class_stride == 1; };
  RowShape shape{rows, classes, student.type, teacher.type, false, false, false, false, false, 0};
  const bool alike = student.type == teacher.type;
  shape.dense = alike && all(close);
  shape.alike = shape.dense && all([&](const Rows& x) { return begin_alike(x, student); });
  shape.aligned = shape.dense && all([&](const Rows& x) { return whole_packs(x, classes); });
  shape.adjacent = !shape.dense && student.stride[student.dims - 1] == 1 &&
                   teacher.stride[teacher.dims - 1] == 1;
  shape.plain = narrow && !is_wide(student, teacher);
  const int64_t run = student.size[student.dims - 1];
  if (shape.aligned) {
    if (all([](const Rows& x) { return x.dims == 1; })) shape.run = rows;
  } else if (shape.dense) {
    const auto contiguous = [&](const Rows& x) {
      return x.dims == 1 && (rows == 1 || x.stride[0] == classes) &&
             reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
    };
    if (all(contiguous)) shape.run = rows;
  } else if (alike && all([&](const Rows& x) { return whole_runs(x, run); })) {
    shape.run = run;
  }
  return shape;
}

}  // namespace kdkernels::cuda
