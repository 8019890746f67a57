// What the backward step of one unit of one row reads, and the step itself.
#pragma once
#include "cells/cell.h"
#include "cuda/previous.cuh"

namespace fastrnn {

/// Fetched early, used late: numbers as they are stored.
template <class Cell, class S>
struct StepInputs {
  S saved[Cell::kSaved > 0 ? Cell::kSaved : 1];
  S dy, y, h_prev, c, c_prev;

  __device__ void fetch(const Sequence& sequence, const BackwardDirection<S>& d, int64_t t, int64_t b, int j,
                        int64_t H, bool reverse) {
    const int64_t row = sequence.row(t, b);
#pragma unroll
    for (int s = 0; s < Cell::kSaved; ++s) saved[s] = d.saved[row][s * H + j];
    dy = d.dy ? d.dy[row][j] : S{};
    if constexpr (Cell::kSaved == 0) y = d.y[row][j];
    if constexpr (Cell::kDirect) h_prev = previous(sequence, d.y, d.h0, t, b, reverse)[j];
    if constexpr (Cell::kCellState) {
      c = d.saved_c[row][j];
      c_prev = previous(sequence, d.saved_c, d.c0, t, b, reverse)[j];
    }
  }

  /// dh, dc: dL/dh_t and dL/dc_t by way of the later steps; dh_prev: dL/dh_{t-1} by the direct way; dc_prev:
  /// dL/dc_{t-1}. begins: the state before is zero, after a reset.
  __device__ void backward(const BackwardDirection<S>& d, int64_t row, int j, int64_t H, bool begins,
                           Acc<S> dh, Acc<S> dc, Acc<S>* dgates, Acc<S>& dh_prev, Acc<S>& dc_prev) const {
    using A = Acc<S>;
    A activations[Cell::kSaved > 0 ? Cell::kSaved : 1] = {},
                                                    further[Cell::kSaved > 0 ? Cell::kSaved : 1] = {};
#pragma unroll
    for (int s = 0; s < Cell::kSaved; ++s) {
      activations[s] = load(saved[s]);
      if (d.dsaved) further[s] = load(d.dsaved[row][s * H + j]);
    }
    dh += load(dy);
    if (d.dsaved_c) dc += load(d.dsaved_c[row][j]);
    if (d.dh_rows) d.dh_rows[row][j] = store<S>(dh);
    A y_t{}, before{}, c_t{}, c_before{};
    if constexpr (Cell::kSaved == 0) y_t = load(y);
    if constexpr (Cell::kDirect) before = begins ? A{} : load(h_prev);
    if constexpr (Cell::kCellState) c_t = load(c), c_before = begins ? A{} : load(c_prev);
    Cell::template backward<MathOf<S>>(activations, further, y_t, before, c_t, c_before, dh, dc, dgates,
                                       dh_prev, dc_prev);
    if (Cell::kCellState && d.dc_rows) d.dc_rows[row][j] = store<S>(dc);
    if (begins) dh_prev = dc_prev = 0;
  }
};

}  // namespace fastrnn
