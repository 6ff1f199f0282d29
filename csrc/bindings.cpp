// The pybind11 module kdkernels._C: what was built and what this machine uses of it.
//
// Importing it registers the operators (ops_*.cpp are part of the same library).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "calls_eager.h"
#include "cpu/evaluate.h"
#include "cpu/parallel.h"
#include "cuda/correlation.h"

// The eager entry points `row` and `correlation` take addresses of contiguous CPU tensors, because
// half of a small loss's time is the operator machinery; kdkernels/native.py checks and allocates.
namespace {

namespace py = pybind11;
using namespace kdkernels;
using namespace kdkernels::cpu;

// Runs a problem and writes the loss, unless each row has its own.
template <class Problem>
void run(const Pair& pair, Problem& problem, const Kernels& kernels, int64_t reduction,
         std::uintptr_t loss) {
  const auto evaluate = [&] {
    return kdkernels::cpu::run(problem, kernels, pair.wide(), reduction, parallel_for);
  };
  double value;
  if (problem.rows * problem.classes < 16384) {  // not worth giving the interpreter away
    value = evaluate();
  } else {
    const py::gil_scoped_release release;
    value = evaluate();
  }
  if (reduction == kNone) return;
  if (pair.wide()) *reinterpret_cast<double*>(loss) = value;
  else *reinterpret_cast<float*>(loss) = float(value);
}

void row(std::uintptr_t student, std::uintptr_t teacher, std::uintptr_t gradient,
         const py::tuple& of_rows, std::uintptr_t loss, std::uintptr_t parts, int student_type,
         int teacher_type, int64_t rows, int64_t classes, const py::tuple& given) {
  const RowCall call = row_call(given);
  const Pair pair{student, teacher, gradient, student_type, teacher_type};
  const Kernels& chosen = kernels(call.rule);
  RowProblem problem{};
  pair.fill(problem, rows, classes);
  call.fill(problem);
  RowAddresses(of_rows).fill(problem);
  problem.loss = reinterpret_cast<void*>(loss);
  problem.parts = reinterpret_cast<void*>(parts);
  finish(problem, chosen, call.reduction);
  run(pair, problem, chosen, call.reduction, loss);
}

// The loss of rows against K ids each, whose teacher is the small logits `buckets`.
void topk_loss(std::uintptr_t student, std::uintptr_t gradient, std::uintptr_t ids,
               std::uintptr_t buckets, const py::tuple& of_rows, std::uintptr_t loss,
               std::uintptr_t parts, int student_type, int64_t rows, int64_t classes, int64_t k,
               const py::tuple& given_rows, const py::tuple& given) {
  const TopKCall of_call = topk_call(given_rows);
  const RowCall call = row_call(given);
  TopKLossProblem problem{};
  TopKProblem& topk = problem.rows;
  topk.rows = rows;
  topk.classes = classes;
  topk.k = k;
  topk.student = contiguous_rows(reinterpret_cast<void*>(student), Scalar(student_type), rows, classes);
  topk.gradient = topk.student;
  topk.gradient.data = reinterpret_cast<void*>(gradient);
  topk.ids = reinterpret_cast<const int64_t*>(ids);
  of_call.fill(topk);
  call.fill(problem.dense);
  problem.hard = problem.dense.hard;
  problem.dense.hard = 0.0;
  RowProblem weights{};
  RowAddresses(of_rows).fill(weights);
  topk.target = weights.target;
  topk.row_temperature = weights.row_temperature;
  problem.dense.token_weight = weights.token_weight;
  problem.hard_token_weight = weights.hard_token_weight;
  problem.parts = reinterpret_cast<void*>(parts);
  const bool wide = of_call.wide || student_type == 0;
  problem.dense.teacher = contiguous_rows(reinterpret_cast<void*>(buckets),
                                          wide ? Scalar::f64 : Scalar::f32, rows, k + 1);
  const py::gil_scoped_release release;
  const double value = kdkernels::cpu::run(problem, kernels("topk"), kernels(call.rule), wide,
                                           call.reduction, parallel_for);
  if (wide) *reinterpret_cast<double*>(loss) = value;
  else *reinterpret_cast<float*>(loss) = float(value);
}

void correlation(std::uintptr_t student, std::uintptr_t teacher, std::uintptr_t gradient,
                 std::uintptr_t counted, std::uintptr_t loss, int student_type, int teacher_type,
                 int64_t rows, int64_t classes, const py::tuple& given) {
  const CorrelationCall call = correlation_call(given);
  const Pair pair{student, teacher, gradient, student_type, teacher_type};
  CorrelationProblem problem{};
  pair.fill(problem, rows, classes);
  call.fill(problem);
  problem.counted = reinterpret_cast<const uint8_t*>(counted);
  run(pair, problem, kernels(call.rule), call.reduction, loss);
}

std::map<std::string, std::string> build_info() {
  std::string compiled;
  for (const std::string& isa : capabilities())
    compiled += (compiled.empty() ? "" : " ") + isa;
  return {{"compiler", __VERSION__},
          {"torch target", KDK_TORCH_TARGET},
          {"instruction sets", compiled}};
}

// How CUDA kernels would be launched, for the tests of machines without a GPU.
namespace gpu = kdkernels::cuda;

gpu::RowShape shape(int64_t rows, int64_t classes, int type, bool dense, bool alike, bool aligned,
                    bool adjacent, bool plain, int64_t run = 0) {
  return {rows, classes, Scalar(type), Scalar(type), dense, alike, aligned, adjacent, plain, run};
}

std::map<std::string, int64_t> row_plan(int64_t rows, int64_t classes, int type, bool dense,
                                        bool alike, bool aligned, bool adjacent, bool plain,
                                        int arch, int multiprocessors, int block_shared,
                                        int most_cluster) {
  const gpu::RowShape asked = shape(rows, classes, type, dense, alike, aligned, adjacent, plain);
  const gpu::Device device{arch, multiprocessors, block_shared, most_cluster};
  const gpu::RowPlan plan = gpu::plan_rows(asked, device);
  return {{"traversal", int64_t(plan.traversal)}, {"lanes", plan.lanes},
          {"elements", plan.elements},            {"threads", plan.threads},
          {"blocks", plan.blocks},                {"cluster", plan.cluster},
          {"slice", plan.slice},                  {"shared", plan.shared},
          {"vector", plan.vector},                {"fits", gpu::fits(plan, asked, device)}};
}

std::map<std::string, int64_t> correlation_plan(int64_t rows, int64_t classes, int type, bool dense,
                                                bool aligned, bool adjacent, bool plain, int64_t run,
                                                int arch, int multiprocessors, int block_shared,
                                                int most_cluster) {
  const gpu::RowShape asked =
      shape(rows, classes, type, dense, aligned, aligned, adjacent, plain, run);
  const gpu::Device device{arch, multiprocessors, block_shared, most_cluster};
  const gpu::CorrelationPlan plan = gpu::plan_correlation(asked, device);
  return {{"traversal", int64_t(plan.traversal)}, {"lanes", plan.lanes},
          {"elements", plan.elements},            {"tile", plan.tile},
          {"groups", plan.groups},                {"threads", plan.threads},
          {"blocks", plan.blocks},                {"parts", plan.parts},
          {"shared", plan.shared},                {"fits", gpu::fits(plan, asked, device)},
          {"layout", int64_t(plan.layout)},       {"row_pitch", plan.row_pitch},
          {"class_pitch", plan.class_pitch},      {"spread", plan.spread},
          {"cluster", plan.cluster},              {"slice", plan.slice}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of kdkernels.";
  m.def("build_info", &build_info, "How the extension was built.");
  m.def("cpu_capability", &kdkernels::cpu::capability, "The instruction set in use.");
  m.def("cpu_capabilities", &kdkernels::cpu::capabilities, "The instruction sets compiled in.");
  m.def("row", &row, "kdkernels::row on contiguous CPU tensors, by address.");
  m.def("correlation", &correlation, "kdkernels::correlation likewise.");
  m.def("topk_loss", &topk_loss, "A loss of rows against K ids each, likewise.");
  m.def("rules", &kdkernels::cpu::rules, "The rules of a family.", pybind11::arg("family"));
  m.def("cuda_row_plan", &row_plan, "How csrc/cuda would walk rows on a device.");
  m.def("cuda_correlation_plan", &correlation_plan, "Likewise for a correlation.");
}
