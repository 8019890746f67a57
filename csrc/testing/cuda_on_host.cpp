// What kernels call. Compiled without sanitizers; ThreadSanitizer still sees the C library's calls, malloc
// and memmove among them: nothing here allocates or copies, except to report a failure.
#include "testing/cuda_on_host.h"

#include <exception>

#include "testing/machine.h"

namespace fastrnn::testing {

Machine machine;

std::string name(const Thread& t) {
  return "block " + std::to_string(t.block->number) + " thread " + std::to_string(t.number);
}
std::string name(Place p) {
  const std::string file = p.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(p.line());
}

// ---- who runs ------------------------------------------------------------------------------------------

void Machine::draw_victims() {
  victim_block = random() % launch.grid.size();
  victim_warp = random() % (launch.block.size() / kWarpSize);
  victim_lane = random() % kWarpSize;
}

void Machine::make_ready(Thread& t) {
  t.waits_at = nullptr;
  const bool hold =
      launch.schedule.order == Schedule::Order::kStarve &&
      (t.block->number == victim_block || t.number / kWarpSize == victim_warp || t.lane == victim_lane);
  (hold ? held : ready).push(&t);
}

Thread* Machine::next_ready() {
  if (!ready.size() && held.size()) {
    std::swap(ready, held);
    draw_victims();
  }
  if (!ready.size()) return nullptr;
  switch (launch.schedule.order) {
    case Schedule::Order::kFifo:
      return ready.take_first();
    case Schedule::Order::kLifo:
      return ready.take(ready.size() - 1);
    default:
      return ready.take(random() % ready.size());
  }
}

Fiber& Machine::enter(Thread* next) {
  current = next;
  if (!next) return main;
  threadIdx = next->index;
  blockIdx = next->block->index;
  return *next;
}

namespace {

void let_others_run() {
  Thread* self = machine.current;
  Thread* next = machine.next_ready();
  if (next != self) self->switch_to(machine.enter(next));
}

void wait_at(const char* what, Place place) {
  machine.current->waits_at = what;
  machine.current->place = place;
  let_others_run();
}

[[noreturn]] void end_thread() {
  publish(&machine.done);
  machine.current->leave_for(machine.enter(machine.error.empty() ? machine.next_ready() : nullptr));
}

void exit_group(Group& group) {
  if (group.arrived)
    fail("exits while " + std::to_string(group.arrived) + " threads wait at " + group.what, group.place);
  ++group.exited;
}

}  // namespace

void thread_main() {
  Fiber::entered();
  observe(&machine.begun);
  std::string thrown;
  try {
    machine.kernel(machine.context);
  } catch (const std::exception& e) {
    thrown = e.what();
  }
  if (!thrown.empty()) fail(thrown, {});
  exit_group(*machine.current->warp);
  exit_group(*machine.current->block);
  machine.current->finished = true;
  end_thread();
}

namespace {

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
    for (unsigned i = 0; i < group.size; ++i) machine.make_ready(group.members[i]);
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
template <int K, float (*at)(uint32_t word, int i)>
void multiply(Operands** lanes) {
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
        return multiply<16, bf16_at>(warp.operands);
      case Collective::kMmaF16:
        return multiply<16, f16_at>(warp.operands);
      case Collective::kMmaTf32:
        return multiply<8, tf32_at>(warp.operands);
    }
  });
}

// ---- memory --------------------------------------------------------------------------------------------

void* shared_memory(size_t offset, Place place) {
  const size_t all = machine.launch.shared_bytes;
  if (offset % 16) fail("shared: offset " + std::to_string(offset) + " is not a multiple of 16", place);
  if (offset > all)
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
      machine.make_ready(*t);
      machine.waiting[i] = machine.waiting.back();
      machine.waiting.pop_back();
    } else {
      ++i;
    }
  }
  machine.make_ready(*machine.current);
  let_others_run();
}

void fail(const std::string& what, Place place) {
  const Thread& self = *machine.current;
  machine.error = name(self) + (place.line() ? " at " + name(place) : "") + ": " + what;
  end_thread();
}

}  // namespace fastrnn::testing
