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
//
// A cell whose candidate takes a factor, or whose c can be clipped, takes units with any Options, and asks
// s.options at these places (Untouched, Touched).
//
// A cell with sums over the units of a row, such as layer normalisation, is written in stages: every unit of
// the row goes through one before the first goes through the next, and what a stage leaves in s.sums is added
// up in between. See LstmLayerNorm.
//
//     template <class M, int kStage, class V> FASTRNN_INLINE static void forward(ForwardUnit<Cell, V>& s);
//     template <int kStage, class S> FASTRNN_INLINE static void row(const S* sums, S units, S* numbers);
//     template <class M, int kStage, class V> FASTRNN_INLINE static void backward(BackwardUnit<Cell, V>& s);
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/inline.h"

namespace fastrnn {

/// The states of a cell: h, which W_hh multiplies, and what lives beside it, such as an LSTM's c.
enum State { kH, kC };

constexpr int kMaxStates = 4;

/// A set of states, as CellInfo has it.
constexpr unsigned only(int state) { return 1u << state; }

/// The numbers of a cell. Drivers, operators and Python read them here and infer nothing from one another.
struct CellInfo {
  const char* name;  // in torch.ops.fastrnn
  int gates;  // G: blocks of H rows in W_ih and W_hh
  int split = 0;  // how many of the last gates take the products with x and with h apart
  int states = 1;  // h, and what lives beside it
  unsigned reads_before = 0;  // states of step t-1 that the step reads, besides the product with W_hh
  unsigned reads_after = 0;  // states of step t that backward reads
  int vectors = 0;  // U: vectors of parameters, one number a unit
  int saved = 0;  // S: numbers of a unit that backward reads, besides the states
  bool reuses_saved = false;  // backward may write the gate gradients over the saved numbers
  bool projects = false;  // takes a W_hr, which projects h
  bool dense = true;  // h meets the matrix W_hh; else only what the cell's own vectors make of it
  bool candidate = false;  // its candidate takes a factor (options of a step)
  bool clips = false;  // its c can be clipped, and the complete gradient of c
  bool takes_gates = false;  // x holds W_ih x + b_ih of each direction, made by the caller: no W_ih
  int stages = 1;  // of the forward step; its last one gives the states
  int saves_in = 0;  // the stage that gives the saved numbers
  int backward_stages = 1;  // its last one leaves the gate gradients complete
  int complete_in = 0;  // the stage that leaves dafter complete and gives dbefore; later ones have neither
  int row_numbers = 0;  // R: numbers of a row that the forward step's row() makes of the sums

  FASTRNN_INLINE constexpr bool staged() const { return stages > 1; }
  /// The numbers that a row of H units saves.
  FASTRNN_INLINE constexpr int64_t saved_width(int64_t H) const { return saved * H + row_numbers; }
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

/// Sums over a row that one stage may have.
constexpr int kMaxSums = 2;

/// The length of an array of `count` numbers, since C++ has none of length 0.
FASTRNN_INLINE constexpr int array_length(int count) { return count > 0 ? count : 1; }

/// What the options of a call do inside a step: nothing, here.
struct Untouched {
  template <class V>
  FASTRNN_INLINE V candidate(V g) const {
    return g;
  }
  template <class V>
  FASTRNN_INLINE V updated(V c) const {
    return c;
  }
  template <class V>
  FASTRNN_INLINE V updated_again(V, V c) const {
    return c;
  }
  template <class V>
  FASTRNN_INLINE V complete(V dc) const {
    return dc;
  }
  template <class V>
  FASTRNN_INLINE V before_clip(V, V dc) const {
    return dc;
  }
};

/// v between -bound and bound; a NaN stays one.
template <class V>
FASTRNN_INLINE V clipped(V v, V bound) {
  const V above = v > bound ? bound : v;
  return above < -bound ? -bound : above;
}

/// And here what is on; what is off is 1 or infinite.
template <class V>
struct Touched {
  V mask;  // of the candidate
  V clip, gradient_clip;  // of c and of dL/dc

