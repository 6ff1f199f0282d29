// As kernels.cpp, for the embedding losses and tests/cuda_emulator_embedding.py.
#include "../../csrc/cuda/embedding.h"

#include <cstring>

#include "harness.h"

using namespace kdkernels;
using namespace kdkernels::cuda;

namespace {

struct View {  // (samples, width) as tests/cuda_emulator_embedding.py packs it
  void* data;
  int64_t type, stride, element_stride;
};

struct FactorCall {
  View inheritance, exploration, teacher, inheritance_gradient, exploration_gradient;
  const void* upstream;
  void* total;
  int64_t samples, width;
  double inheritance_weight, exploration_weight;
  int64_t cosine, reduction;
  int64_t arch, multiprocessors, block_shared, seed;
  int64_t plan[6];  // in: traversal or -1; out: the plan
};

struct TupleCall {
  const void *student, *teacher;
  void *gradient, *total;
  const int64_t* target;
  int64_t batch, wide, reduction;
  double margin, temperature, scale;
  int64_t arch, multiprocessors, block_shared, seed;
  int64_t plan[4];  // out
};

Rows rows_of(const View& view, int64_t samples) {
  return {view.data, Scalar(view.type), view.element_stride, 1, {samples}, {view.stride}};
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* emulate_factors(const char* rule,
                                                                               FactorCall* call) {
  return answer([&] {
    emulator_seed = uint64_t(call->seed);
    FactorProblem problem{};
    problem.inheritance = rows_of(call->inheritance, call->samples);
    problem.exploration = rows_of(call->exploration, call->samples);
    problem.teacher = rows_of(call->teacher, call->samples);
    problem.inheritance_gradient = rows_of(call->inheritance_gradient, call->samples);
    problem.exploration_gradient = rows_of(call->exploration_gradient, call->samples);
    problem.samples = call->samples;
    problem.width = call->width;
    problem.inheritance_weight = call->inheritance_weight;
    problem.exploration_weight = call->exploration_weight;
    problem.cosine = call->cosine != 0;
    const Device device{int(call->arch), int(call->multiprocessors), int(call->block_shared), 16};
    const FactorShape shape = shape_of(problem);
    const FactorPlan plan = call->plan[0] < 0
                                ? plan_factors(shape, device)
                                : plan_factors_as(FactorTraversal(call->plan[0]), shape, device);
    if (!fits(plan, shape, device)) throw std::logic_error("the plan does not fit");
    const int64_t out[] = {int64_t(plan.traversal), plan.lanes,  plan.elements,
                           plan.threads,            plan.blocks, plan.shared};
    std::memcpy(call->plan, out, sizeof out);
    const FactorRun run{problem, call->upstream, call->reduction, call->total};
    const Workspace workspace(workspace_bytes(run, plan));
    Ticket ticket;
    run_factors(rule, run, plan, workspace.base, ticket.given(), nullptr);
    ticket.check();
    workspace.check();
  });
}

extern "C" __attribute__((visibility("default"))) const char* emulate_tuples(const char* rule,
                                                                              TupleCall* call) {
  return answer([&] {
    emulator_seed = uint64_t(call->seed);
    const TupleProblem problem{call->student, call->teacher, call->gradient, call->target,
                               nullptr,       nullptr,       call->batch,    call->margin,
                               call->temperature};
    const TupleRun run{problem, call->wide != 0, call->scale, call->reduction, call->total};
    const Device device{int(call->arch), int(call->multiprocessors), int(call->block_shared), 16};
    const TuplePlan plan = plan_tuples(call->batch, run.wide, call->gradient != nullptr, device);
    const int64_t out[] = {plan.threads, plan.blocks, plan.shared, plan.scratch};
    std::memcpy(call->plan, out, sizeof out);
    const Workspace workspace(workspace_bytes(run, plan));
    run_tuples(rule, run, plan, workspace.base, nullptr);
    workspace.check();
  });
}
