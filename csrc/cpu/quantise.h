// Numbers to 8 bits: rows of x, h and W for the products of int8.h.
#pragma once
#include "cpu/gemm.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

/// f(k, numbers k and on, how many) for a row in registers.
template <class F>
FASTRNN_INLINE void each_register(const float* x, int64_t K, F&& f) {
  constexpr int L = kLanes<float>;
  int64_t k = 0;
  for (; k + L <= K; k += L) f(k, load(x + k), L);
  if (const int rest = static_cast<int>(K - k); rest > 0) f(k, load(x + k, rest), rest);
}

/// What an integer of a row stands for, and how many of it a number is.
struct Scale {
  float scale, inverse;
};

/// The largest magnitude is 127. NaN where a number is NaN or infinite: all products of the row are NaN then.
FASTRNN_INLINE Scale scale_of(const float* x, int64_t K) {
  using Ints = Integers<float>;
  Ints most{};  // the bits of magnitudes are in the order of the magnitudes, and NaN's are the last
  each_register(x, K, [&](int64_t, V<float> v, int) FASTRNN_LAMBDA_INLINE {
    const Ints magnitude = reinterpret_cast<Ints>(v) & INT32_MAX;
    most = magnitude > most ? magnitude : most;
  });
  // 2^-100 at least, because 127 / largest must not overflow: numbers below 2^-108 count as zero.
  constexpr int32_t kLeast = (127 - 100) << 23, kInfinity = 255 << 23;
  int32_t bits = kLeast;
  for (int lane = 0; lane < kLanes<float>; ++lane) bits = max<int32_t>(bits, most[lane]);
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof bits);
  return {bits < kInfinity ? largest / 127 : __builtin_nanf(""), 127 / largest};
}

/// to[k] = x[k] * inverse, rounded to nearest, ties to even, plus zero.
FASTRNN_INLINE void round_row(const float* x, int64_t K, float inverse, int zero, uint8_t* to) {
  each_register(x, K, [&](int64_t k, V<float> v, int count) FASTRNN_LAMBDA_INLINE {
    v *= inverse;
    FASTRNN_KEEP(v);  // rounded here as on processors without a multiply-add
    // 1.5 * 2^23 more, a float32 has the integer in its low bits.
    const auto integers = reinterpret_cast<Integers<float>>(v + 0x1.8p23f) + (zero - 0x4b400000);
    const auto bytes = __builtin_convertvector(integers, typename BytesOf<kLanes<float>>::type);
    __builtin_memcpy(to + k, &bytes, static_cast<size_t>(count));
  });
}

/// A row of A, as int8.h says.
FASTRNN_INLINE void quantise(const float* x, int64_t K, int zero, uint8_t* to) {
  const Scale scale = scale_of(x, K);
  round_row(x, K, scale.inverse, zero, to);
  __builtin_memset(to + K, zero, static_cast<size_t>(int8_depth(K) - K));
  __builtin_memcpy(to + int8_depth(K), &scale.scale, sizeof scale.scale);
}

/// An Int8Panel of rows of W, zeros beyond them.
template <class S>
void pack_transposed(Rows<const S> w, int64_t K, int units, int vectors, Int8* panel) {
  const int zero = int8_products().zero, width = vectors * kLanes<S>;
  __builtin_memset(panel, 0, static_cast<size_t>(int8_panel_depth(K) * width));
  const Int8Panel to(panel, width);
  for (int u = 0; u < units; ++u) {
    const Scale scale = scale_of(w[u], K);
    uint32_t sum = 0;  // start wraps around, and so do the sums that end within an int32
    for (int64_t k = 0; k < K; k += 4) {
      uint8_t bytes[4] = {};
      const int64_t count = min<int64_t>(4, K - k);
      round_row(w[u] + k, count, scale.inverse, 0, bytes);
      for (const uint8_t byte : bytes) sum += static_cast<uint32_t>(static_cast<int8_t>(byte));
      __builtin_memcpy(to.weights + (k / 4 * width + u) * 4, bytes, sizeof bytes);
    }
    to.start[u] = static_cast<int32_t>(0u - static_cast<uint32_t>(zero) * sum), to.scales[u] = scale.scale;
  }
}

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
