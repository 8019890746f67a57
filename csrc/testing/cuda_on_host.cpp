// Compiled without sanitizers. ThreadSanitizer still sees the C library's calls, malloc and memmove among
// them: from the first switch to the last, nothing here allocates or copies, except to report a failure.
#include "testing/cuda_on_host.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "testing/fiber.h"

namespace fastrnn::testing {
namespace {

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024;
constexpr unsigned kMaxResident =
    132;         // blocks of a cooperative grid: one for each multiprocessor of an H200
constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block, from compute capability 9.0 on
constexpr unsigned kSideBySide = 2;            // resident blocks of a grid that is not cooperative
constexpr size_t kGuardBytes = 128;            // on either side of shared memory
constexpr int kUnset = 0xff;                   // in every byte: NaN in every format

struct Thread;

/// Threads that meet at one place in the code: a block at __syncthreads, a warp at a collective.
struct Group {
  Thread* members;
  unsigned size;
  const char* what = nullptr;  // of those who have arrived
  Place place = {};
  unsigned arrived = 0, exited = 0, meetings = 0;
  char order[2] = {};  // in turn, or who is still on the way out would be ordered after the next to come in
};

struct Warp : Group {
  Operands* operands[kWarpSize];  // of each lane, on its own stack
};

struct FreeMemory {
  void operator()(char* p) const { std::free(p); }
};

struct Block : Group {
  unsigned number;
  uint3 index;
  std::vector<Warp> warps;
  std::unique_ptr<char, FreeMemory> memory;  // guard, shared, guard
  char* shared() const { return memory.get() + kGuardBytes; }
};

struct Thread : Fiber {
  Block* block;
  Warp* warp;
  unsigned number, lane;
  uint3 index;
  bool finished;
  const char* waits_at;  // null while it can run
  Place place;
  const uint32_t* flag;  // only in wait_until
  uint32_t target;
  int64_t step;
};

/// A double-ended queue of fixed capacity.
class Ring {
 public:
  void reset(size_t capacity) { slots_.assign(capacity, nullptr), first_ = count_ = 0; }
  size_t size() const { return count_; }
  void push(Thread* thread) { at(count_++) = thread; }
  Thread* take_first() {
    Thread* thread = at(0);
    first_ = (first_ + 1) % slots_.size();
    --count_;
    return thread;
  }
  Thread* take(size_t i) {
    std::swap(at(i), at(count_ - 1));
    return at(--count_);
  }

 private:
  Thread*& at(size_t i) { return slots_[(first_ + i) % slots_.size()]; }
  std::vector<Thread*> slots_;
  size_t first_ = 0, count_ = 0;
};

/// The launch that runs, and what is kept from one launch to the next: threads with their stacks.
struct Machine {
  Launch launch;
  void (*kernel)(void*) = nullptr;
  void* context = nullptr;
  std::vector<Block> blocks;
  Ring ready, held;
  std::vector<Thread*> waiting;  // in wait_until
  std::mt19937_64 random;
  unsigned victim_block, victim_warp, victim_lane;
  Fiber main;
  Thread* current = nullptr;
  std::string error;
  char begun, done;  // what orders the launching thread and the kernel's

