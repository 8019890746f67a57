// A team walks through phases together: no part of phase p+1 begins before every part of phase p is done.
// Parts are claimed, not assigned, so nobody ever waits for a thread that has not come: a member whose
// neighbour is late, descheduled or was never started does the neighbour's part as well. One thread alone
// finishes everything.
#pragma once
#include <atomic>
#include <cstdint>

namespace fastrnn {

constexpr int kMaxParts = 128;

class Team {
 public:
  using Run = void (*)(void* context, int64_t phase, int part);

  explicit Team(int parts) : parts_(parts) {}

  /// Takes part as member `self`, 0 <= self < parts, until all phases are done.
  void work(int self, int64_t phases, Run run, void* context);

  int parts() const { return parts_; }

 private:
  bool claim(int part, int64_t phase);

  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  int parts_;
  Counter done_;             // parts done, over all phases
  Counter next_[kMaxParts];  // the phase that each part does next
};

}  // namespace fastrnn
