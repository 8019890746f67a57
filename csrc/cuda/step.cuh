// One time step of one direction around a matrix product of torch's: for every size and number type, and
// where the persistent kernels have no room. States are kept in the order of the rows: the first ones take
// part.
#pragma once
#include "cuda/backward_step.cuh"

namespace fastrnn {

constexpr int kStepThreads = 256;

/// States between the steps.
template <class S>
struct StepStates {
  Acc<S>* h;       // [B, P]
  Acc<S>* others;  // [states - 1, B, H] those beside h, or null
  S* h_in;         // [B, P] what the next product takes: h as it is stored, or zero before a reset
  int states;
};

template <class S>
struct ForwardStep {
  Sequence sequence;
  ForwardDirection<S> direction;
  StepStates<S> states;
  int64_t H, P, t, t_next;  // t_next outside 0..T-1: there is none; t likewise: before the first
  const S* gates_x;         // [N, G*H] = x W_ih^T + b_ih
  const S* gates_h;         // [rows, G*H] = h_in W_hh^T
  S* hidden;                // [rows, H] what the projection takes, or null
  const S* projected;       // [rows, P] = hidden W_hr^T
};

template <class S>
__device__ void publish(const ForwardStep<S>& p, int64_t b, int64_t j) {
  const bool zero = p.sequence.resets_if_any(p.t_next, b);
  // mutant: single-steps-reset-does-not-reach-the-product
  p.states.h_in[b * p.P + j] = store<S>(zero ? Acc<S>{} : p.states.h[b * p.P + j]);
}

/// Before the first step: [B, P] states from h0, [B, H] from the other initial ones.
template <class S>
__global__ void __launch_bounds__(kStepThreads) begin_forward(const ForwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i < p.sequence.B * p.P) {
    const int64_t b = i / p.P, j = i % p.P;
    p.states.h[i] = load(p.direction.h0[p.sequence.batch(b)][j]);
    publish(p, b, j);
  }
  const int64_t size = p.sequence.B * p.H;
  for (int k = 1; k < p.states.states && i < size; ++k)
    p.states.others[(k - 1) * size + i] = load(p.direction.last[k][p.sequence.batch(i / p.H)][i % p.H]);
}

/// One step of every (row, unit) [B, H].
template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) forward_step(const ForwardStep<S> p) {
  constexpr CellInfo kInfo = Cell::kInfo;
  constexpr int G = kInfo.gates;
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x, b = i / p.H, j = i % p.H;
  if (b >= p.sequence.B) return;
  if (b < p.sequence.rows(p.t)) {
    const ForwardDirection<S>& d = p.direction;
    const int64_t row = p.sequence.row(p.t, b);
    ForwardUnit<Cell, Acc<S>> s{};
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      Acc<S> a = load(p.gates_h[(b * G + gate) * p.H + j]);
      if (d.weights.b_hh) a += load(d.weights.b_hh[gate * p.H + j]);
      s.set_gate(gate, load(p.gates_x[(row * G + gate) * p.H + j]), a);
    }
#pragma unroll
    for (int k = 0; k < kInfo.vectors; ++k) s.u[k] = load(d.weights.u[k][j]);
    const bool zero = p.sequence.resets(p.t, b);
    if (kInfo.before(kH) && !zero) s.before[kH] = p.states.h[i];
    const int64_t size = p.sequence.B * p.H;
#pragma unroll
    for (int k = 1; k < kInfo.states; ++k)
      s.before[k] = zero ? Acc<S>{} : p.states.others[(k - 1) * size + i];
    Cell::template forward<MathOf<S>>(s);
    if (d.saved)
#pragma unroll
      for (int k = 0; k < kInfo.saved; ++k) d.saved[row][k * p.H + j] = store<S>(s.saved[k]);
#pragma unroll
    for (int k = 1; k < kInfo.states; ++k) {
      p.states.others[(k - 1) * size + i] = s.after[k];
      if (d.history[k]) d.history[k][row][j] = store<S>(s.after[k]);
    }
    if (p.hidden) {
      p.hidden[i] = store<S>(s.after[kH]);
    } else {
      p.states.h[i] = s.after[kH];
      d.history[kH][row][j] = store<S>(s.after[kH]);
    }
  }
  if (!p.hidden) publish(p, b, j);
}

/// The projected h of every (row, unit) [B, P].
template <class S>
__global__ void __launch_bounds__(kStepThreads) forward_projected(const ForwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x, b = i / p.P, j = i % p.P;
  if (b >= p.sequence.B) return;
  if (b < p.sequence.rows(p.t)) {
    p.states.h[i] = load(p.projected[i]);
    p.direction.history[kH][p.sequence.row(p.t, b)][j] = p.projected[i];
  }
  publish(p, b, j);
}

/// After the last step: each state at its row's end.
template <class S>
__global__ void __launch_bounds__(kStepThreads) end_forward(const ForwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  const ForwardDirection<S>& d = p.direction;
  if (i < p.sequence.B * p.P) d.last[kH][p.sequence.batch(i / p.P)][i % p.P] = store<S>(p.states.h[i]);
  const int64_t size = p.sequence.B * p.H;
  for (int k = 1; k < p.states.states && i < size; ++k)
    d.last[k][p.sequence.batch(i / p.H)][i % p.H] = store<S>(p.states.others[(k - 1) * size + i]);
}

