// Products of 8-bit numbers with int32 sums, for weights that are kept as int8 (fastrnn.prepack).
//
// A number is its scale times an integer from -127 to 127. Each row of A has a scale, and so has each unit of
// a panel. The sums of the integers are exact, and so the same on every processor.
#pragma once
#include "common/problem.h"

namespace fastrnn {

/// A weight in units of its scale.
struct Int8 {
  int8_t value;
};

/// The integers of a row of A or of a unit of a panel: K, filled with zeros to whole tiles of AMX. A row of A
/// is so many bytes, each an integer plus `zero`, and its float scale after them.
constexpr int64_t int8_depth(int64_t K) { return (K + 63) / 64 * 64; }
/// Most products of two such integers whose sum an int32 holds.
constexpr int64_t kMostInt8Depth = INT32_MAX / (127 * 127);

/// The parts of a panel of `width` units, in their order in memory: 8 bytes of a unit before its weights.
struct Int8Panel {
  int32_t* start;  // [width] what a sum begins with: -zero times the sum of the unit's weights
  float* scales;  // [width]
  int8_t* weights;  // [int8_depth(K) / 4][width][4]

  FASTRNN_INLINE Int8Panel(const Int8* panel, int64_t width)
      : start(reinterpret_cast<int32_t*>(const_cast<Int8*>(panel))),
        scales(reinterpret_cast<float*>(start + width)),
        weights(reinterpret_cast<int8_t*>(scales + width)) {}
};
constexpr int64_t int8_panel_depth(int64_t K) { return 8 + int8_depth(K); }

struct Int8Products {
  const char* name;
  int zero;  // the byte that stands for 0 in rows of A

  /// C[n, width] (+)= A[n, K] panel for some panels that follow one another, and their C's in columns c_step
  /// apart. Strides are in numbers; width is one or two registers of floats of instruction_set().
  void (*multiply)(const uint8_t* a, int64_t lda, int64_t n, int64_t K, const Int8* panels, int count,
                   int width, float* c, int64_t c_step, int64_t ldc, bool accumulate);
};

/// The best ones of this processor for the kernels in use, or those that FASTRNN_CPU_INT8 names: amx,
/// avx512_vnni, avx2 or portable. Chosen once.
const Int8Products& int8_products();

}  // namespace fastrnn
