// A fiber is a call stack of its own; one OS thread switches between any number of them. AddressSanitizer and
// ThreadSanitizer, where the program has them, are told of every switch: a fiber is a thread to them.
#pragma once
#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastrnn::testing {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 << 10;  // mostly untouched; sanitizers make frames large

  /// The stack that this is called on.
  void adopt();
  /// Will run entry, which must not return, on the given stack. `color` shifts the first frame, so that the
  /// tops of many stacks do not fall into the same lines of the cache.
  void prepare(char* stack, void (*entry)(), size_t color);
  /// First thing in entry.
  static void entered();
  /// Comes back when another fiber switches to this one.
  void switch_to(Fiber& next);
  [[noreturn]] void leave_for(Fiber& next);
  /// To be called before prepare, if the fiber was left in the middle of its work.
  void forget();

 private:
  void jump(Fiber& next, bool for_good);

  char* stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void *tsan_ = nullptr, *asan_ = nullptr;
#if defined(__x86_64__)
  void* top_ = nullptr;  // of the stack while another fiber runs
#else
  ucontext_t context_;
#endif
};

// Without a sanitizer these do nothing.
/// What was done before publish(p) happens before what follows observe(p), for ThreadSanitizer.
void publish(void* p);
void observe(void* p);
/// Whether AddressSanitizer watches; accesses to [p, p + bytes) are errors to it until it is told otherwise.
bool forbid_access(void* p, size_t bytes);
void allow_access(void* p, size_t bytes);

}  // namespace fastrnn::testing
