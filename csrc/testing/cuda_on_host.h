// Runs CUDA kernels on the CPU, for the tests: every CUDA thread is a fiber, every block of a cooperative
// grid is resident, and one OS thread drives them all in an order that the test chooses. Threads change at
// __syncthreads, warp collectives, wait_until and add_release alone, and a launch repeats exactly.
//
// This header has the CUDA language and cuda/device.cuh for a C++ compiler. What happens to threads is in
// cuda_on_host.cpp, which is never compiled with a sanitizer; kernels may be. Memory is ordered by
// __syncthreads, __syncwarp, load_acquire and add_release, as on the device; shuffles and mma order nothing.
#pragma once
#include <math.h>  // exp, tanh for float, without std::

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;

  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned size() const { return x * y * z; }
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint3 threadIdx, blockIdx;  // of the thread that runs
inline dim3 blockDim, gridDim;

namespace fastrnn::testing {

using Place = std::source_location;

/// Which of the threads that can run is next.
struct Schedule {
  enum class Order {
    kFifo,
    kLifo,
    kRandom,
    kStarve,  // random; a block, a warp and a lane, drawn anew each time, come when no other thread can
  };
  Order order = Order::kFifo;
  uint64_t seed = 0;
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic, of each block
  bool cooperative = false;
  Schedule schedule = {};
};

/// Throws std::runtime_error with the first thing that goes wrong, in the kernel's terms.
void run(const Launch& launch, void (*kernel)(void*), void* context);

/// kernel() is the work of one thread: run(launch, [&] { scan<float>(problem); }).
template <class F>
void run(const Launch& launch, F&& kernel) {
  run(
      launch, [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); },
      const_cast<void*>(static_cast<const void*>(&kernel)));
}

enum class Collective { kSyncWarp, kShuffle, kMmaBf16, kMmaF16, kMmaTf32 };

/// What a lane brings to a collective, and what it gets.
struct Operands {
  uint32_t a[4], b[2];
  float d[4];
  uint32_t value, lane_mask;
};

void synchronize_block(Place place);
void collect(Collective collective, uint32_t mask, Operands& operands, Place place);
void* shared_memory(size_t offset, Place place);
void wait_for_release(const uint32_t* p, uint32_t target, int64_t step, Place place);
void released(uint32_t* p);
[[noreturn]] void fail(const std::string& what, Place place);

}  // namespace fastrnn::testing

#define FASTRNN_PLACE ::fastrnn::testing::Place place = ::fastrnn::testing::Place::current()

inline void __syncthreads(FASTRNN_PLACE) { fastrnn::testing::synchronize_block(place); }

inline void __syncwarp(uint32_t mask = ~0u, FASTRNN_PLACE) {
  fastrnn::testing::Operands operands;
  fastrnn::testing::collect(fastrnn::testing::Collective::kSyncWarp, mask, operands, place);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int lane_mask, FASTRNN_PLACE) {
  static_assert(sizeof(T) == 4);
  fastrnn::testing::Operands operands;
  operands.value = __builtin_bit_cast(uint32_t, v);
  operands.lane_mask = static_cast<uint32_t>(lane_mask);
  fastrnn::testing::collect(fastrnn::testing::Collective::kShuffle, mask, operands, place);
  return __builtin_bit_cast(T, operands.value);
}

namespace fastrnn::dev {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline uint32_t bits(float v) { return __builtin_bit_cast(uint32_t, v); }
inline float as_float(uint32_t v) { return __builtin_bit_cast(float, v); }

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return as_float(uint32_t{v.bits} << 16); }
inline float to_float(f16 v) { return __builtin_bit_cast(_Float16, v.bits); }

/// To the nearest, to even where two are near; the NaN of the device.
template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits(v) + 0x7fff + (bits(v) >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float v) {
  if (v != v) return {0x7fff};
  return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(v))};
}

/// To the nearest with 10 bits of mantissa, away from zero where two are near.
inline float to_tf32(float v) { return v != v ? v : as_float((bits(v) + 0x1000) & ~0x1fffu); }

inline float exp2_fast(float v) { return exp2f(v); }
inline float reciprocal(float v) { return fabsf(v) > 0x1p126f ? copysignf(0, v) : 1 / v; }

inline const char* opaque(const char* p) { return p; }
inline int warp_index() { return int(threadIdx.x) / 32; }

template <class T>
T* shared(size_t offset, FASTRNN_PLACE) {
  return static_cast<T*>(testing::shared_memory(offset, place));
}

inline uint32_t load_acquire(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void add_release(uint32_t* p, uint32_t v) {
  __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
  testing::released(p);
}
inline void wait_until(const uint32_t* p, uint32_t target, int64_t step, FASTRNN_PLACE) {
  while (static_cast<int32_t>(load_acquire(p) - target) < 0)
    testing::wait_for_release(p, target, step, place);
}
[[noreturn]] inline void trap(const char* message, FASTRNN_PLACE) { testing::fail(message, place); }

template <class V>
V load_l2(const V* p, FASTRNN_PLACE) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) testing::fail("load_l2: misaligned address", place);
  return *p;
}

#define FASTRNN_MMA(NAME, COLLECTIVE)                                                                   \
  inline void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTRNN_PLACE) {      \
    testing::Operands operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}, 0, 0}; \
    testing::collect(testing::Collective::COLLECTIVE, ~0u, operands, place);                            \
    for (int i = 0; i < 4; ++i) d[i] = operands.d[i];                                                   \
  }
FASTRNN_MMA(mma_bf16, kMmaBf16)
FASTRNN_MMA(mma_f16, kMmaF16)
FASTRNN_MMA(mma_tf32, kMmaTf32)
#undef FASTRNN_MMA

}  // namespace fastrnn::dev
#undef FASTRNN_PLACE
