// Number types and activations on a device. Storage S is what tensors hold; arithmetic is in Acc<S>.
#pragma once
#include <cmath>
#include <type_traits>

#include "cuda/device.cuh"

namespace fastrnn {

template <class S>
using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
__device__ __forceinline__ Acc<S> load(S v) {
  if constexpr (std::is_same_v<S, double>)
    return v;
  else
    return dev::to_float(v);
}
template <class S>
__device__ __forceinline__ S store(Acc<S> v) {
  if constexpr (std::is_same_v<S, double>)
    return v;
  else
    return dev::from_float<S>(v);
}

/// The library's functions: for float64.
struct ExactMath {
  __device__ __forceinline__ static double sigmoid(double v) { return 1 / (1 + ::exp(-v)); }
  __device__ __forceinline__ static double tanh(double v) { return ::tanh(v); }
  __device__ __forceinline__ static double exp(double v) { return ::exp(v); }
  __device__ __forceinline__ static double log_sigmoid(double v) {
    return fmin(v, 0.) - log1p(::exp(-fabs(v)));
  }
};

/// Activations without a branch or a division, from e^v = 2^(v log2 e). With kClose within 4 ulp of float32,
/// without it, for 16-bit results, within about 1e-6 of the value. Where 2^v overflows, the quotient is 0,
/// the right limit.
template <bool kClose>
struct FloatMath {
  __device__ __forceinline__ static float sigmoid(float v) { return dev::reciprocal(1.f + exp(-v)); }
  __device__ __forceinline__ static float tanh(float v) {
    const float quotient = 1.f - 2.f * dev::reciprocal(1.f + exp(2.f * v));
    // Near zero the quotient has lost its digits to 1: a polynomial in v^2, within 1 ulp up to |v| = 0.6
    // (fitted by least squares of the relative error).
    const float s = v * v;
    float series = fmaf(-0.00589511f, s, 0.0207959f);
    series = fmaf(series, s, -0.0537838f);
    series = fmaf(series, s, 0.133319244f);
    series = fmaf(series, s, -0.333332986f);
    series = fmaf(series * s, v, v);
    return s < 0.36f ? series : quotient;
  }

  __device__ __forceinline__ static float log_sigmoid(float v) {
    return fminf(v, 0.f) - log1pf(exp(-fabsf(v)));
  }
  __device__ __forceinline__ static float exp(float v) {
    constexpr float kLog2E = 1.44269504f, kRest = 1.92596299e-8f;  // log2(e) - kLog2E
    const float high = v * kLog2E;
    const float power = dev::exp2_fast(high);
    if (!kClose) return power;
    const float low = fmaf(v, kRest, fmaf(v, kLog2E, -high));  // what `high` was rounded by
    const float close = fmaf(power, low * 0.693147181f, power);
    return fabsf(high) < 128 ? close : power;  // beyond it the correction overflows to NaN
  }
};

template <class S>
using MathOf = std::conditional_t<std::is_same_v<S, double>, ExactMath, FloatMath<std::is_same_v<S, float>>>;

}  // namespace fastrnn
