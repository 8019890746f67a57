// The problem structs: everything a kernel is told, built and checked once at the boundary (calls.h) and
// trusted inside. T time, B batch, H hidden size, P width of h (the projection, or H), G gates, S saved
// activations, E gate gradients, U vectors of parameters, D directions, N rows of the whole sequence.
#pragma once
#include <cstdint>

#include "cells/cell.h"

namespace fastrnn {

/// A sequence is rows. Row (t, b) of every row-shaped tensor [N, *] is row(t, b), whether the sequence is
/// dense time-major (t * B + b), dense batch-first (b * T + t) or packed (offsets[t] + b). Rows are numbered
/// by length, the longest first, so that those that take part in a step are always the first ones.
struct Sequence {
  int64_t T, B;
  int64_t t_stride, b_stride;  // in rows; t_stride is unused when packed
  const int64_t* offsets;      // [T + 1], packed: first row of each step; else null
  const int64_t* counts;       // [T], dense with lengths: rows of each step; else null
  const int64_t* order;        // [B], dense with lengths: batch index of each row; else null
  const int64_t* last;  // [B], packed or with lengths: last step of each row, or -1; else null. CPU only
  const bool* reset;  // [N] the state is zeroed before this row; or null

  FASTRNN_INLINE int64_t rows(int64_t t) const {
    return offsets ? offsets[t + 1] - offsets[t] : counts ? counts[t] : B;
  }
  FASTRNN_INLINE int64_t batch(int64_t b) const { return order ? order[b] : b; }
  FASTRNN_INLINE int64_t start(int64_t t) const { return offsets ? offsets[t] : t * t_stride; }
  FASTRNN_INLINE int64_t row(int64_t t, int64_t b) const { return start(t) + batch(b) * b_stride; }
  FASTRNN_INLINE bool resets(int64_t t, int64_t b) const { return reset && reset[row(t, b)]; }
  /// resets(t, b) for any t and b: false where step t has no row b, or there is no step t.
  FASTRNN_INLINE bool resets_if_any(int64_t t, int64_t b) const {
    return reset && t >= 0 && t < T && b < rows(t) && resets(t, b);
  }
  /// The last step that row b takes part in, or -1.
  FASTRNN_INLINE int64_t last_step(int64_t b) const { return last ? last[b] : T - 1; }
};

/// A matrix of rows, the units of one row side by side.
template <class S>
struct Rows {
  S* data;
  int64_t stride;  // between rows, in elements

  FASTRNN_INLINE S* operator[](int64_t row) const { return data + row * stride; }
  FASTRNN_INLINE explicit operator bool() const { return data != nullptr; }
  /// The same rows where they hold T.
  template <class T>
  FASTRNN_INLINE Rows<const T> of() const {
    return {reinterpret_cast<const T*>(data), stride};
  }
};

/// What packed weights are stored as: the numbers of the call, or instead of float32 fewer bits.
enum class Storage : int64_t { kAsGiven, kBfloat16, kInt8, kCount };

/// The upper half of a float32.
struct Bfloat16 {
  uint16_t bits;
};

/// The weights of one direction.
template <class S>
struct Weights {
  Rows<const S> w_ih;  // [G*H, I], or null where x holds the gates
  Rows<const S> w_hh;  // [G*H, P], or null where h meets no matrix
  const S *b_ih, *b_hh;  // [G*H] or null
  Rows<const S> w_hr;  // [P, H], or null without projection
  Rows<const S> u;  // [U, H] vectors of parameters, or null
};

/// h and c have zoneout.
constexpr int kZoned = 2;

/// The options of one direction that act on the states between the steps (fastrnn/step_options.py has their
/// formulas); null or 0 where they are off.
template <class S>
struct StepOptions {
  bool on;  // any of them, in this scan
  Rows<const bool> keep[kZoned];  // [N, *] zoneout in training: true where a unit keeps its state
  double share[kZoned];  // zoneout in evaluation: how much of its state a unit keeps; above 0 with keep, too
  Rows<const S> candidate;  // [N, H] a factor of the candidate
  Rows<const S> recurrent;  // [B, P] a factor of h before its product with W_hh
  double cell_clip, gradient_clip;  // of c, and of the complete gradients of h and c
  Rows<const S> reset_to[kMaxStates];  // [B, *] at t = 0: the states of a reset
  int64_t reset_stride[kMaxStates];  // from one step to the next, in elements; 0: the same at every step

