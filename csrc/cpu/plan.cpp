#include "cpu/plan.h"

#include <unistd.h>

#include <algorithm>

#include "cpu/team.h"

namespace fastrnn {
namespace {

// Rough costs of a Zen class core; the choice between two plans needs their order only.
constexpr double kFlopsPerNs = 100;    // fp32 multiply-adds in tiles, counted twice
constexpr double kL2BytesPerNs = 75, kL3BytesPerNs = 30, kMemoryBytesPerNs = 15;
constexpr double kL3Bytes = 32e6;
constexpr double kForkNs = 5000;       // telling the other threads, which still spin after their last work
// One barrier of a team: 700 ns for two threads, measured. More threads are estimated: each adds to one
// counter, whose cache line takes about 100 ns from core to core.
constexpr double kMeetNs = 500, kMeetNsEach = 100;
// The slowest thread of a barrier takes this much longer than the average: 1.00 to 1.17 for two, measured.
constexpr double kLater = 1.05;
constexpr int64_t kFullTile = 6;       // rows below which a tile wastes its registers

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Read bandwidth of one core over an array of this size, read again and again. The size of the last cache is
/// a constant, because virtual machines report that of the whole socket.
double bytes_per_ns(double bytes) {
  static const double l2 = [] {
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return found > 0 ? static_cast<double>(found) : 512e3;
  }();
  return bytes < 0.8 * l2 ? kL2BytesPerNs : bytes < kL3Bytes ? kL3BytesPerNs : kMemoryBytesPerNs;
}

double step_ns(const ScanShape& shape, Plan plan) {
  const double rows = static_cast<double>(ceil_div(shape.B, plan.teams));
  const double weights = static_cast<double>(ceil_div(shape.blocks, plan.parts) * shape.block_weights);
  const double bytes = weights * static_cast<double>(shape.element_bytes);
  const double compute = 2 * weights * std::max<double>(rows, std::min<double>(kFullTile, 3)) *
                         (static_cast<double>(shape.element_bytes) / 4) / kFlopsPerNs;
  const double stream = bytes / bytes_per_ns(bytes);
  const double alone = std::max(compute, stream) + 0.15 * std::min(compute, stream);
  return plan.parts > 1 ? kLater * alone + kMeetNs + kMeetNsEach * plan.parts : alone;
}

}  // namespace

Plan choose_plan(const ScanShape& shape) {
  const int threads = std::max(1, shape.threads / shape.directions);
  Plan best{1, 1};
  double best_ns = step_ns(shape, best) * static_cast<double>(shape.T);
  for (int teams = 1; teams <= std::min<int64_t>(threads, shape.B); ++teams) {
    const Plan plan{teams, static_cast<int>(std::min<int64_t>({threads / teams, shape.blocks, kMaxParts}))};
    const double ns =
        step_ns(shape, plan) * static_cast<double>(shape.T) + kForkNs + kMeetNsEach * plan.teams * plan.parts;
    if (ns < best_ns) {
      best = plan;
      best_ns = ns;
    }
  }
  return best;
}

}  // namespace fastrnn
