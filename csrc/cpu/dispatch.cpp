// Compiled for the baseline instruction set. The build defines
//   KDK_RULES  X(kd) X(dkd) ...        the files of csrc/rules
//   KDK_ISAS   X(rule, baseline) ...   the instruction sets of this architecture, weakest first
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>

#include "scratch.h"

namespace kdkernels::cpu {

#define X(rule, isa) extern const Kernels rule##_##isa;
#define DECLARE(rule) KDK_ISAS(rule)
KDK_RULES(DECLARE)
#undef DECLARE
#undef X

namespace {

struct Entry {
  const char* rule;
  const char* isa;
  const Kernels* kernels;
};

const Entry kTable[] = {
#define X(rule, isa) {#rule, #isa, &rule##_##isa},
#define LIST(rule) KDK_ISAS(rule)
    KDK_RULES(LIST)
#undef LIST
#undef X
};

bool supported(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  if (isa == "avx512")
    return supported("avx2") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
#endif
  return isa == "baseline";
}

std::string choose() {
  const char* wanted = std::getenv("KDKERNELS_CPU_CAPABILITY");
  std::string best = "baseline";
  for (const std::string& isa : capabilities()) {
    if (!supported(isa)) continue;
    best = isa;
    if (wanted && isa == wanted) break;
  }
  if (wanted && best != wanted)
    throw std::runtime_error(std::string("KDKERNELS_CPU_CAPABILITY must be an instruction set of "
                                         "this build and machine, got ") + wanted);
  return best;
}

const char* name(Family family) {
  switch (family) {
    case Family::divergence: return "divergence";
    case Family::decoupled: return "decoupled";
    case Family::binary: return "binary";
    case Family::correlation: return "correlation";
    case Family::factor:
    case Family::tuple: return "embedding";
    case Family::sparse: return "sparse";
  }
  return "";
}

}  // namespace

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Entry& entry : kTable)
    if (std::strcmp(entry.rule, kTable[0].rule) == 0) names.push_back(entry.isa);
  return names;
}

const std::string& capability() {
  static const std::string chosen = choose();
  return chosen;
}

const Kernels& kernels(const std::string& rule) {
  static const std::map<std::string, const Kernels*> table = [] {
    std::map<std::string, const Kernels*> chosen;
    for (const Entry& entry : kTable)
      if (capability() == entry.isa) chosen[entry.rule] = entry.kernels;
    return chosen;
  }();
  const auto found = table.find(rule);
  if (found == table.end())
    throw std::runtime_error("rule must be compiled into this extension, got " + rule);
  return *found->second;
}

std::vector<std::string> rules(const std::string& family) {
  std::vector<std::string> names;
  for (const Entry& entry : kTable)
    if (family == name(entry.kernels->family) && std::strcmp(entry.isa, "baseline") == 0)
      names.push_back(entry.rule);
  return names;
}

namespace {
constexpr std::size_t kAlignment = 64;

struct ThreadBuffer {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~ThreadBuffer() { std::free(data); }
};

void* aligned(std::size_t bytes) {
  void* data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (!data) throw std::bad_alloc();
  return data;
}
}  // namespace

void* scratch(std::size_t bytes) {
  thread_local ThreadBuffer buffer;
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.data = nullptr;
    buffer.bytes = 0;
    buffer.data = aligned(bytes);
    buffer.bytes = bytes;
  }
  return buffer.data;
}

Buffer::Buffer(std::size_t bytes) : data(aligned(bytes ? bytes : 1)) {}
Buffer::~Buffer() { std::free(data); }

}  // namespace kdkernels::cpu
