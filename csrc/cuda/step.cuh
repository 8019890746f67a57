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
  Acc<S>* after;   // [states, B, H] what the stages of a step hand on, or null
  int states;
};

template <class S>
struct ForwardStep {
  Sequence sequence;
  ForwardDirection<S> direction;
  StepStates<S> states;
  bool reverse;
  int64_t H, P, t, t_next;  // t_next outside 0..T-1: there is none; t likewise: before the first
  Rows<const S> gates_x;    // [N, G*H] = x W_ih^T + b_ih
  const S* gates_h;         // [rows, G*H] = h_in W_hh^T, or null where h meets no matrix
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

/// Unit j of row b at step p.t.
template <class Cell, class S>
__device__ __forceinline__ void forward_unit(const ForwardStep<S>& p, int64_t b, int64_t j) {
  constexpr CellInfo kInfo = Cell::kInfo;
  constexpr int G = kInfo.gates;
  const int64_t i = b * p.H + j;
  if (b < p.sequence.rows(p.t)) {
    const ForwardDirection<S>& d = p.direction;
    const int64_t row = p.sequence.row(p.t, b);
    ForwardUnit<Cell, Acc<S>> s{};
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      Acc<S> a{};
      if constexpr (kInfo.dense) a = load(p.gates_h[(b * G + gate) * p.H + j]);
      if (d.weights.b_hh) a += load(d.weights.b_hh[gate * p.H + j]);
      s.set_gate(gate, load(p.gates_x[row][gate * p.H + j]), a);
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

/// One step of every (row, unit) [B, H].
template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) forward_step(const ForwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i < p.sequence.B * p.H) forward_unit<Cell>(p, i / p.H, i % p.H);
}

/// All steps of every (row, unit) [B, H] of a cell whose h meets no matrix: no unit waits for another.
template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) forward_alone(ForwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i >= p.sequence.B * p.H) return;
  for (int64_t step = 0; step < p.sequence.T; ++step) {
    p.t = p.reverse ? p.sequence.T - 1 - step : step;
    p.t_next = p.reverse ? p.t - 1 : p.t + 1;
    forward_unit<Cell>(p, i / p.H, i % p.H);
  }
}

// ---- Cells in stages: a block has a row, and adds over its units between two stages
// ------------------------

