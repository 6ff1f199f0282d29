// The pybind11 module kdkernels._C: what was built and what this machine uses of it.
//
// Importing it registers the operators (ops_*.cpp are part of the same library).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/evaluate.h"
#include "cpu/parallel.h"
#include "cuda/correlation.h"

// The eager entry points `row` and `correlation` take addresses of contiguous CPU tensors, because
// half of a small loss's time is the operator machinery; kdkernels/native.py checks and allocates.
namespace {

namespace py = pybind11;
using namespace kdkernels;
using namespace kdkernels::cpu;

struct Pair {  // addresses and dtype codes of student and teacher
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

  template <class Problem>
  double run(Problem& problem, const Kernels& kernels, int64_t reduction) const {
    if (problem.rows * problem.classes < 16384)  // not worth giving the interpreter away
      return kdkernels::cpu::run(problem, kernels, wide(), reduction, parallel_for);
    const py::gil_scoped_release release;
    return kdkernels::cpu::run(problem, kernels, wide(), reduction, parallel_for);
  }

  void put(std::uintptr_t loss, double value) const {
    if (wide()) *reinterpret_cast<double*>(loss) = value;
    else *reinterpret_cast<float*>(loss) = float(value);
  }
};

void row(std::uintptr_t student, std::uintptr_t teacher, std::uintptr_t gradient,
         std::uintptr_t target, std::uintptr_t loss, int student_type, int teacher_type,
         int64_t rows, int64_t classes, const std::string& rule, const py::list& options,
         double temperature, double scale, bool standardize, int64_t ignore_index,
         int64_t reduction) {
  const Pair pair{student, teacher, gradient, student_type, teacher_type};
  const Kernels& chosen = kernels(rule);
  RowProblem problem{};
  pair.fill(problem, rows, classes);
  problem.target = reinterpret_cast<const int64_t*>(target);
  problem.loss = reinterpret_cast<void*>(loss);
  problem.ignore_index = ignore_index;
  problem.temperature = temperature;
  problem.standardize = standardize;
  for (size_t i = 0; i < options.size() && i < 4; ++i)
    problem.options.value[i] = options[i].cast<double>();
  finish(problem, chosen, scale, reduction);
  const double value = pair.run(problem, chosen, reduction);
  if (reduction != kNone) pair.put(loss, value);
}

void correlation(std::uintptr_t student, std::uintptr_t teacher, std::uintptr_t gradient,
                 std::uintptr_t loss, int student_type, int teacher_type, int64_t rows,
                 int64_t classes, const std::string& rule, double inter, double intra, double tau,
                 double eps, int64_t reduction) {
  const Pair pair{student, teacher, gradient, student_type, teacher_type};
  CorrelationProblem problem{};
  pair.fill(problem, rows, classes);
  problem.inter = inter;
  problem.intra = intra;
  problem.tau = tau;
  problem.eps = eps;
  pair.put(loss, pair.run(problem, kernels(rule), reduction));
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

gpu::RowShape shape(int64_t rows, int64_t classes, int type, bool dense, bool aligned,
                    bool adjacent, bool plain, int64_t run = 0) {
  return {rows, classes, Scalar(type), Scalar(type), dense, aligned, adjacent, plain, run};
}

std::map<std::string, int64_t> row_plan(int64_t rows, int64_t classes, int type, bool dense,
                                        bool aligned, bool adjacent, bool plain, int arch,
                                        int multiprocessors, int block_shared, int most_cluster) {
  const gpu::RowShape asked = shape(rows, classes, type, dense, aligned, adjacent, plain);
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
  const gpu::RowShape asked = shape(rows, classes, type, dense, aligned, adjacent, plain, run);
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
  m.def("rules", &kdkernels::cpu::rules, "The rules of a family.", pybind11::arg("family"));
  m.def("cuda_row_plan", &row_plan, "How csrc/cuda would walk rows on a device.");
  m.def("cuda_correlation_plan", &correlation_plan, "Likewise for a correlation.");
}
