// One rule for one instruction set. The build compiles this file once for each pair, with KDK_RULE
// (a file of csrc/rules) and KDK_ISA (baseline, avx2, avx512). It defines one constant and runs no
// code when the library is loaded, so that it is harmless on machines without the instruction set.
#define KDK_TEXT_(x) #x
#define KDK_TEXT(x) KDK_TEXT_(x)
#define KDK_JOIN_(a, b, c) a##b##c
#define KDK_JOIN(a, b, c) KDK_JOIN_(a, b, c)
#define KDK_HEADER(rule) KDK_TEXT(../rules/rule.h)

#include KDK_HEADER(KDK_RULE)
#include "correlation.h"
#include "embedding_factor.h"
#include "embedding_tuple.h"
#include "row_loss.h"
#include "topk_loss.h"

namespace kdkernels::cpu {

template <class Rule>
constexpr Kernels kernels() {
  namespace isa = kdkernels::KDK_ISA;
  Kernels table{};
  table.family = Rule::family;
  if constexpr (Rule::family == Family::correlation) {
    table.correlation_f32 = isa::run_correlation<Rule, float>;
    table.correlation_f64 = isa::run_correlation<Rule, double>;
  } else if constexpr (Rule::family == Family::factor) {
    table.factors_f32 = isa::run_factors<Rule, float>;
    table.factors_f64 = isa::run_factors<Rule, double>;
  } else if constexpr (Rule::family == Family::tuple) {
    table.tuples_f32 = isa::run_tuples<Rule, float>;
    table.tuples_f64 = isa::run_tuples<Rule, double>;
  } else if constexpr (Rule::family == Family::sparse) {
    table.topk_f32 = isa::run_topk<float>;
    table.topk_f64 = isa::run_topk<double>;
    table.topk_loss_f32 = isa::run_topk_loss<float>;
    table.topk_loss_f64 = isa::run_topk_loss<double>;
  } else {
    table.row_f32 = isa::run_rows<Rule, float>;
    table.row_f64 = isa::run_rows<Rule, double>;
  }
  return table;
}

extern const Kernels KDK_JOIN(KDK_RULE, _, KDK_ISA);
constexpr Kernels KDK_JOIN(KDK_RULE, _, KDK_ISA) = kernels<rules::KDK_RULE::Rule>();

}  // namespace kdkernels::cpu
