// What the backward step of one unit of one row reads, and the step itself.
#pragma once
#include "cells/cell.h"
#include "cuda/math.cuh"
#include "cuda/steps.cuh"

namespace fastrnn {

/// What the backward steps of unit j read and write.
template <class S>
struct BackwardColumns {
  Column<const S> dy, dsaved, dsaved_c, saved, saved_c, y, h0, c0;
  Column<S> dgates, dh_rows, dc_rows;

  __device__ BackwardColumns(const BackwardDirection<S>& d, int64_t j)
      : dy(d.dy, j),
        dsaved(d.dsaved, j),
        dsaved_c(d.dsaved_c, j),
        saved(d.saved, j),
        saved_c(d.saved_c, j),
        y(d.y, j),
        h0(d.h0, j),
        c0(d.c0, j),
        dgates(d.dgates, j),
        dh_rows(d.dh_rows, j),
        dc_rows(d.dc_rows, j) {}
};

/// Fetched early, used late: numbers as they are stored.
template <class Cell, class S>
struct StepInputs {
  S saved[Cell::kSaved > 0 ? Cell::kSaved : 1];
  S dy, y, h_prev, c, c_prev;

  /// before: the row of the step before, or negative where the sequence of this row begins; batch: its place
  /// in the batch. Row: int, or int64_t where there may be 2^31 rows.
  template <class Row>
  __device__ __forceinline__ void fetch(const BackwardColumns<S>& d, Row row, Row before, Row batch, int H) {
    const auto previous = [&](const Column<const S>& values, const Column<const S>& initial) {
      return before < 0 ? initial[batch] : values[before];
    };
    if constexpr (Cell::kSaved > 0) {
      const S* const activations = &d.saved[row];
#pragma unroll
      for (int s = 0; s < Cell::kSaved; ++s) saved[s] = activations[s * H];
    }
    dy = d.dy ? d.dy[row] : S{};
    if constexpr (Cell::kSaved == 0) y = d.y[row];
    if constexpr (Cell::kDirect) h_prev = previous(d.y, d.h0);
    if constexpr (Cell::kCellState) {
      c = d.saved_c[row];
      c_prev = previous(d.saved_c, d.c0);
    }
  }

  /// dh, dc: dL/dh_t and dL/dc_t by way of the later steps; dh_prev: dL/dh_{t-1} by the direct way; dc_prev:
  /// dL/dc_{t-1}. begins: the state before is zero, after a reset.
  template <class Row>
  __device__ __forceinline__ void backward(const BackwardColumns<S>& d, Row row, int H, bool begins,
                                           Acc<S> dh, Acc<S> dc, Acc<S>* dgates, Acc<S>& dh_prev,
                                           Acc<S>& dc_prev) const {
    using A = Acc<S>;
    A activations[Cell::kSaved > 0 ? Cell::kSaved : 1] = {},
                                                    further[Cell::kSaved > 0 ? Cell::kSaved : 1] = {};
#pragma unroll
    for (int s = 0; s < Cell::kSaved; ++s) activations[s] = load(saved[s]);
    if (d.dsaved)
#pragma unroll
      // mutant: further-gradients-of-another-gate
      for (int s = 0; s < Cell::kSaved; ++s) further[s] = load((&d.dsaved[row])[s * H]);
    dh += load(dy);
    if (d.dsaved_c) dc += load(d.dsaved_c[row]);
    if (d.dh_rows) d.dh_rows[row] = store<S>(dh);
    A y_t{}, before{}, c_t{}, c_before{};
    if constexpr (Cell::kSaved == 0) y_t = load(y);
    if constexpr (Cell::kDirect) before = begins ? A{} : load(h_prev);  // mutant: back-reset-does-not-reach-h
    // mutant: back-reset-does-not-reach-c
    if constexpr (Cell::kCellState) c_t = load(c), c_before = begins ? A{} : load(c_prev);
    Cell::template backward<MathOf<S>>(activations, further, y_t, before, c_t, c_before, dh, dc, dgates,
                                       dh_prev, dc_prev);
    if (Cell::kCellState && d.dc_rows) d.dc_rows[row] = store<S>(dc);  // mutant: dc-of-the-step-before
    if (begins) dh_prev = dc_prev = 0;  // mutant: back-reset-does-not-stop-dh-and-dc
  }
};

}  // namespace fastrnn
