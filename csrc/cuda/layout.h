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

// `narrow`: nothing asks for more than float32 arithmetic and rows read in one way.
inline RowShape shape_of(const Rows& student, const Rows& teacher, const Rows& gradient,
                         int64_t rows, int64_t classes, bool narrow) {
  const auto close = [&](const Rows& x) { return classes == 1 || x.class_stride == 1; };
  const auto beside = [](const Rows& x) { return x.stride[x.dims - 1] == 1; };
  RowShape shape{rows, classes, student.type, teacher.type, false, false, false, false};
  shape.dense = student.type == teacher.type && close(student) && close(teacher) &&
                (!gradient.data || close(gradient));
  shape.aligned = shape.dense && whole_packs(student, classes) && whole_packs(teacher, classes) &&
                  (!gradient.data || whole_packs(gradient, classes));
  shape.adjacent = !shape.dense && beside(student) && beside(teacher);
  shape.plain = narrow && !is_wide(student, teacher);
  return shape;
}

}  // namespace kdkernels::cuda
