// Elementary functions and rules on single numbers and on vectors, for tests/test_rules.py. Compiled once
// for each instruction set, with the headers of the rules included before and KDK_RULES naming them.
#include <string>

#include "../../csrc/cpu/simd.h"
#include "../../csrc/rules/contract.h"

#define KDK_JOIN_(a, b) a##b
#define KDK_JOIN(a, b) KDK_JOIN_(a, b)

namespace kdkernels::KDK_ISA {
namespace {

// f on the elements of arrays of R: whole vectors, the last one filled with zeros.
template <class R, bool kVector, int kIn, int kOut, class F>
void each(int64_t count, const R* const (&in)[kIn], R* const (&out)[kOut], const F& f) {
  using V = std::conditional_t<kVector, Vec<R>, R>;
  constexpr int64_t kW = sizeof(V) / sizeof(R);
  for (int64_t i = 0; i < count; i += kW) {
    const int64_t n = count - i < kW ? count - i : kW;
    V x[kIn] = {}, y[kOut] = {};
    for (int k = 0; k < kIn; ++k) std::memcpy(&x[k], in[k] + i, n * sizeof(R));
    f(x, y);
    for (int k = 0; k < kOut; ++k) std::memcpy(out[k] + i, &y[k], n * sizeof(R));
  }
}

template <class R, bool kVector>
bool function(const std::string& name, int64_t count, const R* x, R* y) {
  using V = std::conditional_t<kVector, Vec<R>, R>;
  const R* const in[1] = {x};
  R* const out[1] = {y};
  const auto run = [&](auto f) {
    each<R, kVector>(count, in, out, [&](const V(&a)[1], V(&b)[1]) { b[0] = f(a[0]); });
    return true;
  };
  if (name == "exp") return run([](const V& a) { return rules::exponential(a); });
  if (name == "expm1") return run([](const V& a) { return rules::exponential_less_one(a); });
  if (name == "log") return run([](const V& a) { return rules::logarithm(a); });
  if (name == "log1p") return run([](const V& a) { return rules::logarithm_of_one_plus(a); });
  return false;
}

template <class R, bool kVector>
bool pointwise(const std::string& name, const Options& options, int64_t count, const R* const (&in)[3],
               R* const (&out)[2]) {
  using V = std::conditional_t<kVector, Vec<R>, R>;
#define X(rule)                                                                                   \
  if (name == #rule) {                                                                            \
    static_assert(rules::keeps_contract<rules::rule::Rule>());                                    \
    using Pointwise = typename rules::PointwiseOf<rules::rule::Rule>::type;                       \
    each<R, kVector>(count, in, out, [&](const V(&x)[3], V(&y)[2]) {                              \
      Pointwise::pointwise(options, x[0], x[1], x[2], y[0], y[1]);                                \
    });                                                                                           \
    return true;                                                                                  \
  }
  KDK_RULES(X)
#undef X
  return false;
}

}  // namespace
}  // namespace kdkernels::KDK_ISA

using namespace kdkernels;

// exp, expm1, log or log1p of doubles (wide) or floats.
extern "C" __attribute__((visibility("default"))) bool KDK_JOIN(function_, KDK_ISA)(
    const char* name, bool wide, bool vector, int64_t count, const void* x, void* y) {
  const auto run = [&](auto kVector, auto zero) {
    using R = decltype(zero);
    return KDK_ISA::function<R, decltype(kVector)::value>(name, count, static_cast<const R*>(x),
                                                          static_cast<R*>(y));
  };
  if (vector) return wide ? run(std::true_type(), 0.0) : run(std::true_type(), 0.0f);
  return wide ? run(std::false_type(), 0.0) : run(std::false_type(), 0.0f);
}

// A rule's value and slope of p, q and d, which follow each other in x, as value and slope do in y.
extern "C" __attribute__((visibility("default"))) bool KDK_JOIN(pointwise_, KDK_ISA)(
    const char* name, const double* options, bool wide, bool vector, int64_t count, const void* x,
    void* y) {
  Options given;
  std::memcpy(given.value, options, sizeof given.value);
  const auto run = [&](auto kVector, auto zero) {
    using R = decltype(zero);
    const R* const from = static_cast<const R*>(x);
    R* const to = static_cast<R*>(y);
    const R* const in[3] = {from, from + count, from + 2 * count};
    R* const out[2] = {to, to + count};
    return KDK_ISA::pointwise<R, decltype(kVector)::value>(name, given, count, in, out);
  };
  if (vector) return wide ? run(std::true_type(), 0.0) : run(std::true_type(), 0.0f);
  return wide ? run(std::false_type(), 0.0) : run(std::false_type(), 0.0f);
}
