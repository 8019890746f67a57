#include "testing/team.h"

#include <time.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>

#include "cpu/team.h"

namespace fastrnn::testing {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;

/// The phases as the team walks through them. The counters order nothing, so that ThreadSanitizer sees
/// whether the team orders `handed`.
struct Watch {
  int parts;
  int64_t phases;
  int stall_every;
  unsigned seed;
  std::unique_ptr<std::atomic<int>[]> begun, ended;  // [phases * parts], [phases]
  std::vector<int64_t> handed[2];                    // [parts], phase + 1: what a part of it has written
  std::atomic<int64_t> early{0};

  explicit Watch(int parts, int64_t phases, int stall_every = 0, unsigned seed = 0)
      : parts(parts),
        phases(phases),
        stall_every(stall_every),
        seed(seed),
        begun(std::make_unique<std::atomic<int>[]>(phases * parts)),
        ended(std::make_unique<std::atomic<int>[]>(phases)),
        handed{std::vector<int64_t>(parts), std::vector<int64_t>(parts)} {}

  void run(int64_t phase, int part) {
    for (const int64_t last : handed[(phase + 1) % 2]) early.fetch_add(last != phase, kRelaxed);
    begun[phase * parts + part].fetch_add(1, kRelaxed);
    const auto mixed = static_cast<uint32_t>(seed + phase * 7919 + part * 104729) * 2654435761u;
    if (stall_every && (mixed >> 16) % static_cast<uint32_t>(stall_every) == 0)
      std::this_thread::sleep_for(std::chrono::microseconds((mixed >> 8) % 200));
    handed[phase % 2][part] = phase + 1;
    ended[phase].fetch_add(1, kRelaxed);
  }

  std::string wrong() const {
    for (int64_t i = 0; i < phases * parts; ++i)
      if (begun[i] != 1)
        return "part " + std::to_string(i % parts) + " of phase " + std::to_string(i / parts) + " ran " +
               std::to_string(begun[i]) + " times";
    if (early) return std::to_string(early) + " steps began before the phase before them was done";
    return "";
  }
};

using Body = std::function<void(int64_t phase, int part)>;

bool work(Team& team, int member, int64_t phases, Body body) {
  return team.work(
      member, phases,
      [](void* context, int64_t phase, int part) { (*static_cast<Body*>(context))(phase, part); }, &body);
}

/// A clock that each reading finds `tick` later, as long as it has not reached `limit`.
std::atomic<int64_t> now_ns, tick_ns, limit_ns, readings;
int64_t ticking_ns() {
  ++readings;
  const int64_t now = now_ns;
  return now < limit_ns ? now_ns += tick_ns : now;
}
void set_clock(int64_t now, int64_t tick, int64_t limit) {
  limit_ns = 0;
  now_ns = now, tick_ns = tick, limit_ns = limit;
}

/// Waits until it is true; a deadlock fails instead.
void wait_for(const std::function<bool()>& ready) {
  const int64_t deadline = monotonic_ns() + 20'000'000'000;
  while (!ready() && monotonic_ns() < deadline) std::this_thread::yield();
}

}  // namespace

std::string run_team(int parts, int64_t phases, const std::vector<Member>& members, bool one_thread,
                     int stall_every, unsigned seed, int tick_us) {
  Watch watch(parts, phases, stall_every, seed);
  set_clock(0, int64_t{1000} * tick_us, INT64_MAX);
  const auto team = std::make_unique<Team>(parts, tick_us ? ticking_ns : monotonic_ns);
  std::atomic<int> unfinished{0};
  const auto join = [&](const Member& member) {
    std::this_thread::sleep_for(std::chrono::microseconds(member.late_us));
    const bool done =
        work(*team, member.part, phases, [&](int64_t phase, int part) { watch.run(phase, part); });
    // Who was not dropped may rely on all of the work, not on its own.
    if (!done || phases == 0) return;
    for (const int64_t last : watch.handed[(phases - 1) % 2]) unfinished.fetch_add(last != phases, kRelaxed);
  };
  if (one_thread) {
    for (const Member& member : members) join(member);
  } else {
    std::vector<std::thread> threads;
    for (const Member& member : members) threads.emplace_back(join, member);
    for (std::thread& thread : threads) thread.join();
  }
  if (watch.wrong().empty() && unfinished)
    return std::to_string(unfinished) + " parts were not done when members came back";
  return watch.wrong();
}

Held hold_members(int parts, int64_t phases, int held, int64_t held_phase, int64_t worked_us,
                  int64_t waited_us) {
  Watch watch(parts, phases);
  set_clock(0, 0, 0);
  const auto team = std::make_unique<Team>(parts, ticking_ns);
  std::atomic<int> in_time{0}, late{0};
  std::atomic<int64_t> after{0}, readings_then{0};
  std::vector<char> done(parts);
  const auto join = [&](int self) {
    const bool is_held = self >= parts - held;
    done[self] = work(*team, self, phases, [&](int64_t phase, int part) {
      if (is_held && phase > held_phase) ++after;
      // In this phase each member does its own part, because nobody leaves his before all are there.
      if (phase == held_phase && part == self) {
        const int64_t then = 1000 * worked_us;
        if (++in_time == parts) {
          set_clock(then, 0, 0);
          ++in_time;
        }
        wait_for([&] { return in_time > parts; });
        if (self == parts - 1) {  // when the others have done theirs
          wait_for([&] { return watch.ended[phase] == parts - held; });
          readings_then = readings.load();
          set_clock(then, 20 * waited_us, then + 1000 * waited_us);  // in 50 readings
        }
        if (is_held) {
          wait_for([&] {
            return team->late() == held || (readings_then && readings > readings_then + 100 * parts);
          });
          late = team->late();
        }
      }
      watch.run(phase, part);
    });
  };
  std::vector<std::thread> threads;
  for (int self = 0; self < parts; ++self) threads.emplace_back(join, self);
  for (std::thread& thread : threads) thread.join();
  return {watch.wrong(), late, {done.begin(), done.end()}, after};
}

double seconds_without_neighbour(int64_t phases, int64_t shared) {
  static std::atomic<bool> kept, finished;
  static thread_local bool keeps = false;
  kept = finished = false;
  const auto team = std::make_unique<Team>(2, [] {
    if (keeps) {
      kept = true;
      wait_for([] { return finished.load(); });
    }
    return int64_t{0};
  });
  std::thread neighbour(
      [&] { work(*team, 1, phases, [&](int64_t phase, int) { keeps = phase == shared; }); });
  // Member 1 is kept when it waits for this part to end.
  work(*team, 0, shared + 1, [&](int64_t phase, int) {
    if (phase == shared) wait_for([] { return kept.load(); });
  });
  const auto seconds = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double before = seconds();
  work(*team, 0, phases, [](int64_t, int) {});
  const double taken = seconds() - before;
  finished = true;
  neighbour.join();
  return taken;
}

void set_manual_ns(int64_t ns) { set_clock(ns, 0, 0); }
int64_t manual_ns() { return ticking_ns(); }

}  // namespace fastrnn::testing
