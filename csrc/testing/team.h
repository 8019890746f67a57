// Runs a Team under a schedule that a test chooses, and watches the two promises it makes: every part of
// every phase is done exactly once, and none begins before all parts of the phase before are done.
#pragma once
#include <string>
#include <vector>

namespace fastrnn::testing {

struct Member {
  int part;
  int late_us;  // comes this late

  Member(int part, int late_us) : part(part), late_us(late_us) {}
};

/// Parts without a member are never started. About one step in stall_every sleeps (0: none). Each reading of
/// the team's clock finds it tick_us later; 0: the real one.
std::string run_team(int parts, int64_t phases, const std::vector<Member>& members, bool one_thread,
                     int stall_every, unsigned seed, int tick_us);

struct Held {
  std::string wrong;       // as run_team
  int late;                // Team::late() when the held members go on
  std::vector<bool> done;  // what Team::work returned to each member
  int64_t after;           // parts that the held members did in later phases
};

/// All members are in their parts of phase `phase` when the clock, which started at 0, stands at worked_us.
/// The last `held` stay there while it goes on by waited_us for the others, or until they are dropped.
Held hold_members(int parts, int64_t phases, int held, int64_t phase, int64_t worked_us, int64_t waited_us);

/// Seconds of CPU that member 0 of two takes for its empty phases. Member 1 comes for the first `shared` of
/// them and is then kept between two parts until member 0 has finished.
double seconds_without_neighbour(int64_t phases, int64_t shared);

/// A clock for Contention that stands where it is set.
void set_manual_ns(int64_t ns);
int64_t manual_ns();

}  // namespace fastrnn::testing
