// sigmoid, tanh, exp and log(sigmoid) on vectors, from one expm1. The error is at most 2.5 ulp (sigmoid), 3.2
// ulp (tanh), 1.2 ulp (exp) and 3.5 ulp (log sigmoid) over the whole range (tests/accuracy.py); exact at 0
// but for log sigmoid, exact at +-inf, and a NaN stays a NaN.
#pragma once
#include "cpu/vector.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// exp(x) = 2^n (1 + r q(r)), n = round(x / ln 2), |r| <= ln 2 / 2. q is the minimax polynomial of
// expm1(r) / r (mpmath.chebyfit); its relative error is given below.
template <class S>
struct Exponential;

template <>
struct Exponential<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.428606765330187e-6f;
  static constexpr float kOverflow = 104.0f;  // beyond it exp is inf, and exp(-x) is 0
  static constexpr float kTanhOne = 10.0f;  // beyond it tanh is 1
  // 1.1e-8
  static constexpr float kPolynomial[] = {1.0f,
                                          0.500000001353873f,
                                          0.166665046130326f,
                                          0.0416664641974057f,
                                          0.00836922029180361f,
                                          0.00139337307157921f};
};

template <>
struct Exponential<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kOverflow = 746.0;
  static constexpr double kTanhOne = 20.0;
  // 1.8e-17
  static constexpr double kPolynomial[] = {1.0,
                                           0.500000000000000567,
                                           0.16666666666666671,
                                           0.0416666666665723915,
                                           0.00833333333332608312,
                                           0.00138888889327510003,
                                           0.000198412698750022788,
                                           0.0000248015040144269051,
                                           2.75572551700008874e-6,
                                           2.76264954465321963e-7,
                                           2.51053127296221018e-8};
};

template <class S>
struct Reduced {
  V<S> p;  // r q(r) = expm1(r)
  Integers<S> n;
};

template <class S>
FASTRNN_INLINE Reduced<S> reduce(V<S> x) {
  using E = Exponential<S>;
  const V<S> shifted = x * static_cast<S>(1.44269504088896340736) + E::kRound;
  const V<S> n = shifted - E::kRound;
  const V<S> r = (x - n * E::kLn2High) - n * E::kLn2Low;
  constexpr int kDegree = sizeof(E::kPolynomial) / sizeof(S) - 1;
  V<S> q = broadcast(E::kPolynomial[kDegree]);
  for (int i = kDegree - 1; i >= 0; --i) q = q * r + E::kPolynomial[i];
  // The low bits of `shifted` are n; those of kRound are zero.
  const V<S> round = broadcast(E::kRound);
  Integers<S> bits, zero;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  __builtin_memcpy(&zero, &round, sizeof zero);
  return {r * q, bits - zero};
}

// 2^n for an n in the normal range.
template <class S>
FASTRNN_INLINE V<S> power_of_two(Integers<S> n) {
  using E = Exponential<S>;
  const Integers<S> bits = (n + E::kBias) << E::kMantissa;
  V<S> result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

template <class S>
FASTRNN_INLINE V<S> clamp(V<S> x, S limit) {  // a comparison with NaN is false, so NaN passes
  const V<S> high = broadcast(limit), low = broadcast(-limit);
  x = x > high ? high : x;
  return x < low ? low : x;
}

// log(1 + x) = 2 atanh(t) = 2 t q(t^2), t = x / (2 + x), for x in [0, 1]. q is the minimax polynomial of
// atanh(sqrt(w)) / sqrt(w) up to w = 1/9 (mpmath.chebyfit); its relative error is given below.
template <class S>
struct Logarithm;

template <>
struct Logarithm<float> {
  // 1.1e-10
  static constexpr float kPolynomial[] = {1.0f,
                                          0.33333339513217f,
                                          0.199993556234312f,
                                          0.143101037042186f,
                                          0.106992802533393f,
                                          0.121969540420115f};
};

template <>
struct Logarithm<double> {
  // 1.3e-18
  static constexpr double kPolynomial[] = {1.0,
                                           0.333333333333330748,
                                           0.200000000000928737,
                                           0.142857142727270573,
                                           0.111111120403738366,
                                           0.0909087041625240226,
                                           0.0769330702115200388,
                                           0.0665018701633731217,
                                           0.0605508436403460883,
                                           0.0416225325593041029,
                                           0.0852208178139069906};
};

template <class S>
FASTRNN_INLINE V<S> log1p(V<S> x) {
  using L = Logarithm<S>;
  const V<S> t = x / (2 + x), w = t * t;
  constexpr int kDegree = sizeof(L::kPolynomial) / sizeof(S) - 1;
  V<S> q = broadcast(L::kPolynomial[kDegree]);
  for (int i = kDegree - 1; i >= 0; --i) q = q * w + L::kPolynomial[i];
  return 2 * t * q;
}

template <class S>
struct Math {
  FASTRNN_INLINE static V<S> exp(V<S> x) {
    const Reduced<S> e = reduce<S>(clamp<S>(x, Exponential<S>::kOverflow));
    // Two factors, because 2^n alone leaves the normal range before exp does.
    const auto half = e.n >> 1;
    return (e.p + 1) * power_of_two<S>(half) * power_of_two<S>(e.n - half);
  }

  FASTRNN_INLINE static V<S> sigmoid(V<S> x) { return 1 / (1 + exp(-x)); }

  FASTRNN_INLINE static V<S> log_sigmoid(V<S> x) {
    return (x < 0 ? x : V<S>{}) - log1p<S>(exp(x < 0 ? x : -x));
  }

  // tanh(x) = expm1(2x) / (expm1(2x) + 2), whose relative error stays small near 0.
  FASTRNN_INLINE static V<S> tanh(V<S> x) {
    const V<S> doubled = 2 * clamp<S>(x, Exponential<S>::kTanhOne);
    const Reduced<S> e = reduce<S>(doubled);
    const V<S> scale = power_of_two<S>(e.n);
    const V<S> expm1 = scale * e.p + (scale - 1);
    return expm1 / (expm1 + 2);
  }
};

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
