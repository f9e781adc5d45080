// Fibers: stacks of their own between which one thread of the system switches when it is told to, in a few nanoseconds.
// Sanitizers are told of each switch. To ThreadSanitizer a fiber is a thread of its own where the code says as(fiber),
// and no switch orders anything: that is what release and acquire are for.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace host_cuda {

#if defined(__SANITIZE_THREAD__)
constexpr bool kUnderThreadSanitizer = true;
#else
constexpr bool kUnderThreadSanitizer = false;
#endif

// A place to go on from: a stack, and what was kept when it was left.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* bottom = nullptr;  // of the stack; AddressSanitizer tells us that of a thread
  size_t size = 0;
  void* fake_stack = nullptr;
  void* identity = nullptr;  // to ThreadSanitizer
};

inline Context* left = nullptr;  // the context of the last switch

#if defined(__x86_64__)
// Keeps the registers that a function has to keep on this stack, and takes them from the other one.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*kept*/, void* /*next*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

inline void arrive(Context& here) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(here.fake_stack, &left->bottom, &left->size);
#else
  (void)here;
#endif
}

__attribute__((noinline, no_sanitize("thread"))) inline void go(Context& from, Context& to) {
  left = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrive(from);
}

// A context that begins with a call of `main`, which must not return.
class Fiber {
 public:
  // The number of the fiber moves the top of its stack, so that fibers do not meet in one set of a cache.
  Fiber(void (*main)(), size_t number) {
    void* const memory =
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    auto* const first = static_cast<unsigned char*>(memory) + kPage;
    context.bottom = first;
    context.size = kBytes - kPage - number * 192 % kPage / 64 * 64;
#if defined(__x86_64__)
    // Six registers, the function to begin with, and the address to which it would return.
    void** top = reinterpret_cast<void**>(first + context.size) - 8;
    for (int i = 0; i < 8; ++i) {
      top[i] = nullptr;
    }
    top[6] = reinterpret_cast<void*>(main);
    context.stack_pointer = top;
#else
    getcontext(&context.registers);
    context.registers.uc_stack = {first, 0, context.size};
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, main, 0);
#endif
#if defined(__SANITIZE_THREAD__)
    context.identity = __tsan_create_fiber(0);
#endif
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  // Stacks live as long as the process: one that is given up in the middle of a call cannot be taken down.

  Context context;

 private:
  static constexpr size_t kBytes = size_t{1} << 18, kPage = 4096;
};

#if defined(__SANITIZE_THREAD__)
// A function that is instrumented must end as what it has begun as.
__attribute__((noinline, no_sanitize("thread"))) inline void as(const Context& context) {
  __tsan_switch_to_fiber(context.identity, __tsan_switch_to_fiber_no_sync);
}
inline void* identity() { return __tsan_get_current_fiber(); }
inline void release(void* place) { __tsan_release(place); }
inline void acquire(void* place) { __tsan_acquire(place); }
__attribute__((noinline, no_sanitize("thread"))) inline void as(const Context& context, const Context& back,
                                                                void (*order)(void*), void* place) {
  as(context);
  order(place);
  as(back);
}
#else
inline void as(const Context&) {}
inline void* identity() { return nullptr; }
inline void release(void*) {}
inline void acquire(void*) {}
inline void as(const Context&, const Context&, void (*)(void*), void*) {}
#endif

}  // namespace host_cuda
