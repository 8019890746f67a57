// The backward step of one unit of one row: its addresses, the numbers that it reads, and the step itself.
#pragma once
#include "cells/cell.h"
#include "cuda/math.cuh"
#include "cuda/steps.cuh"

namespace fastrnn {

/// Everything that the backward steps of unit j read and write.
template <class S, int kStates>
struct BackwardColumns {
  Column<const S> saved, initial[kStates], history[kStates], doutput[kStates];
  Column<S> dgates, complete[kStates];

  __device__ BackwardColumns(const BackwardDirection<S>& d, int64_t j)
      : saved(d.saved, j), dgates(d.dgates, j) {
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      initial[k] = {d.initial[k], j}, history[k] = {d.history[k], j};
      doutput[k] = {d.doutput[k], j}, complete[k] = {d.complete[k], j};
    }
  }
};

/// The stored numbers that a backward step reads. They are fetched before the blocks meet, and used after it.
template <class Cell, class S>
struct StepInputs {
  static constexpr CellInfo kInfo = Cell::kInfo;
  S saved[array_length(kInfo.saved)];
  S dy, before[kInfo.states], after[kInfo.states];
  using Columns = BackwardColumns<S, kInfo.states>;

  /// before_row: the row of the step before, or negative where the sequence of this row begins; batch: its
  /// place in the batch. Row: int, or int64_t where there may be 2^31 rows.
  template <class Row>
  __device__ __forceinline__ void fetch(const Columns& d, Row row, Row before_row, Row batch, int H) {
    constexpr CellInfo kNumbers = Cell::kInfo;  // nvcc: a static member is no object on the device
    if constexpr (kInfo.saved > 0) {
      const S* const from = &d.saved[row];
#pragma unroll
      for (int k = 0; k < kInfo.saved; ++k) saved[k] = from[k * H];
    }
    dy = d.doutput[kH] ? d.doutput[kH][row] : S{};
#pragma unroll
    for (int k = 0; k < kInfo.states; ++k) {
      if (kNumbers.after(k)) after[k] = d.history[k][row];
      if (kNumbers.before(k)) before[k] = before_row < 0 ? d.initial[k][batch] : d.history[k][before_row];
    }
  }

  /// u: the unit's numbers in the vectors of parameters; dh, dothers: dL/dh_t and that of the other states
  /// (from 1 on) by way of the later steps. begins: the state before is zero, after a reset.
  template <class Row>
  __device__ __forceinline__ BackwardUnit<Cell, Acc<S>> backward(const Columns& d, Row row, bool begins,
                                                                 const Acc<S>* u, Acc<S> dh,
                                                                 const Acc<S>* dothers) const {
    constexpr CellInfo kNumbers = Cell::kInfo;
    using A = Acc<S>;
    BackwardUnit<Cell, A> s{};
#pragma unroll
    for (int k = 0; k < kInfo.saved; ++k) s.saved[k] = load(saved[k]);
#pragma unroll
    for (int k = 0; k < kInfo.vectors; ++k) s.u[k] = u[k];
    s.dafter[kH] = dh + load(dy);
    if (d.complete[kH]) d.complete[kH][row] = store<S>(s.dafter[kH]);
#pragma unroll
    for (int k = 0; k < kInfo.states; ++k) {
      if (kNumbers.after(k)) s.after[k] = load(after[k]);
      // mutant: back-reset-does-not-reach-h, back-reset-does-not-reach-c
      if (kNumbers.before(k)) s.before[k] = begins ? A{} : load(before[k]);
    }
#pragma unroll
    for (int k = 1; k < kInfo.states; ++k) {
      s.dafter[k] = dothers[k];
      if (d.doutput[k]) s.dafter[k] += load(d.doutput[k][row]);
    }
    Cell::template backward<MathOf<S>>(s);
#pragma unroll
    for (int k = 1; k < kInfo.states; ++k)
      if (d.complete[k]) d.complete[k][row] = store<S>(s.dafter[k]);  // mutant: dc-of-the-step-before
#pragma unroll
    for (int k = 0; k < kInfo.states; ++k)
      if (begins) s.dbefore[k] = 0;  // mutant: back-reset-does-not-stop-dh-and-dc
    return s;
  }
};

}  // namespace fastrnn
