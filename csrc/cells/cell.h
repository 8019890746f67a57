// What a cell is: the formulas of one time step, forward and backward, and nothing else. A cell knows
// neither time nor batch nor device. It is written once, on a vector type V (a CPU register of any
// width, a scalar on a GPU) and a policy M that supplies M::sigmoid, M::tanh, M::exp and
// M::log_sigmoid for V.
//
//   struct Cell {
//     static constexpr CellInfo kInfo{.name = "cell", .gates = 3, ...};
//     template <class M, class V> FASTRNN_INLINE static void forward(ForwardUnit<Cell, V>& s);
//     template <class M, class V> FASTRNN_INLINE static void backward(BackwardUnit<Cell, V>& s);
//   };
#pragma once
#include "common/inline.h"

namespace fastrnn {

/// The states of a cell: h, which W_hh multiplies, and what lives beside it, such as an LSTM's c.
enum State { kH, kC };

constexpr int kMaxStates = 4;

/// A set of states, as CellInfo has it.
constexpr unsigned only(int state) { return 1u << state; }

/// The numbers of a cell. Drivers, operators and Python read them here and infer nothing from one another.
struct CellInfo {
  const char* name;           // in torch.ops.fastrnn
  int gates;                  // G: blocks of H rows in W_ih and W_hh
  int split = 0;              // how many of the last gates take the products with x and with h apart
  int states = 1;             // h, and what lives beside it
  unsigned reads_before = 0;  // states of step t-1 that the step reads, besides the product with W_hh
  unsigned reads_after = 0;   // states of step t that backward reads
  int vectors = 0;            // U: vectors of parameters, one number a unit
  int saved = 0;              // S: numbers of a unit that backward reads, besides the states
  bool reuses_saved = false;  // backward may write the gate gradients over the saved numbers
  bool projects = false;      // takes a W_hr, which projects h

  FASTRNN_INLINE constexpr bool before(int state) const { return reads_before >> state & 1; }
  FASTRNN_INLINE constexpr bool after(int state) const { return reads_after >> state & 1; }

  /// E: gate gradients of a unit. Those of the recurrent parts of the split gates come first, then one for
  /// each gate, which of a split gate is its input part's: so the G of x lie side by side, and the G of the
  /// recurrent product do, too.
  FASTRNN_INLINE constexpr int gradients() const { return gates + split; }
  FASTRNN_INLINE constexpr int gradient_of_input(int gate) const { return split + gate; }
  FASTRNN_INLINE constexpr int gradient_of_recurrent(int gate) const {
    return gate < gates - split ? split + gate : gate - (gates - split);
  }
};

/// The length of an array of `count` numbers, since C++ has none of length 0.
FASTRNN_INLINE constexpr int array_length(int count) { return count > 0 ? count : 1; }

/// The forward step of one unit of one row.
template <class Cell, class V>
struct ForwardUnit {
  static constexpr CellInfo kInfo = Cell::kInfo;
  // W_ih x + b_ih + W_hh h + b_hh in torch's gate order; of a split gate W_hh h + b_hh alone
  V a[kInfo.gates];
  V x[array_length(kInfo.split)];      // W_ih x + b_ih of the split gates
  V u[array_length(kInfo.vectors)];    // the unit's numbers in the vectors of parameters
  V before[kInfo.states];              // states of step t-1, those that are read
  V after[kInfo.states];               // out: states of step t
  V saved[array_length(kInfo.saved)];  // out: what backward reads

  /// of_x: W_ih x + b_ih; of_h: W_hh h + b_hh.
  FASTRNN_INLINE void set_gate(int gate, V of_x, V of_h) {
    constexpr int kWhole = kInfo.gates - kInfo.split;  // gates that are not split come first
    a[gate] = gate < kWhole ? of_x + of_h : of_h;
    if (gate >= kWhole) x[gate - kWhole] = of_x;
  }
};

/// The backward step of one unit of one row.
template <class Cell, class V>
struct BackwardUnit {
  static constexpr CellInfo kInfo = Cell::kInfo;
  V saved[array_length(kInfo.saved)];
  V u[array_length(kInfo.vectors)];  // the unit's numbers in the vectors of parameters
  V before[kInfo.states];               // states of step t-1, those that are read
  V after[kInfo.states];                // states of step t, those that are read
  // dL/d(after). Of h it is complete; of the others in: by way of step t+1 and the outputs, out: complete
  V dafter[kInfo.states];
  V dbefore[kInfo.states];  // out: dL/d(before) of the states that are read, without the product with W_hh
  V du[array_length(kInfo.vectors)];  // out: this row's share of dL/du
  V dgates[kInfo.gradients()];  // out: dL/d(gate before its activation), in CellInfo's order
};

/// Whether the drivers can run a cell with these numbers.
constexpr bool is_valid(const CellInfo& cell) {
  const bool counts = cell.gates > 0 && cell.split >= 0 && cell.split <= cell.gates && cell.vectors >= 0;
  const bool state_counts = cell.states >= 1 && cell.states <= kMaxStates;
  const unsigned all = (1u << cell.states) - 1, but_h = all & ~only(kH);
  const bool reads_states = (cell.reads_before | cell.reads_after) <= all;
  // The gradients of the states beside h pass through the cell alone.
  const bool carries_states = (cell.reads_before & but_h) == but_h;
  const bool reads_h = cell.before(kH) || cell.after(kH);  // a projected h is not the cell's own
  const bool fits = cell.saved == cell.gradients();
  return counts && state_counts && reads_states && carries_states && !(cell.projects && reads_h) &&
         (fits || !cell.reuses_saved);
}

}  // namespace fastrnn