  /// What takes the place of the candidate g.
  FASTRNN_INLINE V candidate(V g) const { return mask * g; }
  /// c as the rest of the step sees it.
  FASTRNN_INLINE V updated(V c) const { return clipped(c, clip); }
  /// The same in the backward step, from c before the clip; without options it reads c itself.
  FASTRNN_INLINE V updated_again(V unclipped, V) const { return updated(unclipped); }
  /// dL/dc with all that depends on c, as it goes on.
  FASTRNN_INLINE V complete(V dc) const { return clipped(dc, gradient_clip); }
  /// dL/d(c before the clip).
  FASTRNN_INLINE V before_clip(V unclipped, V dc) const {
    const V zero{};
    return unclipped > clip ? zero : unclipped < -clip ? zero : dc;
  }
};

/// The forward step of one unit of one row.
template <class Cell, class V, class Options = Untouched>
struct ForwardUnit {
  static constexpr CellInfo kInfo = Cell::kInfo;
  // W_ih x + b_ih + W_hh h + b_hh in torch's gate order; of a split gate W_hh h + b_hh alone
  V a[kInfo.gates];
  V x[array_length(kInfo.split)];  // W_ih x + b_ih of the split gates
  V u[array_length(kInfo.vectors)];  // the unit's numbers in the vectors of parameters
  V before[kInfo.states];  // states of step t-1, those that are read
  V after[kInfo.states];  // out: states of step t
  V saved[array_length(kInfo.saved)];  // out: what backward reads
  // In stages only, where a stage also finds what those before it have left in after, but for h:
  V row[array_length(kInfo.row_numbers)];  // the row's numbers so far
  V sums[kMaxSums];  // out: this unit's share of the stage's sums
  Options options;

  /// of_x: W_ih x + b_ih; of_h: W_hh h + b_hh.
  FASTRNN_INLINE void set_gate(int gate, V of_x, V of_h) {
    constexpr int kWhole = kInfo.gates - kInfo.split;  // gates that are not split come first
    a[gate] = gate < kWhole ? of_x + of_h : of_h;
    if (gate >= kWhole) x[gate - kWhole] = of_x;
  }
};

/// The backward step of one unit of one row.
template <class Cell, class V, class Options = Untouched>
struct BackwardUnit {
  static constexpr CellInfo kInfo = Cell::kInfo;
  V saved[array_length(kInfo.saved)];
  V u[array_length(kInfo.vectors)];  // the unit's numbers in the vectors of parameters
  V before[kInfo.states];  // states of step t-1, those that are read
  V after[kInfo.states];  // states of step t, those that are read
  // dL/d(after). Of h it is complete; of the others in: by way of step t+1 and the outputs, out: complete
  V dafter[kInfo.states];
  V dbefore[kInfo.states];  // out: dL/d(before) of the states that are read, without the product with W_hh
  V du[array_length(kInfo.vectors)];  // out: this row's share of dL/du
  V dgates[kInfo.gradients()];  // out: dL/d(gate before its activation), in CellInfo's order
  // In stages only, where a stage also finds what those before it have left in dgates:
  V row[array_length(kInfo.row_numbers)];  // the row's numbers, of the forward step
  V sums[kMaxSums];  // out: this unit's share of the stage's sums
  V total[array_length(kInfo.backward_stages - 1)][kMaxSums];  // the sums of the stages before
  V units;  // H
  Options options;
};

/// The units of a cell in a call with options: cells that no option touches inside have one form.
template <class Cell, class V>
using OptionsInside = std::conditional_t<Cell::kInfo.candidate || Cell::kInfo.clips, Touched<V>, Untouched>;

/// f.operator()<stage>() for each of kCount stages.
template <int kCount, class F>
FASTRNN_INLINE void each_stage(F&& f) {
  [&]<int... kStages>(std::integer_sequence<int, kStages...>) {
    (f.template operator()<kStages>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

/// Whether the drivers can run a cell with these numbers.
constexpr bool is_valid(const CellInfo& cell) {
  const bool counts = cell.gates > 0 && cell.split >= 0 && cell.split <= cell.gates && cell.vectors >= 0;
  const bool state_counts = cell.states >= 1 && cell.states <= kMaxStates;
  const unsigned all = (1u << cell.states) - 1, but_h = all & ~only(kH);
  const bool reads_states = (cell.reads_before | cell.reads_after) <= all;
  // The gradients of the states beside h pass through the cell alone.
  const bool carries_states = (cell.reads_before & but_h) == but_h;
  const bool reads_h = cell.before(kH) || cell.after(kH);  // a projected h is not the cell's own
  const bool fits = cell.saved == cell.gradients() && cell.row_numbers == 0;
  const bool staged = cell.stages > 1;
  const bool stages =
      staged == (cell.backward_stages > 1) && staged == (cell.row_numbers > 0) && cell.stages > 0;
  // Without W_hh the gradient of h passes through the cell alone, too. Stages are made for cells whose gates
  // all take the products with x and with h apart.
  const bool kinds =
      (cell.dense || (cell.before(kH) && !cell.projects)) && (!cell.takes_gates || staged) &&
      (!staged || (cell.takes_gates && cell.split == cell.gates && !cell.projects && cell.dense));
  return counts && stages && kinds && state_counts && reads_states && carries_states &&
         !(cell.projects && reads_h) && (fits || !cell.reuses_saved);
}

}  // namespace fastrnn
