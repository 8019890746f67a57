// Products of bfloat16 numbers with float32 sums, of the processors that have instructions for them.
#pragma once
#include "common/problem.h"

namespace fastrnn {

/// Rows of A and panels are filled with zeros to a multiple of this depth: that of AMX's tiles.
constexpr int64_t kBfloat16Depth = 32;

struct Bfloat16Products {
  const char* name;

  /// C[n, 16 * vectors] (+)= A[n, K] panel, 1 or 2 vectors, K a multiple of kBfloat16Depth, for some panels
  /// that follow one another, and their C's in columns c_step apart. A panel holds pairs of depth:
  /// [K / 2][16 * vectors][2]. Strides are in numbers.
  void (*multiply)(const Bfloat16* a, int64_t lda, int64_t n, int64_t K, const Bfloat16* panels, int count,
                   int vectors, float* c, int64_t c_step, int64_t ldc, bool accumulate);
};

/// The best ones that this processor has, or those that FASTRNN_CPU_BFLOAT16 names: amx, avx512_bf16,
/// portable (slow, for tests on processors without the others) or 0. Null: none. Chosen once.
const Bfloat16Products* bfloat16_products();

}  // namespace fastrnn
