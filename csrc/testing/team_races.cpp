// Teams under many schedules, for ThreadSanitizer (tests/sanitize.sh).
#include <cstdio>
#include <random>

#include "testing/team.h"

int main() {
  std::mt19937 random(0);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (unsigned seed = 0; seed < 400; ++seed) {
    const int parts = 1 + below(6);
    std::vector<fastrnn::testing::Member> members;
    for (int part = 0; part < parts; ++part)
      if (part == 0 || below(5)) members.emplace_back(part, below(3) ? 0 : below(300));
    // With 10 ms a reading whoever is late is dropped.
    const std::string wrong = fastrnn::testing::run_team(parts, 1 + below(60), members, false,
                                                         below(2) ? 20 : 0, seed, below(2) ? 10'000 : 0);
    if (!wrong.empty()) return std::printf("seed %u: %s\n", seed, wrong.c_str()), 1;
  }
  for (int held = 1; held < 4; ++held)
    if (!fastrnn::testing::hold_members(4, 30, held, 5, 300, 10'000).wrong.empty()) return 1;
  return 0;
}
