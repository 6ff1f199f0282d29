// Fibers: one per CUDA thread, switched in a few nanoseconds, on stacks that are used again.
//
// swapcontext saves the signal mask by a system call at every switch, so x86-64 and AArch64 have
// their own switch; elsewhere, or with -DKDK_EMULATOR_UCONTEXT, ucontext is what there is.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KDK_EMULATOR_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define KDK_EMULATOR_ASAN 1
#endif
#if defined(KDK_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__ELF__) || !(defined(__x86_64__) || defined(__aarch64__))
#define KDK_EMULATOR_UCONTEXT 1
#endif

#if defined(KDK_EMULATOR_UCONTEXT)
#include <ucontext.h>
#else
// Saves the registers that a call preserves on the stack and its pointer in *from, then takes up
// what an earlier switch, or prepare(), left at `to`. A COMDAT section: one copy in a program.
extern "C" __attribute__((visibility("hidden"))) void kdk_switch_stack(void** from, void* to);
asm(R"(
.pushsection .text.kdk_switch_stack,"axG",%progbits,kdk_switch_stack,comdat
.weak kdk_switch_stack
.hidden kdk_switch_stack
.type kdk_switch_stack,%function
.p2align 4
kdk_switch_stack:
)"
#if defined(__x86_64__)
    R"(
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)"
#else
    R"(
  sub sp, sp, #160
  stp x29, x30, [sp, #0]
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x29, x30, [sp, #0]
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)"
#endif
    R"(
.size kdk_switch_stack, . - kdk_switch_stack
.popsection
)");
#endif

namespace kdkernels::cuda::emulator {

#if defined(KDK_EMULATOR_ASAN)
constexpr size_t kStackBytes = 256 << 10;  // its frames are several times as large
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr uint64_t kStackEnd = 0x5afe57acc0ffee11u;

// Stacks by number, kept until the thread ends. The lowest word of each tells whether it was
// overrun: a page without access below each would exhaust a process's number of mappings.
class Stacks {
 public:
  ~Stacks() {
    for (char* slab : slabs_) munmap(slab, kSlabBytes);
  }
  char* at(size_t index) {
    while (index / kSlab >= slabs_.size()) {
      void* p = mmap(nullptr, kSlabBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      slabs_.push_back(static_cast<char*>(p));
    }
    return slabs_[index / kSlab] + index % kSlab * kStride + kRoom;
  }

 private:
  static constexpr size_t kSlab = 64;
  // Below each stack is room for what little overruns it. Not a power of two together: the tops
  // of the stacks would share a few sets of the cache.
  static constexpr size_t kRoom = 832;
  static constexpr size_t kStride = kRoom + kStackBytes;
  static constexpr size_t kSlabBytes = kSlab * kStride;
  std::vector<char*> slabs_;
};

inline Stacks& stacks() {
  static thread_local Stacks all;
  return all;
}

inline bool overrun(const char* stack) { return std::memcmp(stack, &kStackEnd, 8) != 0; }

// Where a fiber, or the thread that runs them, was left.
struct Context {
#if defined(KDK_EMULATOR_UCONTEXT)
  ucontext_t state;
#else
  void* sp = nullptr;
#endif
#if defined(KDK_EMULATOR_ASAN)
  const void* stack = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;
#endif
};

// The first switch to the context calls `entry`, which never returns.
inline void prepare(Context& context, char* stack, void (*entry)()) {
#if defined(KDK_EMULATOR_ASAN)
  context.stack = stack;
  context.bytes = kStackBytes;
  context.fake = nullptr;
  __asan_unpoison_memory_region(stack, kStackBytes);  // an abandoned fiber leaves its red zones
#endif
  std::memcpy(stack, &kStackEnd, 8);
#if defined(KDK_EMULATOR_UCONTEXT)
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack + 16;
  context.state.uc_stack.ss_size = kStackBytes - 16;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
#else
  void** top = reinterpret_cast<void**>(stack + kStackBytes);  // a multiple of 64
#if defined(__x86_64__)
  // Six registers, the address that `ret` takes, and where entry's caller would have been.
  constexpr int kFrame = 8, kReturn = 6;
#else
  constexpr int kFrame = 20, kReturn = 1;
#endif
  top -= kFrame;
  for (int i = 0; i < kFrame; ++i) top[i] = nullptr;
  top[kReturn] = reinterpret_cast<void*>(entry);
  context.sp = top;
#endif
}

// What a fiber does first; `from` is the context that switched to it.
inline void entered([[maybe_unused]] Context& from) {
#if defined(KDK_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.bytes);
#endif
}

inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool for_good = false) {
#if defined(KDK_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake, to.stack, to.bytes);
#endif
#if defined(KDK_EMULATOR_UCONTEXT)
  swapcontext(&from.state, &to.state);
#else
  kdk_switch_stack(&from.sp, to.sp);
#endif
#if defined(KDK_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

}  // namespace kdkernels::cuda::emulator
