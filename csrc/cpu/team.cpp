#include "cpu/team.h"

#include <sched.h>

namespace fastrnn {
namespace {

// About 20 us: longer than a step usually takes, shorter than a scheduler slice.
constexpr int kSpins = 512;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

bool Team::claim(int part, int64_t phase) {
  int64_t expected = phase;
  return next_[part].value.load(std::memory_order_relaxed) == phase &&
         next_[part].value.compare_exchange_strong(expected, phase + 1, std::memory_order_acq_rel);
}

void Team::work(int self, int64_t phases, Run run, void* context) {
  for (int64_t phase = 0; phase < phases; ++phase) {
    const auto attempt = [&](int part) {
      if (!claim(part, phase)) return;
      run(context, phase, part);
      done_.value.fetch_add(1, std::memory_order_acq_rel);
    };
    attempt(self);
    const int64_t all = (phase + 1) * parts_;
    for (int spins = 1; done_.value.load(std::memory_order_acquire) < all; ++spins) {
      relax();
      if (spins % kSpins) continue;
      for (int part = 0; part < parts_; ++part) attempt(part);
      sched_yield();
    }
  }
}

}  // namespace fastrnn
