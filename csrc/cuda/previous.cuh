// Where the state before a step is kept.
#pragma once
#include "common/problem.h"
#include "cuda/math.cuh"

namespace fastrnn {

/// The state [H] of row b before step t, whether the sequence of this row begins there or not; resets aside.
template <class S>
__device__ __forceinline__ const S* previous(const Sequence& sequence, const Rows<const S>& values,
                                             const Rows<const S>& initial, int64_t t, int64_t b,
                                             bool reverse) {
  const int64_t before = reverse ? t + 1 : t - 1;
  const bool begins = before < 0 || before >= sequence.T || sequence.rows(before) <= b;
  return begins ? initial[sequence.batch(b)] : values[sequence.row(before, b)];
}

}  // namespace fastrnn
