// A CPU register as a value: V<S> holds kLanes<S> numbers of type S and has the compiler's own operators.
// Compiled once per instruction set, inside its namespace, at that set's width.
#pragma once
#include <cstdint>

#include "common/problem.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTRNN_LAMBDA_INLINE __attribute__((always_inline))

// An empty instruction that has x in a register before and after it.
#if defined(__aarch64__)
#define FASTRNN_KEEP(x) asm("" : "+w"(x))
#else
#define FASTRNN_KEEP(x) asm("" : "+v"(x))
#endif

namespace fastrnn::FASTRNN_ISA {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class S>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));

template <class S>
struct VectorOf {
  typedef S type __attribute__((vector_size(kVectorBytes)));
};
/// Rounded when it is stored.
template <>
struct VectorOf<Bfloat16> : VectorOf<float> {};
template <class S>
using V = typename VectorOf<S>::type;

template <class S>
struct IntegerLike {
  using type = int32_t;
};
template <>
struct IntegerLike<double> {
  using type = int64_t;
};
template <class S>
using Integers = V<typename IntegerLike<S>::type>;

template <class S>
FASTRNN_INLINE V<S> broadcast(S x) {
  return x - V<S>{};
}

template <class S>
FASTRNN_INLINE V<S> load(const S* p) {
  V<S> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class S>
FASTRNN_INLINE void store(S* p, V<S> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first `count` lanes, 0 < count < kLanes; the others read as zero and are not written.
#if defined(__AVX512F__)
FASTRNN_INLINE __mmask16 lane_mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }
FASTRNN_INLINE V<float> load(const float* p, int count) { return _mm512_maskz_loadu_ps(lane_mask(count), p); }
FASTRNN_INLINE V<double> load(const double* p, int count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(lane_mask(count)), p);
}
FASTRNN_INLINE void store(float* p, V<float> v, int count) { _mm512_mask_storeu_ps(p, lane_mask(count), v); }
FASTRNN_INLINE void store(double* p, V<double> v, int count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lane_mask(count)), v);
}
#elif defined(__AVX2__)
FASTRNN_INLINE __m256i lane_mask(const float*, int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTRNN_INLINE __m256i lane_mask(const double*, int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
FASTRNN_INLINE V<float> load(const float* p, int count) { return _mm256_maskload_ps(p, lane_mask(p, count)); }
FASTRNN_INLINE V<double> load(const double* p, int count) {
  return _mm256_maskload_pd(p, lane_mask(p, count));
}
FASTRNN_INLINE void store(float* p, V<float> v, int count) { _mm256_maskstore_ps(p, lane_mask(p, count), v); }
FASTRNN_INLINE void store(double* p, V<double> v, int count) {
  _mm256_maskstore_pd(p, lane_mask(p, count), v);
}
#else
template <class S>
FASTRNN_INLINE V<S> load(const S* p, int count) {
  V<S> v{};
  for (int lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
}
template <class S>
FASTRNN_INLINE void store(S* p, V<S> v, int count) {
  for (int lane = 0; lane < count; ++lane) p[lane] = v[lane];
}
#endif

template <int kBytes>
struct BytesOf {
  typedef signed char type __attribute__((vector_size(kBytes)));
};

/// All bits of the first `count` lanes whose flag is set.
template <class S>
FASTRNN_INLINE Integers<S> flags(const bool* p, int count) {
  typename BytesOf<kLanes<S>>::type bytes{};
  __builtin_memcpy(&bytes, p, count);
  return __builtin_convertvector(bytes, Integers<S>) != 0;
}

template <class T>
FASTRNN_INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FASTRNN_INLINE T max(T a, T b) {
  return a < b ? b : a;
}

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
