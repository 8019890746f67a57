// What a kernel may ask of the device beyond the CUDA language: the only file with PTX. Compiled by a C++
// compiler, the same names run on the CPU in the tests (testing/cuda_on_host.h).
//
// The contract that lets a kernel run in both places: shared memory through dev::shared alone; waiting on
// another block through dev::wait_until alone; every thread of a block reaches each __syncthreads at one
// place in the code, and every lane of a warp each warp operation.
#pragma once
#ifndef __CUDACC__
#include "testing/cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>

namespace fastrnn::dev {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(__ushort_as_half(v.bits)); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}

__device__ __forceinline__ float to_tf32(float v) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(v));
  return __uint_as_float(rounded);
}
__device__ __forceinline__ uint32_t bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ float as_float(uint32_t v) { return __uint_as_float(v); }
/// 2^v within 2 ulp.
__device__ __forceinline__ float exp2_fast(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
}
/// 1 / v within 1 ulp; 0 beyond 2^126.
__device__ __forceinline__ float reciprocal(float v) {
  float quotient;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(v));
  return quotient;
}

/// Hides the pointer's origin, so that the compiler derives nearby addresses from it with one add each
/// instead of computing every address from the base.
__device__ __forceinline__ const char* opaque(const char* p) {
  asm("" : "+l"(p));
  return p;
}

/// The number of this warp in its block, known to the compiler to be the same in all lanes.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, int(threadIdx.x) / 32, 0); }

/// Dynamic shared memory of the block, from a byte offset that is a multiple of 16.
template <class T>
__device__ __forceinline__ T* shared(size_t offset) {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory + offset);
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void add_release(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

/// Ends the kernel with an error instead of letting it hang.
__device__ __noinline__ inline void give_up(int64_t step) {
  printf("fastrnn: block %u waited in vain for the other blocks at step %lld\n", blockIdx.x,
         static_cast<long long>(step));
  __trap();
}

/// Waits until *p has counted up to target. A round takes about 0.5 us, so the bound is about 20 seconds.
__device__ __forceinline__ void wait_until(const uint32_t* p, uint32_t target, int64_t step) {
  constexpr int kBound = 1 << 25;
  for (int round = 0; static_cast<int32_t>(load_acquire(p) - target) < 0; ++round)
    if (round == kBound) give_up(step);
}

/// A load past the L1 cache, which other blocks' stores do not reach.
__device__ __forceinline__ uint4 load_l2(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// d [16, 8] += a [16, K] b [K, 8], K = 16 for 16-bit numbers, 8 for tf32. Lane l holds, with g = l / 4 and q
// = l % 4 and in words of 32 bits: a: rows g, g+8 of word q, then of word q+4; b: words q, q+4 of column g;
// d: row g of columns 2q, 2q+1, then row g+8 (PTX ISA, "Matrix fragments for mma").
#define FASTRNN_MMA(NAME, SHAPE)                                                                        \
  __device__ __forceinline__ void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"              \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                            \
  }
FASTRNN_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTRNN_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
FASTRNN_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTRNN_MMA

}  // namespace fastrnn::dev
#endif
