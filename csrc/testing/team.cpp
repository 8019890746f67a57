#include "testing/team.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "cpu/team.h"

namespace fastrnn::testing {
namespace {

/// The phases as the team walks through them.
struct Watch {
  int parts;
  int64_t phases;
  int stall_every;
  unsigned seed;
  std::unique_ptr<std::atomic<int>[]> begun, ended;  // [phases * parts], [phases]
  std::atomic<int64_t> early{0};

  void run(int64_t phase, int part) {
    if (phase > 0 && ended[phase - 1].load() != parts) ++early;
    ++begun[phase * parts + part];
    const auto mixed = static_cast<uint32_t>(seed + phase * 7919 + part * 104729) * 2654435761u;
    if (stall_every && (mixed >> 16) % static_cast<uint32_t>(stall_every) == 0)
      std::this_thread::sleep_for(std::chrono::microseconds((mixed >> 8) % 200));
    ++ended[phase];
  }
};

}  // namespace

std::string run_team(int parts, int64_t phases, const std::vector<Member>& members, bool one_thread,
                     int stall_every, unsigned seed) {
  Watch watch{parts,
              phases,
              stall_every,
              seed,
              std::make_unique<std::atomic<int>[]>(phases * parts),
              std::make_unique<std::atomic<int>[]>(phases)};
  const auto team = std::make_unique<Team>(parts);
  std::atomic<int> unfinished{0};
  const auto join = [&](const Member& member) {
    std::this_thread::sleep_for(std::chrono::microseconds(member.late_us));
    team->work(
        member.part, phases,
        [](void* watch, int64_t phase, int part) { static_cast<Watch*>(watch)->run(phase, part); }, &watch);
    // Whoever comes back may rely on all of the work, not on its own.
    if (phases > 0 && watch.ended[phases - 1].load() != parts) ++unfinished;
  };
  if (one_thread) {
    for (const Member& member : members) join(member);
  } else {
    std::vector<std::thread> threads;
    for (const Member& member : members) threads.emplace_back(join, member);
    for (std::thread& thread : threads) thread.join();
  }
  for (int64_t i = 0; i < phases * parts; ++i)
    if (watch.begun[i] != 1)
      return "part " + std::to_string(i % parts) + " of phase " + std::to_string(i / parts) + " ran " +
             std::to_string(watch.begun[i]) + " times";
  if (watch.early) return std::to_string(watch.early) + " steps began before the phase before them was done";
  if (unfinished) return std::to_string(unfinished) + " members came back before the work was done";
  return "";
}

}  // namespace fastrnn::testing
