// From a launch to its result: blocks are made, run and checked. Compiled without sanitizers.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <numeric>
#include <stdexcept>

#include "testing/machine.h"

namespace fastrnn::testing {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxResident = 132;         // blocks of a cooperative grid: an H200's multiprocessors
constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block, from compute capability 9.0 on
constexpr unsigned kSideBySide = 2;            // resident blocks of a grid that is not cooperative
constexpr int kUnset = 0xff;                   // in every byte: NaN in every format

uint3 index_of(unsigned i, const dim3& of) { return {i % of.x, i / of.x % of.y, i / of.x / of.y}; }

void check(const Launch& launch) {
  const auto require = [](bool met, const std::string& what) {
    if (!met) throw std::runtime_error("launch: " + what);
  };
  const unsigned threads = launch.block.size(), blocks = launch.grid.size();
  require(threads > 0 && threads <= kMaxThreads && threads % kWarpSize == 0,
          "a block must have whole warps, at most 1024 threads, got " + std::to_string(threads));
  require(blocks > 0, "the grid has no blocks");
  require(!launch.cooperative || blocks <= kMaxResident,
          "a cooperative grid must be resident, 132 blocks at most, got " + std::to_string(blocks));
  require(launch.shared_bytes <= kMaxSharedBytes,
          "a block may have 232448 bytes of shared memory, got " + std::to_string(launch.shared_bytes));
}

void reserve_threads(size_t count) {
  if (count <= machine.thread_count) return;
  for (size_t i = 0; i < machine.thread_count; ++i) machine.threads[i].forget();
  if (machine.stacks) munmap(machine.stacks, machine.thread_count * Fiber::kStackBytes);
  machine.thread_count = 0;
  void* stacks = mmap(nullptr, count * Fiber::kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  machine.stacks = stacks == MAP_FAILED ? nullptr : static_cast<char*>(stacks);
  if (!machine.stacks) throw std::runtime_error("launch: no memory for " + std::to_string(count) + " stacks");
  // An overflow is to crash at once. Beyond some 30,000 stacks the system refuses, and they go unguarded.
  for (size_t i = 0; i < count; ++i) mprotect(machine.stacks + i * Fiber::kStackBytes, 4096, PROT_NONE);
  machine.threads = std::make_unique<Thread[]>(count);
  machine.thread_count = count;
}

/// On the machine's threads from first_thread on.
void start_block(unsigned number, size_t first_thread) {
  const Launch& launch = machine.launch;
  const unsigned size = launch.block.size();
  Thread* threads = &machine.threads[first_thread];
  Block& block = machine.blocks[number];
  static_cast<Group&>(block) = Group{threads, size};
  block.number = number;
  block.index = index_of(number, launch.grid);
  block.warps.resize(size / kWarpSize);
  for (size_t i = 0; i < block.warps.size(); ++i)
    static_cast<Group&>(block.warps[i]) = Group{threads + i * kWarpSize, kWarpSize};
  const size_t bytes = launch.shared_bytes + 2 * kGuardBytes;
  void* memory = nullptr;
  if (posix_memalign(&memory, kGuardBytes, bytes)) throw std::bad_alloc();
  std::memset(memory, kUnset, bytes);
  block.memory.reset(static_cast<char*>(memory));
  forbid_access(block.shared() - kGuardBytes, kGuardBytes);
  forbid_access(block.shared() + launch.shared_bytes, kGuardBytes);
  for (unsigned i = 0; i < size; ++i) {
    Thread& t = threads[i];
    t.block = &block;
    t.warp = &block.warps[i / kWarpSize];
    t.number = i;
    t.lane = i % kWarpSize;
    t.index = index_of(i, launch.block);
    t.finished = false;
    t.prepare(machine.stacks + (first_thread + i) * Fiber::kStackBytes, thread_main, first_thread + i);
    machine.make_ready(t);
  }
}

/// Who waits for what, when nobody can run.
std::string deadlock(const Thread* threads, size_t count) {
  struct Waiting {
    const Thread* first;
    size_t threads;
  };
  std::map<std::string, Waiting> places;
  for (const Thread* t = threads; t < threads + count; ++t) {
    if (t->finished) continue;
    std::string place = std::string(t->waits_at) + " at " + name(t->place);
    if (std::strcmp(t->waits_at, "wait_until") == 0)
      place += " in step " + std::to_string(t->step) + " for a counter to reach " +
               std::to_string(t->target) + ", which is " + std::to_string(*t->flag) +
               (static_cast<int32_t>(*t->flag - t->target) >= 0 ? " by a plain store" : "");
    ++places.try_emplace(place, Waiting{t, 0}).first->second.threads;
  }
  if (places.empty()) return "";
  std::string report = "deadlock:";
  for (const auto& [place, waiting] : places)
    report += "\n  " + name(*waiting.first) +
              (waiting.threads > 1 ? " and " + std::to_string(waiting.threads - 1) + " more" : "") + " in " +
              place;
  return report;
}

void check_guards(const Block& block) {
  const size_t bytes = machine.launch.shared_bytes;
  if (forbid_access(block.shared() + bytes, kGuardBytes)) return;  // checked at every access
  const auto intact = [](const char* guard) {
    return std::all_of(guard, guard + kGuardBytes, [](char c) { return c == static_cast<char>(kUnset); });
  };
  if (!intact(block.shared() - kGuardBytes) || !intact(block.shared() + bytes))
    machine.error = "block " + std::to_string(block.number) + " wrote outside its " + std::to_string(bytes) +
                    " bytes of shared memory";
}

/// The blocks that are resident at the same time, from start to end.
void run_together(const unsigned* numbers, unsigned count) {
  const unsigned size = machine.launch.block.size();
  for (unsigned i = 0; i < count; ++i) start_block(numbers[i], i * size);
  publish(&machine.begun);
  while (machine.error.empty()) {
    Thread* next = machine.next_ready();
    if (!next) break;
    machine.main.switch_to(machine.enter(next));
  }
  if (machine.error.empty()) machine.error = deadlock(machine.threads.get(), count * size);
  for (unsigned i = 0; i < count && machine.error.empty(); ++i) check_guards(machine.blocks[numbers[i]]);
}

/// Threads that were left in the middle never come back: nothing may remember what was on their stacks.
void abandon(size_t threads) {
  for (size_t i = 0; i < threads; ++i)
    if (!machine.threads[i].finished) machine.threads[i].forget();
  allow_access(machine.stacks, threads * Fiber::kStackBytes);
}

std::vector<unsigned> order_of_blocks() {
  std::vector<unsigned> order(machine.launch.grid.size());
  std::iota(order.begin(), order.end(), 0);
  if (machine.launch.schedule.order == Schedule::Order::kLifo) std::reverse(order.begin(), order.end());
  if (machine.launch.schedule.order >= Schedule::Order::kRandom)
    std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

}  // namespace

void run(const Launch& launch, void (*kernel)(void*), void* context) {
  check(launch);
  machine.launch = launch;
  machine.kernel = kernel;
  machine.context = context;
  machine.random.seed(launch.schedule.seed);
  machine.error.clear();
  machine.main.adopt();
  blockDim = launch.block;
  gridDim = launch.grid;
  machine.draw_victims();
  const unsigned blocks = launch.grid.size();
  const unsigned together = launch.cooperative ? blocks : std::min(blocks, kSideBySide);
  const size_t threads = size_t{together} * launch.block.size();
  reserve_threads(threads);
  machine.ready.reset(threads);
  machine.held.reset(threads);
  machine.waiting.clear();
  machine.waiting.reserve(threads);
  machine.blocks.clear();
  machine.blocks.resize(blocks);
  const std::vector<unsigned> order = order_of_blocks();
  for (unsigned i = 0; i < blocks && machine.error.empty(); i += together)
    run_together(&order[i], std::min(together, blocks - i));
  observe(&machine.done);
  if (!machine.error.empty()) abandon(threads);
  machine.blocks.clear();
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
}

}  // namespace fastrnn::testing