  std::unique_ptr<Thread[]> threads;
  size_t thread_count = 0;
  char* stacks = nullptr;
} machine;

std::string name(const Thread& t) {
  return "block " + std::to_string(t.block->number) + " thread " + std::to_string(t.number);
}
std::string name(Place p) {
  const std::string file = p.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(p.line());
}

// ---- who runs ------------------------------------------------------------------------------------------

void draw_victims() {
  machine.victim_block = machine.random() % machine.launch.grid.size();
  machine.victim_warp = machine.random() % (machine.launch.block.size() / kWarpSize);
  machine.victim_lane = machine.random() % kWarpSize;
}

void make_ready(Thread& t) {
  t.waits_at = nullptr;
  const bool hold = machine.launch.schedule.order == Schedule::Order::kStarve &&
                    (t.block->number == machine.victim_block || t.number / kWarpSize == machine.victim_warp ||
                     t.lane == machine.victim_lane);
  (hold ? machine.held : machine.ready).push(&t);
}

Thread* next_ready() {
  Ring& ready = machine.ready;
  if (!ready.size() && machine.held.size()) {
    std::swap(ready, machine.held);
    draw_victims();
  }
  if (!ready.size()) return nullptr;
  switch (machine.launch.schedule.order) {
    case Schedule::Order::kFifo:
      return ready.take_first();
    case Schedule::Order::kLifo:
      return ready.take(ready.size() - 1);
    default:
      return ready.take(machine.random() % ready.size());
  }
}

/// Makes `next` the thread that kernels see; none: back to the launch.
Fiber& enter(Thread* next) {
  machine.current = next;
  if (!next) return machine.main;
  threadIdx = next->index;
  blockIdx = next->block->index;
  return *next;
}

void let_others_run() {
  Thread* self = machine.current;
  Thread* next = next_ready();
  if (next != self) self->switch_to(enter(next));
}

void wait_at(const char* what, Place place) {
  machine.current->waits_at = what;
  machine.current->place = place;
  let_others_run();
}

[[noreturn]] void end_thread() {
  publish(&machine.done);
  machine.current->leave_for(enter(machine.error.empty() ? next_ready() : nullptr));
}

void exit_group(Group& group) {
  if (group.arrived)
    fail("exits while " + std::to_string(group.arrived) + " threads wait at " + group.what, group.place);
  ++group.exited;
}

void thread_main() {
  Fiber::entered();
  observe(&machine.begun);
  try {
    machine.kernel(machine.context);
  } catch (const std::exception& e) {
    fail(e.what(), {});
  }
  exit_group(*machine.current->warp);
  exit_group(*machine.current->block);
  machine.current->finished = true;
  end_thread();
}

/// Returns when all of the group are here; the last to come calls complete() before anyone goes on.
template <class F>
void meet(Group& group, const char* what, Place place, bool orders_memory, F complete) {
  if (group.exited)
    fail(std::string(what) + ": " + std::to_string(group.exited) + " threads have exited", place);
  if (!group.arrived) {
    group.what = what;
    group.place = place;
  } else if (group.what != what || group.place.line() != place.line() ||
             group.place.column() != place.column()) {
    fail(std::string(what) + ": " + std::to_string(group.arrived) + " threads wait at " + group.what +
             " at " + name(group.place),
         place);
  }
  char* order = &group.order[group.meetings % 2];
  if (orders_memory) publish(order);
  if (++group.arrived < group.size) {
    wait_at(what, place);
  } else {
    complete();
    group.arrived = 0;
    ++group.meetings;
    for (unsigned i = 0; i < group.size; ++i) make_ready(group.members[i]);
    let_others_run();
  }
  if (orders_memory) observe(order);
}

// ---- warps ---------------------------------------------------------------------------------------------

float bf16_at(uint32_t word, int half) { return dev::as_float(half ? word & 0xffff0000 : word << 16); }
float f16_at(uint32_t word, int half) {
  return dev::to_float(dev::f16{static_cast<uint16_t>(word >> 16 * half)});
}
float tf32_at(uint32_t word, int) { return dev::as_float(word); }

/// d [16, 8] += a [16, K] b [K, 8]: where each lane has its elements is in the PTX ISA, "Matrix Fragments for
/// mma.m16n8k8" and "mma.m16n8k16". A word holds K / 8 of them.
template <int K>
void multiply(Operands** lanes, float (*at)(uint32_t word, int i)) {
  constexpr int N = K / 8;
  float a[16][K], b[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < N; ++i) a[g + r % 2 * 8][(q + r / 2 * 4) * N + i] = at(lanes[lane]->a[r], i);
    for (int r = 0; r < 2; ++r)
      for (int i = 0; i < N; ++i) b[(q + r * 4) * N + i][g] = at(lanes[lane]->b[r], i);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r)
      for (int k = 0; k < K; ++k)
        lanes[lane]->d[r] += a[lane / 4 + r / 2 * 8][k] * b[k][lane % 4 * 2 + r % 2];
}

void shuffle(Operands** lanes) {
  uint32_t given[kWarpSize];
  for (unsigned i = 0; i < kWarpSize; ++i) given[i] = lanes[i]->value;
  for (unsigned i = 0; i < kWarpSize; ++i) lanes[i]->value = given[i ^ lanes[i]->lane_mask];
}

}  // namespace

