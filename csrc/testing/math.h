// What csrc/cpu/math.h computes, for the tests: one table of plain functions per instruction set.
#pragma once
#include <cstdint>

namespace fastrnn::testing {

template <class S>
using OverArray = void (*)(const S* x, S* y, int64_t count);

struct MathTable {
  const char* name;
  OverArray<float> sigmoid_f32;
  OverArray<double> sigmoid_f64;
  OverArray<float> tanh_f32;
  OverArray<double> tanh_f64;
  OverArray<float> exp_f32;
  OverArray<double> exp_f64;
  OverArray<float> log_sigmoid_f32;
  OverArray<double> log_sigmoid_f64;
};

}  // namespace fastrnn::testing

namespace fastrnn {
extern const testing::MathTable kMathAvx512, kMathAvx2, kMathBaseline;
}
