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

/// As exact as the library's functions: for float32 and float64.
struct ExactMath {
  template <class V>
  __device__ __forceinline__ static V sigmoid(V v) {
    return 1 / (1 + exp(-v));
  }
  template <class V>
  __device__ __forceinline__ static V tanh(V v) {
    return ::tanh(v);
  }
};

/// Within some 1e-7 of the value: far under the rounding of 16-bit results. Where exp overflows the quotient
/// is 0, as it should be.
struct FastMath {
  __device__ __forceinline__ static float sigmoid(float v) {
    return dev::div_fast(1.f, 1.f + dev::exp_fast(-v));
  }
  __device__ __forceinline__ static float tanh(float v) {
    return 1.f - dev::div_fast(2.f, 1.f + dev::exp_fast(2.f * v));
  }
};

template <class S>
using MathOf = std::conditional_t<sizeof(S) == 2, FastMath, ExactMath>;

}  // namespace fastrnn
