// The backward step of one unit of one row: its addresses, the numbers that it reads, and the step itself.
#pragma once
#include "cells/cell.h"
#include "cuda/math.cuh"
#include "cuda/steps.cuh"

namespace fastrnn {

/// Everything that the backward steps of unit j read and write.
template <class S>
struct BackwardColumns {
  Column<const S> dy, dsaved_c, saved, saved_c, y, h0, c0;
  Column<S> dgates, dh_rows, dc_rows;

  __device__ BackwardColumns(const BackwardDirection<S>& d, int64_t j)
      : dy(d.dy, j),
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

/// The stored numbers that a backward step reads. They are fetched before the blocks meet, and used after it.
template <class Cell, class S>
struct StepInputs {
  static constexpr CellInfo kInfo = Cell::kInfo;
  S saved[array_length(kInfo.saved)];
  S dy, before[kInfo.states], after[kInfo.states];

  /// before_row: the row of the step before, or negative where the sequence of this row begins; batch: its
  /// place in the batch. Row: int, or int64_t where there may be 2^31 rows.
  template <class Row>
  __device__ __forceinline__ void fetch(const BackwardColumns<S>& d, Row row, Row before_row, Row batch,
                                        int H) {
    const auto previous = [&](const Column<const S>& values, const Column<const S>& initial) {
      return before_row < 0 ? initial[batch] : values[before_row];
    };
    if constexpr (kInfo.saved > 0) {
      const S* const from = &d.saved[row];
#pragma unroll
      for (int k = 0; k < kInfo.saved; ++k) saved[k] = from[k * H];
    }
    dy = d.dy ? d.dy[row] : S{};
    if constexpr (kInfo.after(kH)) after[kH] = d.y[row];
    if constexpr (kInfo.before(kH)) before[kH] = previous(d.y, d.h0);
    if constexpr (kInfo.after(kC)) after[kC] = d.saved_c[row];
    if constexpr (kInfo.before(kC)) before[kC] = previous(d.saved_c, d.c0);
  }

  /// u: the unit's numbers in the vectors of parameters; dh, dc: dL/dh_t and dL/dc_t by way of the later
  /// steps. begins: the state before is zero, after a reset.
  template <class Row>
  __device__ __forceinline__ BackwardUnit<Cell, Acc<S>> backward(const BackwardColumns<S>& d, Row row,
                                                                 bool begins, const Acc<S>* u, Acc<S> dh,
                                                                 Acc<S> dc) const {
    using A = Acc<S>;
    BackwardUnit<Cell, A> s{};
#pragma unroll
    for (int k = 0; k < kInfo.saved; ++k) s.saved[k] = load(saved[k]);
#pragma unroll
    for (int k = 0; k < kInfo.vectors; ++k) s.u[k] = u[k];
    s.dafter[kH] = dh + load(dy);
    if (d.dh_rows) d.dh_rows[row] = store<S>(s.dafter[kH]);
    if constexpr (kInfo.after(kH)) s.after[kH] = load(after[kH]);
    // mutant: back-reset-does-not-reach-h
    if constexpr (kInfo.before(kH)) s.before[kH] = begins ? A{} : load(before[kH]);
    if constexpr (kInfo.after(kC)) s.after[kC] = load(after[kC]);
    if constexpr (kInfo.has_c()) {
      s.before[kC] = begins ? A{} : load(before[kC]);  // mutant: back-reset-does-not-reach-c
      s.dafter[kC] = dc;
      if (d.dsaved_c) s.dafter[kC] += load(d.dsaved_c[row]);
    }
    Cell::template backward<MathOf<S>>(s);
    if constexpr (kInfo.has_c())
      if (d.dc_rows) d.dc_rows[row] = store<S>(s.dafter[kC]);  // mutant: dc-of-the-step-before
#pragma unroll
    for (int state = 0; state < kInfo.states; ++state)
      if (begins) s.dbefore[state] = 0;  // mutant: back-reset-does-not-stop-dh-and-dc
    return s;
  }
};

}  // namespace fastrnn
