#include "testing/primitives.h"

#include <map>
#include <stdexcept>

#include "testing/primitives.cuh"

namespace fastrnn::testing {

std::string sanitizer() {
#if defined(__SANITIZE_ADDRESS__)
  return "address";
#elif defined(__SANITIZE_THREAD__)
  return "thread";
#else
  return "";
#endif
}

void number_threads(const Launch& launch, unsigned* out) {
  run(launch, [&] { number_threads(out); });
}

void exchange_lanes(const float* x, float* y, unsigned blocks, unsigned threads, int lane_mask,
                    Schedule schedule) {
  run({blocks, threads, 0, false, schedule}, [&] { exchange_lanes(x, y, lane_mask); });
}

namespace {
template <class F>
void with_type(const std::string& type, F&& f) {
  if (type == "bf16") return f(dev::bf16{});
  if (type == "f16") return f(dev::f16{});
  if (type == "tf32") return f(float{});
  throw std::invalid_argument("type must be bf16, f16 or tf32, got " + type);
}
}  // namespace

void multiply_tile(const std::string& type, const float* a, const float* b, float* d, Schedule schedule) {
  with_type(type, [&](auto zero) {
    run({1, 32, 0, false, schedule}, [&] { multiply_tile<decltype(zero)>(a, b, d); });
  });
}

void round_numbers(const std::string& type, const float* x, float* y, int count) {
  with_type(type, [&](auto zero) {
    run({static_cast<unsigned>(count + 255) / 256, 256}, [&] { round_numbers<decltype(zero)>(x, y, count); });
  });
}

void relay(uint32_t* values, unsigned blocks, unsigned threads, int steps, bool cooperative,
           Schedule schedule) {
  std::vector<uint32_t> exchange(size_t{2} * blocks * threads + 3);
  uint32_t counter = 0;
  auto* aligned = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(exchange.data()) + 15) / 16 * 16);
  run({blocks, threads, threads * sizeof(uint32_t), cooperative, schedule},
      [&] { relay(values, aligned, &counter, steps); });
}

float unset_memory() {
  float found = 0;
  run({1, 32, 4}, [&] {
    if (threadIdx.x == 0) found = *dev::shared<float>(0);
  });
  return found;
}

namespace {

constexpr unsigned kThreads = 64;  // of each of two blocks
struct Fault {
  bool cooperative;
  void (*kernel)(uint32_t* counter, float* global);  // *counter is 0, global [kThreads]
};

const std::map<std::string, Fault> kFaults = {
    {"barrier at two places",
     {true,
      [](uint32_t*, float*) {
        if (threadIdx.x < 32)
          __syncthreads();
        else
          __syncthreads();
      }}},
    {"exit before a barrier",
     {true,
      [](uint32_t*, float*) {
        if (blockIdx.x == 1 && threadIdx.x == 60) return;
        __syncthreads();
      }}},
    {"barrier in half a warp",
     {true,
      [](uint32_t*, float*) {
        if (threadIdx.x < 16) __syncthreads();
        __syncwarp();
      }}},
    {"shuffle with missing lanes",
     {true,
      [](uint32_t*, float*) {
        if (threadIdx.x % 32 < 8) __shfl_xor_sync(~0u, 1, 1);
        __syncthreads();
      }}},
    {"shuffle of half a warp", {true, [](uint32_t*, float*) { __shfl_xor_sync(0xffffu, 1, 1); }}},
    {"nobody counts",
     {true,
      [](uint32_t* counter, float*) {
        if (blockIdx.x == 1 && threadIdx.x == 3) dev::wait_until(counter, 1, 17);
      }}},
    {"counts by a plain store",
     {true,
      [](uint32_t* counter, float*) {
        if (threadIdx.x == 0 && blockIdx.x == 0) dev::wait_until(counter, 1, 17);
        if (threadIdx.x == 0 && blockIdx.x == 1) *counter = 1;
      }}},
    {"shared memory overrun", {false, [](uint32_t*, float*) { dev::shared<float>(0)[threadIdx.x + 1] = 1; }}},
    {"misaligned shared memory", {false, [](uint32_t*, float*) { dev::shared<float>(4); }}},
    {"shared memory beyond its end", {false, [](uint32_t*, float*) { dev::shared<float>(272); }}},
    {"misaligned load",
     {false, [](uint32_t*, float* global) { dev::load_l2(reinterpret_cast<const uint4*>(global + 2)); }}},
    {"operand not rounded",
     {false,
      [](uint32_t*, float*) {
        float d[4] = {};
        dev::mma_tf32(d, {dev::bits(0.1f), 0, 0, 0}, {0, 0});
      }}},
    {"trap", {false, [](uint32_t*, float*) { dev::trap("no way"); }}},
    // Only a sanitizer sees these.
    {"read past the end",
     {false, [](uint32_t*, float* global) { global[0] = global[kThreads + blockIdx.x]; }}},
    {"race in a block",
     {false,
      [](uint32_t*, float* global) {
        float* shared = dev::shared<float>(0);
        shared[threadIdx.x] = 1;
        __shfl_xor_sync(~0u, 1, 1);  // a meeting, but no order
        if (blockIdx.x == 0) global[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
      }}},
    {"counts before it has written",
     {true,
      [](uint32_t* counter, float* global) {
        if (threadIdx.x != 0) return;
        if (blockIdx.x == 0) {
          dev::add_release(counter, 1);
          global[0] = 1;
        } else {
          dev::wait_until(counter, 1, 0);
          global[1] = global[0];
        }
      }}},
    {"counts without order",
     {true,
      [](uint32_t* counter, float* global) {
        if (threadIdx.x != 0) return;
        if (blockIdx.x == 0) {
          global[0] = 1;
          __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
          released(counter);
        } else {
          dev::wait_until(counter, 1, 0);
          global[1] = global[0];
        }
      }}},
};

}  // namespace

void commit(const std::string& fault, Schedule schedule) {
  const Fault& f = kFaults.at(fault);
  std::vector<float> global(kThreads);
  uint32_t counter = 0;
  run({2, kThreads, kThreads * sizeof(float), f.cooperative, schedule},
      [&] { f.kernel(&counter, global.data()); });
}

std::vector<std::string> faults() {
  std::vector<std::string> names;
  for (const auto& [name, fault] : kFaults) names.push_back(name);
  return names;
}

}  // namespace fastrnn::testing
