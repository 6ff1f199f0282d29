// The CUDA kernels of csrc/cuda on the CPU, for tests/cuda_emulator.py: plain C functions on CPU
// memory. Each returns null or the text of the error.
#include <cstring>

#include "../../csrc/cuda/common.h"
#include "../../csrc/cuda/correlation.h"
#include "../../csrc/cuda/rows.h"
#include "calls.h"
#include "harness.h"

using namespace kdkernels;
using namespace kdkernels::cuda;

namespace {

RowPlan forced(const RowCall& call, const RowShape& shape, const Device& device) {
  RowPlan plan = plan_rows(shape, device);
  const Traversal wanted = Traversal(call.plan[0]);
  if (call.plan[0] < 0 || wanted == plan.traversal) return plan;
  plan = plan_as(wanted, shape, device);
  return plan;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t emulated_launches() {
  return emulator_launches;
}

extern "C" __attribute__((visibility("default"))) void emulate_capture(int64_t captures) {
  emulator_captures = captures != 0;
}

extern "C" __attribute__((visibility("default"))) const char* emulate_row(const char* rule,
                                                                           RowCall* call) {
  return answer([&] {
    emulator_seed = uint64_t(call->seed);
    const RowProblem problem = problem_of(*call);
    const Device device{int(call->arch), int(call->multiprocessors), int(call->block_shared),
                        int(call->most_cluster)};
    const RowRun run{problem, call->upstream_stride, call->reduction, call->total};
    const RowShape shape = shape_of(problem);
    const RowPlan plan = forced(*call, shape, device);
    const int64_t out[] = {int64_t(plan.traversal), plan.lanes,  plan.elements,
                           plan.threads,            plan.blocks, plan.cluster,
                           plan.slice,              plan.shared, plan.vector};
    std::memcpy(call->plan, out, sizeof out);
    if (!fits(plan, shape, device)) throw std::runtime_error("the plan breaks a limit");
    const Workspace workspace(workspace_bytes(run, plan));
    Ticket ticket;
    run_rows(rule, run, plan, workspace.base, ticket.given(), nullptr);
    ticket.check();
    workspace.check();
  });
}

extern "C" __attribute__((visibility("default"))) const char* emulate_scale(
    void* gradient, int64_t type, int64_t size, const void* upstream, int64_t upstream_type) {
  return answer([&] {
    scale(gradient, Scalar(type), size, upstream, Scalar(upstream_type), {90, 4, 232448, 16}, nullptr);
  });
}

namespace {

struct CorrelationCall {
  View student, teacher, gradient;
  const void* upstream;
  void* total;
  int64_t rows, classes, reduction;
  double inter, intra, tau, eps;
  int64_t arch, multiprocessors, block_shared, most_cluster;
  int64_t seed;
  int64_t plan[18];  // as in RowCall
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* emulate_correlation(
    const char* rule, CorrelationCall* call) {
  return answer([&] {
    emulator_seed = uint64_t(call->seed);
    CorrelationProblem problem{};
    problem.student = rows_of(call->student);
    problem.teacher = rows_of(call->teacher);
    problem.gradient = rows_of(call->gradient);
    problem.rows = call->rows;
    problem.classes = call->classes;
    problem.inter = call->inter;
    problem.intra = call->intra;
    problem.tau = call->tau;
    problem.eps = call->eps;
    const Device device{int(call->arch), int(call->multiprocessors), int(call->block_shared),
                        int(call->most_cluster)};
    const CorrelationRun run{problem, call->upstream, call->reduction, call->total};
    const RowShape shape = shape_of(problem);
    const CorrelationPlan plan =
        call->plan[0] < 0
            ? plan_correlation(shape, device)
            : plan_correlation_as(CorrelationTraversal(call->plan[0]), shape, device);
    const int64_t out[] = {int64_t(plan.traversal), plan.lanes,  plan.elements, plan.tile,
                           plan.groups,             plan.threads, plan.blocks,  plan.parts,
                           plan.shared,             plan.vector, int64_t(plan.layout),
                           plan.row_pitch,          plan.class_pitch, plan.spread, plan.run,
                           plan.bulk,               plan.cluster, plan.slice};
    static_assert(sizeof out == sizeof call->plan);
    std::memcpy(call->plan, out, sizeof out);
    if (!fits(plan, shape, device)) throw std::runtime_error("the plan breaks a limit");
    const Workspace workspace(workspace_bytes(run, plan));
    run_correlation(rule, run, plan, workspace.base, nullptr);
    workspace.check();
  });
}
