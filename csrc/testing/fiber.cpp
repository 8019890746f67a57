// Compiled without sanitizers, whatever the code on the fibers is compiled with: those that the program has
// are found when it is linked.
#include "testing/fiber.h"

#include <cstdlib>

#define WEAK __attribute__((weak))
extern "C" {
WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
WEAK void __asan_poison_memory_region(const volatile void*, size_t);
WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
}

#if defined(__x86_64__)
// Saves what a call must preserve, exchanges the stacks, and returns to where the other one was left: some 5
// ns, where swapcontext asks the kernel for the signal mask.
extern "C" __attribute__((visibility("hidden"))) void fastrnn_switch_stack(void** left, void* next);
asm(R"(
.text
.hidden fastrnn_switch_stack
.globl fastrnn_switch_stack
.type fastrnn_switch_stack, @function
fastrnn_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size fastrnn_switch_stack, .-fastrnn_switch_stack
)");
#endif

namespace fastrnn::testing {
namespace {
Fiber* last_left = nullptr;
}  // namespace

void Fiber::adopt() {
  if (__tsan_get_current_fiber) tsan_ = __tsan_get_current_fiber();
}

void Fiber::prepare(char* stack, void (*entry)(), size_t color) {
  stack_ = stack;
  bottom_ = stack;
  size_ = kStackBytes;
  if (__tsan_create_fiber && !tsan_) tsan_ = __tsan_create_fiber(0);
  const size_t room = kStackBytes - color * 37 % 64 * 64;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + room);
  *--top = nullptr;  // entry's return address: where a debugger's walk up the stack ends
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  top_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = room;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::entered() {  // the bounds of an adopted stack are known when it has been left
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &last_left->bottom_, &last_left->size_);
}

void Fiber::jump(Fiber& next, bool for_good) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &asan_, next.bottom_, next.size_);
  last_left = this;
  constexpr unsigned kNotAnOrder = 1;  // or every switch would hide every race
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(next.tsan_, kNotAnOrder);
#if defined(__x86_64__)
  fastrnn_switch_stack(&top_, next.top_);
#else
  swapcontext(&context_, &next.context_);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(asan_, nullptr, nullptr);
}

void Fiber::switch_to(Fiber& next) { jump(next, false); }

void Fiber::leave_for(Fiber& next) {
  jump(next, true);
  std::abort();
}

void Fiber::forget() {
  if (!tsan_) return;
  constexpr unsigned kOrder = 0;  // all that it did happens before what its stack is used for next
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, kOrder);
  __tsan_switch_to_fiber(self, kOrder);
  __tsan_destroy_fiber(tsan_);
  tsan_ = nullptr;
}

void publish(void* p) {
  if (__tsan_release) __tsan_release(p);
}
void observe(void* p) {
  if (__tsan_acquire) __tsan_acquire(p);
}
bool forbid_access(void* p, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, bytes);
  return __asan_poison_memory_region != nullptr;
}
void allow_access(void* p, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, bytes);
}

}  // namespace fastrnn::testing
