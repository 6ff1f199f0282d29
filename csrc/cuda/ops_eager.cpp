// The eager entry points of kdkernels._cuda: addresses of contiguous tensors instead of the operator
// machinery, which would be half of a small loss's time. kdkernels/native.py checks and allocates.
#include "ops_eager.h"

#include <string>

#include "../calls_eager.h"
#include "common.h"
#include "correlation.h"
#include "ops_bridge.h"
#include "rows.h"

namespace kdkernels::cuda {
namespace {

namespace py = pybind11;

// Device, stream and the memory that the launches share; the caching allocator knows the stream, so the
// memory may be given back before the kernels have run.
struct Launches {
  torch::stable::accelerator::DeviceGuard guard;
  const Device& device;
  void* stream;
  Tensor memory;

  Launches(int index, std::uintptr_t stream)
      : guard(index),
        device(device_of(index)),
        stream(reinterpret_cast<void*>(stream)),
        index_(index) {
    use_device(index);
  }
  char* workspace(int64_t bytes) {
    memory = torch::stable::empty(
        {bytes}, ScalarType::Byte, std::nullopt,
        torch::stable::Device(torch::headeronly::DeviceType::CUDA, index_));
    return static_cast<char*>(memory.mutable_data_ptr());
  }

 private:
  int index_;
};

void row(std::uintptr_t student, std::uintptr_t teacher, std::uintptr_t gradient,
         const py::tuple& of_rows, std::uintptr_t loss, std::uintptr_t, int student_type,
         int teacher_type, int64_t rows, int64_t classes, const py::tuple& given, int device,
         std::uintptr_t stream) {
  const RowCall call = row_call(given);
  RowRun run{};
  RowProblem& problem = run.problem;
  Pair{student, teacher, gradient, student_type, teacher_type}.fill(problem, rows, classes);
  call.fill(problem);
  RowAddresses(of_rows).fill(problem);
  expect_divergence_alone(problem, call.parts);
  if (reads_target(call.rule) && !problem.target)
    throw std::invalid_argument("target must be a Tensor of class indices, got None");
  run.reduction = call.reduction;
  (call.reduction == kNone ? problem.loss : run.total) = reinterpret_cast<void*>(loss);
  const py::gil_scoped_release release;
  Launches launches(device, stream);
  const RowPlan plan = plan_rows(shape_of(problem), launches.device);
  run_rows(call.rule, run, plan, launches.workspace(workspace_bytes(run, plan)),
           run.total ? stream_ticket(device, launches.stream) : nullptr, launches.stream);
}

void correlation(std::uintptr_t student, std::uintptr_t teacher, std::uintptr_t gradient,
                 std::uintptr_t counted, std::uintptr_t loss, int student_type, int teacher_type,
                 int64_t rows, int64_t classes, const py::tuple& given, int device,
                 std::uintptr_t stream) {
  const CorrelationCall call = correlation_call(given);
  CorrelationRun run{};
  CorrelationProblem& problem = run.problem;
  Pair{student, teacher, gradient, student_type, teacher_type}.fill(problem, rows, classes);
  call.fill(problem);
  problem.counted = reinterpret_cast<const uint8_t*>(counted);
  run.reduction = call.reduction;
  run.total = reinterpret_cast<void*>(loss);
  const py::gil_scoped_release release;
  Launches launches(device, stream);
  const CorrelationPlan plan = plan_correlation(shape_of(problem), launches.device);
  run_correlation(call.rule, run, plan, launches.workspace(workspace_bytes(run, plan)),
                  launches.stream);
}

// gradient *= upstream for a dense gradient.
void scale_by_address(std::uintptr_t gradient, int type, int64_t size, std::uintptr_t upstream,
                      int upstream_type, int device, std::uintptr_t stream) {
  const py::gil_scoped_release release;
  const Launches launches(device, stream);
  scale(reinterpret_cast<void*>(gradient), Scalar(type), size,
        reinterpret_cast<const void*>(upstream), Scalar(upstream_type), launches.device,
        launches.stream);
}

}  // namespace

void bind_eager(py::module_& m) {
  m.def("row", &row, "kdkernels::row on contiguous CUDA tensors, by address.");
  m.def("correlation", &correlation, "kdkernels::correlation likewise.");
  m.def("scale", &scale_by_address, "Scale a dense gradient in place.");
}

}  // namespace kdkernels::cuda