template <class S>
__device__ __forceinline__ void add_over_block(Acc<S> (&sums)[kMaxSums]) {
  Acc<S>* const partial = dev::shared<Acc<S>>(0);  // [kStepThreads]
  for (int k = 0; k < kMaxSums; ++k) {
    partial[threadIdx.x] = sums[k];
    __syncthreads();
    for (int half = kStepThreads / 2; half > 0; half /= 2) {
      if (int(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
      __syncthreads();  // mutant: sums-of-a-row-without-barrier
    }
    sums[k] = partial[0];
    __syncthreads();
  }
}
template <class S>
constexpr int kRowSharedBytes = kStepThreads * int(sizeof(Acc<S>));

/// One step of every row [B].
template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) forward_row(const ForwardStep<S> p) {
  using A = Acc<S>;
  constexpr CellInfo kInfo = Cell::kInfo;
  const int64_t b = blockIdx.x, size = p.sequence.B * p.H;
  if (b < p.sequence.rows(p.t)) {
    const ForwardDirection<S>& d = p.direction;
    const int64_t row = p.sequence.row(p.t, b);
    const bool zero = p.sequence.resets(p.t, b);
    A numbers[array_length(kInfo.row_numbers)] = {};
    each_stage<kInfo.stages>([&]<int kStage>() {
      constexpr CellInfo kNumbers = Cell::kInfo;
      constexpr bool kLast = kStage == kNumbers.stages - 1;
      A sums[kMaxSums] = {};
      for (int64_t j = threadIdx.x; j < p.H; j += kStepThreads) {
        const int64_t i = b * p.H + j;
        ForwardUnit<Cell, A> s{};
        for (int gate = 0; gate < kNumbers.gates; ++gate)
          s.set_gate(gate, load(p.gates_x[row][gate * p.H + j]),
                     load(p.gates_h[(b * kNumbers.gates + gate) * p.H + j]));
        for (int k = 0; k < kNumbers.vectors; ++k) s.u[k] = load(d.weights.u[k][j]);
        for (int r = 0; r < kNumbers.row_numbers; ++r) s.row[r] = numbers[r];
        s.before[kH] = zero ? A{} : p.states.h[i];
        for (int k = 1; k < kNumbers.states; ++k) {
          s.before[k] = zero ? A{} : p.states.others[(k - 1) * size + i];
          s.after[k] = p.states.after[k * size + i];
        }
        Cell::template forward<MathOf<S>, kStage>(s);
        if (kStage == kNumbers.saves_in && d.saved)
          for (int k = 0; k < kNumbers.saved; ++k) d.saved[row][k * p.H + j] = store<S>(s.saved[k]);
        for (int k = 1; k < kNumbers.states; ++k) {
          p.states.after[k * size + i] = s.after[k];
          if (!kLast) continue;
          p.states.others[(k - 1) * size + i] = s.after[k];
          if (d.history[k]) d.history[k][row][j] = store<S>(s.after[k]);
        }
        if (kLast) {
          p.states.h[i] = s.after[kH];
          d.history[kH][row][j] = store<S>(s.after[kH]);
        }
        for (int k = 0; k < kMaxSums && !kLast; ++k) sums[k] += s.sums[k];
      }
      if constexpr (!kLast) {
        add_over_block<S>(sums);
        Cell::template row<kStage>(sums, A(p.H), numbers);
      }
    });
    if (d.saved && threadIdx.x == 0)
      for (int r = 0; r < kInfo.row_numbers; ++r) d.saved[row][kInfo.saved * p.H + r] = store<S>(numbers[r]);
  }
  for (int64_t j = threadIdx.x; j < p.H; j += kStepThreads) publish(p, b, j);
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
  Acc<S>* dgates;     // [rows, E*H] what the stages of a step hand on, or null
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

/// Unit j of row b at step p.t.
template <class Cell, class S>
__device__ __forceinline__ void backward_unit(const BackwardStep<S>& p, int64_t b, int64_t j) {
  constexpr CellInfo kInfo = Cell::kInfo;
  const int64_t i = b * p.H + j;
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
  for (int gate = 0; kInfo.dense && gate < kInfo.gates; ++gate)
    p.dgates_h[(b * kInfo.gates + gate) * p.H + j] =
        store<S>(zero ? Acc<S>{} : s.dgates[kInfo.gradient_of_recurrent(gate)]);
  if constexpr (kInfo.before(kH)) (kInfo.dense ? p.direct : p.dh)[i] = store<S>(s.dbefore[kH]);
#pragma unroll
  for (int k = 1; k < kInfo.states; ++k) p.dothers[(k - 1) * size + i] = s.dbefore[k];
}

/// One step of every (row, unit) [rows, H].
template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) backward_step(const BackwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i < p.sequence.B * p.H) backward_unit<Cell>(p, i / p.H, i % p.H);
}

/// All steps of every (row, unit) [B, H] of a cell whose h meets no matrix.
template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) backward_alone(BackwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i >= p.sequence.B * p.H) return;
  for (int64_t step = 0; step < p.sequence.T; ++step) {
    p.t = p.reverse ? step : p.sequence.T - 1 - step;  // mutant: alone-one-direction-for-both
    backward_unit<Cell>(p, i / p.H, i % p.H);
  }
}