  FASTRNN_INLINE bool zones(int state) const { return state < kZoned && share[state] > 0; }
  /// The state of a reset before row b of step t, or null: zero.
  FASTRNN_INLINE const S* reset_state(int state, int64_t t, int64_t b) const {
    return reset_to[state] ? reset_to[state][b] + t * reset_stride[state] : nullptr;
  }
};

template <class S>
struct ForwardDirection {
  Weights<S> weights;
  StepOptions<S> options;
  Rows<const S> h0;  // [B, P]
  Rows<S> last[kMaxStates];  // [B, *] out: each state at its row's end; in, but for h: the initial one
  Rows<S> history[kMaxStates];  // [N, *] each state of every step: h, the direction's columns of y; others or
                                // null
  Rows<S> saved;  // [N, S*H] what backward reads besides, one vector of units after the other; null without
                  // gradients
  Rows<S> fresh[kZoned];  // [N, *] states before their zoneout, where backward reads them; or null
};

template <class S>
struct BackwardDirection {
  Weights<S> weights;
  StepOptions<S> options;
  Rows<const S> initial[kMaxStates];  // [B, *] each state before the first step
  Rows<const S> history[kMaxStates];  // [N, *] each state of every step; of h the direction's columns of y
  Rows<const S> doutput[kMaxStates];  // [N, *] dL/d(history) where that is an output, or null
  Rows<const S> saved;  // [N, S*H]
  Rows<const S> fresh[kZoned];  // [N, *] states before their zoneout; or null
  Rows<S> dgates;  // [N, E*H] out
  Rows<S> du;  // [U, H] out; null without vectors of parameters
  Rows<S> dstate[kMaxStates];  // [B, *] in: dL/d(last); out: dL/d(initial)
  Rows<S> complete[kMaxStates];  // [N, *] out: dL/d(state of every step) with all later steps; or null
  Rows<S> dreset[kMaxStates];  // [B, *] at t = 0: to it the gradient of options.reset_to is added; or null
  int64_t dreset_stride[kMaxStates];

  FASTRNN_INLINE S* reset_gradient(int state, int64_t t, int64_t b) const {
    return dreset[state] ? dreset[state][b] + t * dreset_stride[state] : nullptr;
  }
};

/// The products over all steps at once that follow the backward scan.
template <class S>
struct ProductsDirection {
  Weights<S> weights;
  StepOptions<S> options;
  Rows<const S> dgates;  // [N, E*H]
  Rows<const S> y;  // [N, P]
  Rows<const S> h0;  // [B, P]
  Rows<S> dw_ih;  // [G*H, I] out
  Rows<S> dw_hh;  // [G*H, P] out
  S *db_ih, *db_hh;  // [G*H] out: sums of the gate gradients
};

constexpr int kMaxDirections = 2;

/// Runs body(worker) for workers 0..count-1, at best side by side, at worst one after another.
struct Parallel {
  int threads;
  void (*run)(int64_t count, void (*body)(void*, int64_t worker), void* context);

  template <class F>
  void operator()(int64_t count, F&& f) const {
    if (count == 1) return f(0);
    run(
        count, [](void* context, int64_t worker) { (*static_cast<F*>(context))(worker); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

template <class Direction>
struct Problem {
  Sequence sequence;
  int64_t H, P;
  int directions;  // direction 1 runs from the last step to the first
  Direction direction[kMaxDirections];
  Parallel parallel;  // CPU only
  bool bfloat16;  // CPU only: the matrices of weights, and x beside them, hold Bfloat16 in place of S
};

template <class S>
struct ForwardProblem : Problem<ForwardDirection<S>> {
  Rows<const S> x;  // [N, I]
  int64_t I;
  bool projected;
  const char* packed;  // what a PackProblem made of the weights, which are then null; or null
  Storage storage;  // of packed
};
/// The weights of all directions in the form that the kernels stream.
template <class S>
struct PackProblem {
  int64_t I, H, P;
  bool projected;
  Storage storage;
  int directions;
  Weights<S> weights[kMaxDirections];
  char* to;  // null: only the size is wanted
};
template <class S>
using BackwardProblem = Problem<BackwardDirection<S>>;
template <class S>
struct ProductsProblem : Problem<ProductsDirection<S>> {
  Rows<const S> x;  // [N, I]
  Rows<S> dx;  // [N, I] out, or null
  int64_t I;
  bool weights;  // whether those of weights and biases are wanted
};

}  // namespace fastrnn