void synchronize_block(Place place) {
  Thread* self = machine.current;
  if (self->warp->arrived)
    fail("__syncthreads: " + std::to_string(self->warp->arrived) + " lanes of this warp wait at " +
             self->warp->what + " at " + name(self->warp->place),
         place);
  meet(*self->block, "__syncthreads", place, true, [] {});
}

void collect(Collective collective, uint32_t mask, Operands& operands, Place place) {
  constexpr const char* kNames[] = {"__syncwarp", "__shfl_xor_sync", "mma_bf16", "mma_f16", "mma_tf32"};
  const char* what = kNames[static_cast<int>(collective)];
  if (mask != ~0u) fail(std::string(what) + ": only whole warps, mask 0xffffffff", place);
  if (collective == Collective::kShuffle && operands.lane_mask >= kWarpSize)
    fail(std::string(what) + ": lane mask " + std::to_string(operands.lane_mask) + " is beyond a warp",
         place);
  if (collective == Collective::kMmaTf32) {
    uint32_t all = operands.b[0] | operands.b[1];
    for (uint32_t word : operands.a) all |= word;
    if (all & 0x1fff) fail("mma_tf32: an operand is not rounded by to_tf32", place);
  }
  Warp& warp = *machine.current->warp;
  warp.operands[machine.current->lane] = &operands;
  meet(warp, what, place, collective == Collective::kSyncWarp, [&] {
    switch (collective) {
      case Collective::kSyncWarp:
        return;
      case Collective::kShuffle:
        return shuffle(warp.operands);
      case Collective::kMmaBf16:
        return multiply<16>(warp.operands, bf16_at);
      case Collective::kMmaF16:
        return multiply<16>(warp.operands, f16_at);
      case Collective::kMmaTf32:
        return multiply<8>(warp.operands, tf32_at);
    }
  });
}

// ---- memory --------------------------------------------------------------------------------------------

void* shared_memory(size_t offset, size_t bytes, Place place) {
  const size_t all = machine.launch.shared_bytes;
  if (offset % 16) fail("shared: offset " + std::to_string(offset) + " is not a multiple of 16", place);
  if (offset > all || (offset == all && bytes > 0) || offset + bytes > all)
    fail("shared: offset " + std::to_string(offset) + " of " + std::to_string(all) + " bytes", place);
  return machine.current->block->shared() + offset;
}

void wait_for_release(const uint32_t* p, uint32_t target, int64_t step, Place place) {
  Thread* self = machine.current;
  self->flag = p;
  self->target = target;
  self->step = step;
  machine.waiting.push_back(self);
  wait_at("wait_until", place);
}

void released(uint32_t* p) {
  for (size_t i = 0; i < machine.waiting.size();) {
    Thread* t = machine.waiting[i];
    if (t->flag == p && static_cast<int32_t>(*p - t->target) >= 0) {
      make_ready(*t);
      machine.waiting[i] = machine.waiting.back();
      machine.waiting.pop_back();
    } else {
      ++i;
    }
  }
  make_ready(*machine.current);
  let_others_run();
}

void fail(const std::string& what, Place place) {
  const Thread& self = *machine.current;
  machine.error = name(self) + (place.line() ? " at " + name(place) : "") + ": " + what;
  end_thread();
}

// ---- launches ------------------------------------------------------------------------------------------

namespace {

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

/// `threads`: block.size() of the machine's.
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
    make_ready(t);
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
    Thread* next = next_ready();
    if (!next) break;
    machine.main.switch_to(enter(next));
  }
  if (machine.error.empty()) machine.error = deadlock(machine.threads.get(), count * size);
  for (unsigned i = 0; i < count && machine.error.empty(); ++i) check_guards(machine.blocks[numbers[i]]);
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
  draw_victims();
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
  machine.blocks.clear();
  if (machine.error.empty()) return;
  // Threads that were left in the middle never come back: nothing may remember what was on their stacks.
  for (size_t i = 0; i < threads; ++i)
    if (!machine.threads[i].finished) machine.threads[i].forget();
  allow_access(machine.stacks, threads * Fiber::kStackBytes);
  throw std::runtime_error(machine.error);
}

}  // namespace fastrnn::testing