template <class S>
struct BackwardStep {
  Sequence sequence;
  BackwardDirection<S> direction;
  bool reverse;
  int64_t H, P, t;
  S* dh;              // [B, P] dL/dh by way of the later steps
  Acc<S>* dothers;    // [states - 1, B, H] dL/d(states beside h), or null
  int states;
  S* direct;          // [B, H] dL/dh_prev beside the product, or null
  S* dgates_h;        // [rows, G*H] gradients of the gates of the product with W_hh
  S* dh_complete;     // [rows, P] with a projection: complete dL/dh_t, or null
  Acc<S>* du;         // [B, U, H] each row's share of dL/du so far, or null
  const S* dh_hidden; // [rows, H] with a projection: dL/d(h before it) = dh_complete W_hr, or null
};

/// Before the last step: [B, P] gradients from that of h_n, [B, H] from those of the other last states.
template <class S>
__global__ void __launch_bounds__(kStepThreads) begin_backward(const BackwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  const BackwardDirection<S>& d = p.direction;
  if (i < p.sequence.B * p.P) p.dh[i] = d.dstate[kH][p.sequence.batch(i / p.P)][i % p.P];
  const int64_t size = p.sequence.B * p.H;
  for (int k = 1; k < p.states && i < size; ++k)
    p.dothers[(k - 1) * size + i] = load(d.dstate[k][p.sequence.batch(i / p.H)][i % p.H]);
}

/// With a projection: the complete dL/dh_t of every (row, unit) [rows, P].
template <class S>
__global__ void __launch_bounds__(kStepThreads) backward_projected(const BackwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x, b = i / p.P, j = i % p.P;
  if (b >= p.sequence.rows(p.t)) return;
  const int64_t row = p.sequence.row(p.t, b);
  Acc<S> dh = load(p.dh[i]);
  if (p.direction.doutput[kH]) dh += load(p.direction.doutput[kH][row][j]);
  p.dh_complete[i] = p.direction.complete[kH][row][j] = store<S>(dh);
}

/// One step of every (row, unit) [rows, H].
template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) backward_step(const BackwardStep<S> p) {
  constexpr CellInfo kInfo = Cell::kInfo;
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x, b = i / p.H, j = i % p.H;
  if (b >= p.sequence.rows(p.t)) return;
  const int64_t row = p.sequence.row(p.t, b);
  const bool zero = p.sequence.resets(p.t, b);
  BackwardDirection<S> direction = p.direction;
  if (p.dh_hidden)
    direction.doutput[kH] = {}, direction.complete[kH] = {};  // backward_projected has done both
  const BackwardColumns<S, kInfo.states> d(direction, j);
  const int64_t before = p.reverse ? p.t + 1 : p.t - 1;
  // mutant: single-steps-rows-begin-a-step-late
  const bool begins = before < 0 || before >= p.sequence.T || p.sequence.rows(before) <= b;
  StepInputs<Cell, S> inputs;
  inputs.fetch(d, row, begins ? -1 : p.sequence.row(before, b), p.sequence.batch(b), int(p.H));
  const Acc<S> dh = load(p.dh_hidden ? p.dh_hidden[i] : p.dh[i]);
  Acc<S> u[array_length(kInfo.vectors)];
#pragma unroll
  for (int k = 0; k < kInfo.vectors; ++k) u[k] = load(direction.weights.u[k][j]);
  const int64_t size = p.sequence.B * p.H;
  Acc<S> dothers[kInfo.states] = {};
#pragma unroll
  for (int k = 1; k < kInfo.states; ++k) dothers[k] = p.dothers[(k - 1) * size + i];
  const auto s = inputs.backward(d, row, zero, u, dh, dothers);
#pragma unroll
  for (int k = 0; k < kInfo.vectors; ++k) p.du[(b * kInfo.vectors + k) * p.H + j] += s.du[k];
#pragma unroll
  for (int e = 0; e < kInfo.gradients(); ++e) (&d.dgates[row])[e * p.H] = store<S>(s.dgates[e]);
#pragma unroll
  for (int gate = 0; gate < kInfo.gates; ++gate)
    p.dgates_h[(b * kInfo.gates + gate) * p.H + j] =
        store<S>(zero ? Acc<S>{} : s.dgates[kInfo.gradient_of_recurrent(gate)]);
  if constexpr (kInfo.before(kH)) p.direct[i] = store<S>(s.dbefore[kH]);
#pragma unroll
  for (int k = 1; k < kInfo.states; ++k) p.dothers[(k - 1) * size + i] = s.dbefore[k];
}

/// After the first step: the gradients of the initial states.
template <class S>
__global__ void __launch_bounds__(kStepThreads) end_backward(const BackwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  const BackwardDirection<S>& d = p.direction;
  if (i < p.sequence.B * p.P) d.dstate[kH][p.sequence.batch(i / p.P)][i % p.P] = p.dh[i];
  const int64_t size = p.sequence.B * p.H;
  for (int k = 1; k < p.states && i < size; ++k)
    d.dstate[k][p.sequence.batch(i / p.H)][i % p.H] = store<S>(p.dothers[(k - 1) * size + i]);
}

/// Sums of `count` arrays, always in the same order.
template <class S>
struct AddUp {
  const Acc<S>* parts;  // [count, size]
  S* sums;              // [size]
  int64_t count, size;
};

template <class S>
__global__ void __launch_bounds__(kStepThreads) add_up(const AddUp<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i >= p.size) return;
  Acc<S> sum{};
  for (int64_t k = 0; k < p.count; ++k) sum += p.parts[k * p.size + i];
  p.sums[i] = store<S>(sum);
}

}  // namespace fastrnn
