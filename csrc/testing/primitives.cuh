// Kernels that use what kernels may use, each in the smallest way that tells right from wrong.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"

namespace fastrnn::testing {

/// Numbers its threads: out [blocks, threads, 6] = threadIdx, blockIdx.
static __global__ void number_threads(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned* mine = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 6;
  mine[0] = threadIdx.x, mine[1] = threadIdx.y, mine[2] = threadIdx.z;
  mine[3] = blockIdx.x, mine[4] = blockIdx.y, mine[5] = blockIdx.z;
}

/// y[i] = x[i ^ lane_mask], inside each warp.
static __global__ void exchange_lanes(const float* x, float* y, int lane_mask) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = __shfl_xor_sync(~0u, x[i], lane_mask);
}

/// One warp: d [16, 8] += a [16, K] b [K, 8], K = 16, or 8 where T is float (tf32); a and d column by column,
/// b row by row. Who has which element is taken from CuTe (mma_traits_sm80.hpp), whose layouts are pairs
/// shape:stride over these very arrays, and not from the PTX manual as in cuda_on_host.cpp.
template <class T>
__global__ void multiply_tile(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), q = lane % 4, g = lane / 4;
  uint32_t a_words[4] = {}, b_words[2] = {};
  float sums[4];
  for (int v = 0; v < 4; ++v) sums[v] = d[q * 32 + g + v % 2 * 16 + v / 2 * 8];
  if constexpr (std::is_same_v<T, float>) {
    for (int v = 0; v < 4; ++v) a_words[v] = dev::bits(dev::to_tf32(a[q * 16 + g + v % 2 * 8 + v / 2 * 64]));
    for (int v = 0; v < 2; ++v) b_words[v] = dev::bits(dev::to_tf32(b[q * 8 + g + v * 32]));
    dev::mma_tf32(sums, a_words, b_words);
  } else {
    for (int v = 0; v < 8; ++v) {
      // mutant: tile-words-exchanged
      const float element = a[q * 32 + g + v % 2 * 16 + v / 2 % 2 * 8 + v / 4 * 128];
      a_words[v / 2] |= uint32_t{dev::from_float<T>(element).bits} << 16 * (v % 2);
    }
    for (int v = 0; v < 4; ++v) {
      const float element = b[q * 16 + g + v % 2 * 8 + v / 2 * 64];
      b_words[v / 2] |= uint32_t{dev::from_float<T>(element).bits} << 16 * (v % 2);
    }
    if constexpr (std::is_same_v<T, dev::bf16>)
      dev::mma_bf16(sums, a_words, b_words);
    else
      dev::mma_f16(sums, a_words, b_words);
  }
  for (int v = 0; v < 4; ++v) d[q * 32 + g + v % 2 * 16 + v / 2 * 8] = sums[v];
}

/// y = x rounded to T, or to tf32 where T is float.
template <class T>
__global__ void round_numbers(const float* x, float* y, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  if constexpr (std::is_same_v<T, float>)
    y[i] = dev::to_tf32(x[i]);
  else
    y[i] = dev::to_float(dev::from_float<T>(x[i]));
}

/// Comes back when all blocks have come for the n-th time, n from 1 on.
static __device__ __forceinline__ void meet_grid(uint32_t* counter, int n) {
  __syncthreads();  // mutant: relay-without-barrier, relay-without-barrier-is-a-race
  if (threadIdx.x == 0) {
    dev::add_release(counter, 1);
    dev::wait_until(counter, static_cast<uint32_t>(n) * gridDim.x, n);
  }
  __syncthreads();
}

/// What a persistent scan does with memory. Each thread has a number, and in each step takes some from a
/// thread of its own block, through shared memory, and from four of another block:
///   v[i] = 5 v[i] + v[mirror of i in its block] + sum over k < 4 of (2k + 1) v[j + k], j = (i + 37) % n / 4
///   * 4
/// values [n], exchange [2, n], n = blocks * threads; *counter is 0; shared: [threads].
static __global__ void relay(uint32_t* values, uint32_t* exchange, uint32_t* counter, int steps) {
  const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t* neighbours = dev::shared<uint32_t>(0);
  uint32_t v = values[i];
  for (int t = 0; t < steps; ++t) {
    uint32_t* now = exchange + t % 2 * n;
    now[i] = v;
    neighbours[threadIdx.x] = v;
    meet_grid(counter, t + 1);
    const uint4 far = dev::load_l2(reinterpret_cast<const uint4*>(now) + (i + 37) % n / 4);
    v = 5 * v + neighbours[blockDim.x - 1 - threadIdx.x] + far.x + 3 * far.y + 5 * far.z + 7 * far.w;
    __syncthreads();  // neighbours have been read
  }
  values[i] = v;
}

}  // namespace fastrnn::testing
