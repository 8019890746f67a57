// The machine that kernels run on: threads in warps in blocks, and which of them is next.
#pragma once
#include <bit>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "testing/cuda_on_host.h"
#include "testing/fiber.h"

namespace fastrnn::testing {

constexpr unsigned kWarpSize = 32;
constexpr size_t kGuardBytes = 128;  // on either side of shared memory

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
  void reset(size_t capacity) { slots_.assign(std::bit_ceil(capacity), nullptr), first_ = count_ = 0; }
  size_t size() const { return count_; }
  void push(Thread* thread) { at(count_++) = thread; }
  Thread* take_first() {
    --count_;
    return slots_[first_++ & (slots_.size() - 1)];
  }
  Thread* take(size_t i) {
    std::swap(at(i), at(count_ - 1));
    return at(--count_);
  }

 private:
  Thread*& at(size_t i) { return slots_[(first_ + i) & (slots_.size() - 1)]; }

  std::vector<Thread*> slots_;
  size_t first_ = 0, count_ = 0;
};

/// The launch that runs, and what is kept from one launch to the next: threads with their stacks.
struct Machine {
  Launch launch;
  void (*kernel)(void*) = nullptr;
  void* context = nullptr;
  std::vector<Block> blocks;
  Ring ready, held;  // held: those that a schedule starves
  std::vector<Thread*> waiting;  // in wait_until
  std::mt19937_64 random;
  unsigned victim_block, victim_warp, victim_lane;
  Fiber main;  // that which has launched
  Thread* current = nullptr;
  std::string error;  // ends the launch
  char begun, done;  // what orders memory between main and the threads

  std::unique_ptr<Thread[]> threads;
  size_t thread_count = 0;
  char* stacks = nullptr;

  void draw_victims();
  void make_ready(Thread& thread);
  Thread* next_ready();
  /// Makes `next` the thread that kernels see; null: back to main.
  Fiber& enter(Thread* next);
};
extern Machine machine;

/// What a fiber of a thread runs.
void thread_main();

std::string name(const Thread& thread);
std::string name(Place place);

}  // namespace fastrnn::testing
