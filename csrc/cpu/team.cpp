#include "cpu/team.h"

#include <sched.h>

#include <algorithm>
#include <chrono>

namespace fastrnn {
namespace {

// About 20 us: longer than a step usually takes, shorter than a scheduler slice.
constexpr int kSpins = 512;
// A wait may always be this long: page faults and interrupts take 0.1 to 0.3 ms, a scheduler slice 1.5 to 4.
constexpr int64_t kPatienceNs = 500'000;
// How long teams stay small after contention: from four slices, to seldom enough that trying again costs 1 %.
constexpr int64_t kFirstPauseNs = 10'000'000, kLongestPauseNs = 1'280'000'000;
constexpr int64_t kRunners = 2 * kMaxParts;

constexpr auto kRelaxed = std::memory_order_relaxed;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

int64_t monotonic_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

bool Team::claim(int part, int64_t phase, int self) {
  int64_t expected = phase * kRunners;
  return next_[part].value.load(kRelaxed) == expected &&
         next_[part].value.compare_exchange_strong(expected, expected + 1 + self, std::memory_order_acq_rel);
}

/// Marks the member as here; false if it has been dropped.
bool Team::come(int self) {
  int8_t expected = kAway;
  if (!state_[self].compare_exchange_strong(expected, kHere, kRelaxed)) return expected == kHere;
  missing_.fetch_sub(1, kRelaxed);
  return true;
}

/// The member does not claim its parts: until it does again, the others take them without waiting.
void Team::leave_out(int member) {
  int8_t expected = kHere;
  if (state_[member].compare_exchange_strong(expected, kAway, kRelaxed)) missing_.fetch_add(1, kRelaxed);
}

/// Drops all members but `self` that are in a part of this phase. Only one member does this at a time, and
/// none that has been dropped itself, so the last one to do it stays and finishes the work.
void Team::drop_runners(int self, int64_t phase) {
  if (dropping_.test_and_set(std::memory_order_acquire)) return;
  for (int part = 0; part < parts_ && state_[self].load(kRelaxed) != kDropped; ++part) {
    const int64_t value = next_[part].value.load(kRelaxed);
    const auto runner = static_cast<int>(value % kRunners) - 1;
    if (value / kRunners != phase || runner < 0 || runner == self) continue;
    const int8_t before = state_[runner].exchange(kDropped, kRelaxed);
    if (before == kHere) missing_.fetch_add(1, kRelaxed);
    if (before != kDropped) late_.fetch_add(1, kRelaxed);
  }
  dropping_.clear(std::memory_order_release);
}

bool Team::work(int self, int64_t phases, Run run, void* context) {
  const int64_t start = clock_();
  int64_t lost = 0;  // in waits longer than a phase takes
  for (int64_t phase = 0; phase < phases; ++phase) {
    if (!here(self) && !come(self)) return false;
    const auto attempt = [&](int part) {
      if (!claim(part, phase, self)) return false;
      run(context, phase, part);
      next_[part].value.store((phase + 1) * kRunners, std::memory_order_release);
      done_.fetch_add(1, std::memory_order_acq_rel);
      return true;
    };
    attempt(self);
    for (int part = 0; part < parts_ && missing_.load(kRelaxed); ++part)
      if (!here(part)) attempt(part);
    const int64_t all = (phase + 1) * parts_;
    int64_t since = 0;  // when a long wait began
    for (int spins = 1; done_.load(std::memory_order_acquire) < all; ++spins) {
      relax();
      if (spins % kSpins) continue;
      bool helped = false;
      for (int part = 0; part < parts_; ++part)
        if (attempt(part)) leave_out(part), helped = true;
      if (helped) continue;
      const int64_t now = clock_();
      if (since == 0) since = now;
      const int64_t worked = since - start - lost, usual = worked / (phase + 1);
      if (lost + now - since - usual > std::max(kPatienceNs, worked / 2)) drop_runners(self, phase);
      sched_yield();
    }
    if (since) {
      const int64_t usual = (since - start - lost) / (phase + 1);
      lost += std::max<int64_t>(0, clock_() - since - usual);
    }
  }
  const int missing = missing_.load(kRelaxed);
  if (missing > late_.load(kRelaxed) && clock_() - start > kPatienceNs) late_.store(missing, kRelaxed);
  return true;
}

int Contention::members(int parts) const {
  if (pause_.load(kRelaxed) == 0 || clock_() >= until_.load(kRelaxed)) return parts;
  return std::max(1, parts - fewer_.load(kRelaxed));
}

void Contention::report(int parts, int members, int late) {
  const int64_t pause = pause_.load(kRelaxed);
  if (late) {
    const int64_t longer = std::clamp(2 * pause, kFirstPauseNs, kLongestPauseNs);
    pause_.store(longer, kRelaxed);
    until_.store(clock_() + longer, kRelaxed);
    fewer_.store(parts - members + late, kRelaxed);
  } else if (pause && members == parts) {
    pause_.store(pause > kFirstPauseNs ? pause / 2 : 0, kRelaxed);
  }
}

Contention& contention() {
  static Contention all;
  return all;
}

}  // namespace fastrnn
