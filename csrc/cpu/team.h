// A team walks through phases together: no part of phase p+1 begins before every part of phase p is done.
// Parts are claimed, not assigned, so nobody ever waits for a thread that has not come: the others do the
// part of a member that is not there. One thread alone finishes everything. A part that somebody has begun
// cannot be taken over; a member that is descheduled in its parts, and so keeps the others waiting for more
// than half of the time in which they work, is dropped: it leaves, and the others do its parts.
#pragma once
#include <atomic>
#include <cstdint>

namespace fastrnn {

constexpr int kMaxParts = 128;

using Clock = int64_t (*)();  // ns
int64_t monotonic_ns();

class Team {
 public:
  using Run = void (*)(void* context, int64_t phase, int part);

  explicit Team(int parts, Clock clock = monotonic_ns) : parts_(parts), missing_(parts), clock_(clock) {}

  /// Takes part as member `self`, 0 <= self < parts, until all phases are done; false if it was dropped
  /// before.
  bool work(int self, int64_t phases, Run run, void* context);

  int parts() const { return parts_; }

  /// Members that were dropped, or that were not there when the others had finished a long work.
  int late() const { return late_.load(std::memory_order_relaxed); }

 private:
  enum State : int8_t { kAway, kHere, kDropped };

  bool claim(int part, int64_t phase, int self);
  bool come(int self);
  void leave_out(int member);
  void drop_runners(int self, int64_t phase);
  bool here(int member) const { return state_[member].load(std::memory_order_relaxed) == kHere; }

  struct alignas(64) Part {
    std::atomic<int64_t> value{0};  // kRunners * (phase that it does next) + (1 + who runs it, or 0)
  };
  int parts_;
  alignas(64) std::atomic<int64_t> done_{0};  // parts done, over all phases
  std::atomic<int> missing_;                  // members that are not here, to within a moment
  Clock clock_;
  std::atomic<int> late_{0};
  std::atomic_flag dropping_;
  alignas(64) std::atomic<int8_t> state_[kMaxParts]{};
  Part next_[kMaxParts];
};

/// What a process remembers of contention for the cores: after a call that lost members, teams start with as
/// many fewer, for a time that doubles with each such call and halves with each quiet call of all members.
class Contention {
 public:
  explicit Contention(Clock clock = monotonic_ns) : clock_(clock) {}

  /// How many members of a team to start.
  int members(int parts) const;
  /// After a call that started `members` of `parts` in each team, the most late of one team.
  void report(int parts, int members, int late);

 private:
  Clock clock_;
  std::atomic<int64_t> pause_{0}, until_{0};
  std::atomic<int> fewer_{0};
};

/// That of this process.
Contention& contention();

}  // namespace fastrnn
