// The weights of one direction as the forward scan streams them: blocks of units, a panel for each gate. They
// are packed in every call, or once and kept by the caller (fastrnn.prepack).
#pragma once
#include <cstdint>

#include "cells/cell.h"
#include "cpu/quantise.h"
#include "cpu/scratch.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

/// W is what a weight is stored as: S itself, Pair, Bfloat16 or Int8.
template <class Cell, class S, class W>
class Panels {
  static constexpr int G = Cell::kInfo.gates, kSplit = Cell::kInfo.split, U = Cell::kInfo.vectors;

 public:
  // Products of a unit: product g is that of gate g, with x and h, or of a split gate with h alone; products
  // G, G + 1, ... are those of the split gates with x.
  static constexpr int kProducts = G + kSplit;

  /// Which product holds the input's part of a gate.
  static constexpr int input_product(int gate) { return gate < G - kSplit ? gate : gate + kSplit; }

  /// Takes the arrays from scratch memory or a kept block; weights that are not packed stay null.
  FASTRNN_INLINE void lay_out(Memory& memory, int64_t I, int64_t P, int64_t H, bool packs_ih, bool packs_hh,
                              bool projected) {
    I_ = I, P_ = P, H_ = H;
    units_ = {H}, outputs_ = {P};
    bias = memory.take<S>(kProducts * H);
    u = memory.take<S>(U * H);
    w_ih = packs_ih && !Cell::kInfo.takes_gates
               ? memory.take<W>(units_.count() * panel_depth<W>(I) * kBlockWidth)
               : nullptr;
    w_hh = packs_hh && Cell::kInfo.dense ? memory.take<W>(units_.count() * panel_depth<W>(P) * kBlockWidth)
                                         : nullptr;
    w_hr = packs_hh && projected ? memory.take<W>(outputs_.count() * panel_depth<W>(H) * kPanelWidth<S, W>)
                                 : nullptr;
  }

  /// Packs one of `parts` shares of the blocks.
  void pack(const Weights<S>& w, int64_t part, int64_t parts) const {
    if (part == 0) pack_vectors(w);
    for (int64_t block = part; block < units_.count(); block += parts)
      for (int gate = 0; gate < G; ++gate) {
        const auto pack_gate = [&](Rows<const Given> weights, int64_t K, W* panels) {
          pack_transposed<S>(Rows<const Given>{weights[gate * H_ + block * kBlock<S>], weights.stride}, K,
                             units_.in_block(block), units_.vectors(block), panels + offset(K, block, gate));
        };
        if (w_ih) pack_gate(w.w_ih.template of<Given>(), I_, w_ih);
        if (w_hh) pack_gate(w.w_hh.template of<Given>(), P_, w_hh);
      }
    const Rows<const Given> hr = w.w_hr.template of<Given>();
    for (int64_t block = part; w_hr && block < outputs_.count(); block += parts)
      pack_transposed<S>(Rows<const Given>{hr[block * kBlock<S>], hr.stride}, H_, outputs_.in_block(block),
                         outputs_.vectors(block), projection(block));
  }

  FASTRNN_INLINE const W* input_panel(int64_t block, int gate) const {
    return w_ih + offset(I_, block, gate);
  }
  FASTRNN_INLINE const W* recurrent_panel(int64_t block, int gate) const {
    return w_hh + offset(P_, block, gate);
  }
  FASTRNN_INLINE const W* projection_panel(int64_t block) const { return projection(block); }

  S* bias = nullptr;  // [kProducts, H]
  S* u = nullptr;  // [U, H] vectors of parameters
  W* w_ih = nullptr;  // [block of units][gate][I][panel], or null: read as they lie
  W* w_hh = nullptr;  // [block of units][gate][P][panel], or null
  W* w_hr = nullptr;  // [block of outputs][H][panel], or null

 private:
  using Given = Factor<S, W>;  // what the matrices of a call hold

  static constexpr int64_t kBlockWidth = G * kPanelWidth<S, W>;

  FASTRNN_INLINE int64_t offset(int64_t K, int64_t block, int gate) const {
    return panel_depth<W>(K) * (block * kBlockWidth + gate * panel_width<S, W>(units_.vectors(block)));
  }
  FASTRNN_INLINE W* projection(int64_t block) const {
    return w_hr + block * panel_depth<W>(H_) * kPanelWidth<S, W>;
  }

  void pack_vectors(const Weights<S>& w) const {
    for (int k = 0; k < U; ++k) __builtin_memcpy(u + k * H_, w.u[k], H_ * sizeof(S));
    __builtin_memset(bias, 0, kProducts * H_ * sizeof(S));
    for (int gate = 0; gate < G; ++gate)
      for (int64_t u = 0; u < H_; ++u) {
        if (w.b_hh) bias[gate * H_ + u] += w.b_hh[gate * H_ + u];
        if (w.b_ih) bias[input_product(gate) * H_ + u] += w.b_ih[gate * H_ + u];
      }
  }

  int64_t I_ = 0, P_ = 0, H_ = 0;
  Blocks<S> units_{}, outputs_{};
};

/// The bytes of all directions' panels; fills `problem.to` where that is not null.
template <class Cell, class S, class W>
int64_t pack_all(const PackProblem<S>& problem) {
  Memory memory(problem.to);
  for (int d = 0; d < problem.directions; ++d) {
    Panels<Cell, S, W> panels;
    const Weights<S>& w = problem.weights[d];
    panels.lay_out(memory, problem.I, problem.P, problem.H, true, true, problem.projected);
    if (problem.to) panels.pack(w, 0, 1);
  }
  return memory.size();
}

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