/// One step of every row of a cell in stages.
template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) backward_row(const BackwardStep<S> p) {
  using A = Acc<S>;
  constexpr CellInfo kInfo = Cell::kInfo;
  const int64_t b = blockIdx.x, size = p.sequence.B * p.H;
  if (b >= p.sequence.rows(p.t)) return;
  const BackwardDirection<S>& d = p.direction;
  const int64_t row = p.sequence.row(p.t, b), batch = p.sequence.batch(b);
  const int64_t t_before = p.reverse ? p.t + 1 : p.t - 1;
  const bool begins = t_before < 0 || t_before >= p.sequence.T || p.sequence.rows(t_before) <= b;
  const int64_t row_before = begins ? -1 : p.sequence.row(t_before, b);
  const bool zero = p.sequence.resets(p.t, b);
  A totals[kInfo.backward_stages][kMaxSums] = {};
  each_stage<kInfo.backward_stages>([&]<int kStage>() {
    constexpr CellInfo kNumbers = Cell::kInfo;
    constexpr bool kLast = kStage == kNumbers.backward_stages - 1;
    constexpr int kE = kNumbers.gradients();
    A sums[kMaxSums] = {};
    for (int64_t j = threadIdx.x; j < p.H; j += kStepThreads) {
      const int64_t i = b * p.H + j;
      BackwardUnit<Cell, A> s{};
      for (int k = 0; k < kNumbers.saved; ++k) s.saved[k] = load(d.saved[row][k * p.H + j]);
      for (int r = 0; r < kNumbers.row_numbers; ++r) s.row[r] = load(d.saved[row][kNumbers.saved * p.H + r]);
      for (int k = 0; k < kNumbers.vectors; ++k) s.u[k] = load(d.weights.u[k][j]);
      for (int stage = 0; stage < kStage; ++stage)
        for (int k = 0; k < kMaxSums; ++k) s.total[stage][k] = totals[stage][k];
      s.units = A(p.H);
      for (int k = 0; k < kNumbers.states; ++k) {
        if (kNumbers.after(k)) s.after[k] = load(d.history[k][row][j]);
        if (kNumbers.before(k))
          s.before[k] = zero ? A{} : load(begins ? d.initial[k][batch][j] : d.history[k][row_before][j]);
        s.dafter[k] = k == kH ? load(p.dh[i]) : p.dothers[(k - 1) * size + i];
        if (d.doutput[k]) s.dafter[k] += load(d.doutput[k][row][j]);
      }
      for (int e = 0; e < kE && kStage > 0; ++e) s.dgates[e] = p.dgates[(b * kE + e) * p.H + j];
      Cell::template backward<MathOf<S>, kStage>(s);
      if (kStage == kNumbers.complete_in)
        for (int k = 0; k < kNumbers.states; ++k) {
          if (d.complete[k]) d.complete[k][row][j] = store<S>(s.dafter[k]);
          if (!kNumbers.before(k)) continue;
          const A dbefore = zero ? A{} : s.dbefore[k];  // mutant: direct-gradient-of-a-row-passes-a-reset
          if (k == kH)
            p.direct[i] = store<S>(dbefore);
          else
            p.dothers[(k - 1) * size + i] = dbefore;
        }
      for (int e = 0; e < kE; ++e) {
        p.dgates[(b * kE + e) * p.H + j] = s.dgates[e];
        if (kLast) d.dgates[row][e * p.H + j] = store<S>(s.dgates[e]);
      }
      for (int gate = 0; gate < kNumbers.gates && kLast; ++gate)
        p.dgates_h[(b * kNumbers.gates + gate) * p.H + j] =
            store<S>(zero ? A{} : s.dgates[kNumbers.gradient_of_recurrent(gate)]);
      for (int k = 0; k < kNumbers.vectors; ++k) p.du[(b * kNumbers.vectors + k) * p.H + j] += s.du[k];
      for (int k = 0; k < kMaxSums && !kLast; ++k) sums[k] += s.sums[k];
    }
    if constexpr (!kLast) add_over_block<S>(sums);
    for (int k = 0; k < kMaxSums; ++k) totals[kStage][k] = sums[k];
  });
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
