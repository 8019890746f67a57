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

/// Parts without a member are never started. About one step in stall_every sleeps (0: none).
std::string run_team(int parts, int64_t phases, const std::vector<Member>& members, bool one_thread,
                     int stall_every, unsigned seed);

}  // namespace fastrnn::testing
