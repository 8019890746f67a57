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
  S* h_in;  // [B, P] what the next product takes: h as it is stored, after a reset and with its mask
  Acc<S>* after;  // [states, B, H] what the stages of a step hand on, or null
  int states;
};

template <class S>
struct ForwardStep {
  Sequence sequence;
  ForwardDirection<S> direction;
  StepStates<S> states;
  bool reverse;
  int64_t H, P, t, t_next;  // t_next outside 0..T-1: there is none; t likewise: before the first
  Rows<const S> gates_x;  // [N, G*H] = x W_ih^T + b_ih
  const S* gates_h;  // [rows, G*H] = h_in W_hh^T, or null where h meets no matrix
  S* hidden;  // [rows, H] what the projection takes, or null
  const S* projected;  // [rows, P] = hidden W_hr^T
};

/// Unit j of the state k of row b that a reset before step t gives.
template <class S>
__device__ __forceinline__ Acc<S> reset_state(const StepOptions<S>& options, int k, int64_t t, int64_t batch,
                                              int64_t j) {
  const S* const to = options.reset_state(k, t, batch);
  return to ? load(to[j]) : Acc<S>{};
}

/// Unit j of state k after the step of a row, from that before it and the fresh one.
template <class S>
__device__ __forceinline__ Acc<S> zoned(const StepOptions<S>& options, int k, int64_t row, int64_t j,
                                        Acc<S> before, Acc<S> fresh) {
  if (!options.zones(k)) return fresh;
  if (options.keep[k])
    return options.keep[k][row][j] ? before : fresh;  // mutant: zoneout-the-wrong-way-round
  const auto share = Acc<S>(options.share[k]);
  return share * before + (1 - share) * fresh;
}

/// What acts inside the step of unit j.
template <class Cell, class S>
__device__ __forceinline__ OptionsInside<Cell, Acc<S>> inside(const StepOptions<S>& options, int64_t row,
                                                              int64_t j) {
  using A = Acc<S>;
  OptionsInside<Cell, A> touched{};
  if constexpr (!std::is_same_v<decltype(touched), Untouched>) {
    const A infinite = A(INFINITY);
    touched.mask = options.candidate ? load(options.candidate[row][j]) : A(1);
    touched.clip = options.cell_clip > 0 ? A(options.cell_clip) : infinite;
    // Where zoneout acts on c, the clip acts on the gradient after it.
    const bool clips = options.gradient_clip > 0 && !options.zones(kC);
    touched.gradient_clip = clips ? A(options.gradient_clip) : infinite;
  }
  return touched;
}

template <class S>
__device__ void publish(const ForwardStep<S>& p, int64_t b, int64_t j) {
  const bool resets = p.sequence.resets_if_any(p.t_next, b);
  const StepOptions<S>& options = p.direction.options;
  // mutant: single-steps-reset-does-not-reach-the-product
  Acc<S> h = resets ? Acc<S>{} : p.states.h[b * p.P + j];
  if (options.on && resets) h = reset_state(options, kH, p.t_next, p.sequence.batch(b), j);
  // mutant: h-without-its-mask
  if (options.recurrent) h *= load(options.recurrent[p.sequence.batch(b)][j]);
  p.states.h_in[b * p.P + j] = store<S>(h);
}

/// Zoneout of the states `first` .. `states` of unit j.
template <class S>
__device__ __forceinline__ void keep_states(const ForwardDirection<S>& d, int64_t row, int64_t j,
                                            const Acc<S>* before, Acc<S>* after, int states, int first) {
  for (int k = first; k < states; ++k) {
    if (k < kZoned && d.fresh[k]) d.fresh[k][row][j] = store<S>(after[k]);
    after[k] = zoned(d.options, k, row, j, before[k], after[k]);
  }
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
template <class Cell, bool kOptions, class S>
__device__ __forceinline__ void forward_unit(const ForwardStep<S>& p, int64_t b, int64_t j) {
  constexpr CellInfo kInfo = Cell::kInfo;
  constexpr int G = kInfo.gates;
  const int64_t i = b * p.H + j;
  if (b < p.sequence.rows(p.t)) {
    const ForwardDirection<S>& d = p.direction;
    const int64_t row = p.sequence.row(p.t, b);
    const StepOptions<S>& options = d.options;
    ForwardUnit<Cell, Acc<S>, std::conditional_t<kOptions, OptionsInside<Cell, Acc<S>>, Untouched>> s{};
    if constexpr (kOptions) s.options = inside<Cell>(options, row, j);
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
    if ((kInfo.before(kH) || (kOptions && !p.hidden)) && !zero) s.before[kH] = p.states.h[i];
    const int64_t size = p.sequence.B * p.H;
#pragma unroll
    for (int k = 1; k < kInfo.states; ++k)
      s.before[k] = zero ? Acc<S>{} : p.states.others[(k - 1) * size + i];
    if (kOptions && zero)
      for (int k = p.hidden ? 1 : 0; k < kInfo.states; ++k)
        s.before[k] = reset_state(options, k, p.t, p.sequence.batch(b), j);
    Cell::template forward<MathOf<S>>(s);
    if (d.saved)
#pragma unroll
      for (int k = 0; k < kInfo.saved; ++k) d.saved[row][k * p.H + j] = store<S>(s.saved[k]);
    if constexpr (kOptions) keep_states(d, row, j, s.before, s.after, kInfo.states, p.hidden ? 1 : 0);
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
template <class Cell, bool kOptions, class S>
__global__ void __launch_bounds__(kStepThreads) forward_step(const ForwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i < p.sequence.B * p.H) forward_unit<Cell, kOptions>(p, i / p.H, i % p.H);
}

/// All steps of every (row, unit) [B, H] of a cell whose h meets no matrix: no unit waits for another.
template <class Cell, bool kOptions, class S>
__global__ void __launch_bounds__(kStepThreads) forward_alone(ForwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i >= p.sequence.B * p.H) return;
  for (int64_t step = 0; step < p.sequence.T; ++step) {
    p.t = p.reverse ? p.sequence.T - 1 - step : step;
    p.t_next = p.reverse ? p.t - 1 : p.t + 1;
    forward_unit<Cell, kOptions>(p, i / p.H, i % p.H);
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
template <class Cell, bool kOptions, class S>
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
        if (kOptions && zero)
          for (int k = 0; k < kNumbers.states; ++k)
            s.before[k] = reset_state(d.options, k, p.t, p.sequence.batch(b), j);
        Cell::template forward<MathOf<S>, kStage>(s);
        if (kStage == kNumbers.saves_in && d.saved)
          for (int k = 0; k < kNumbers.saved; ++k) d.saved[row][k * p.H + j] = store<S>(s.saved[k]);
        if (kOptions && kLast) keep_states(d, row, j, s.before, s.after, kNumbers.states, 0);
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
    const StepOptions<S>& options = p.direction.options;
    const int64_t row = p.sequence.row(p.t, b);
    Acc<S> h = load(p.projected[i]);
    if (options.zones(kH)) {
      const bool resets = p.sequence.resets(p.t, b);
      const Acc<S> before = resets ? reset_state(options, kH, p.t, p.sequence.batch(b), j) : p.states.h[i];
      h = zoned(options, kH, row, j, before, h);
    }
    p.states.h[i] = h;
    p.direction.history[kH][row][j] = store<S>(h);
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
  S* dh;  // [B, P] dL/dh by way of the later steps
  Acc<S>* dothers;  // [states - 1, B, H] dL/d(states beside h), or null
  int states;
  S* direct;  // [B, H] dL/dh_prev beside the product, or null
  Acc<S>* carry;  // [B, P] with options: dL/dh_prev beside the product and its mask, or null
  S* dgates_h;  // [rows, G*H] gradients of the gates of the product with W_hh
  S* dh_complete;  // [rows, P] with a projection: complete dL/dh_t, or null
  Acc<S>* du;  // [B, U, H] each row's share of dL/du so far, or null
  Acc<S>* dgates;  // [rows, E*H] what the stages of a step hand on, or null
  const S* dh_hidden;  // [rows, H] with a projection: dL/d(h before it) = dh_complete W_hr, or null
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

// ---- With options

/// Where state k after a step lies, before its zoneout.
template <class S>
__device__ __forceinline__ const S* after_row(const BackwardDirection<S>& d, int k, int64_t row) {
  return k < kZoned && d.fresh[k] ? d.fresh[k][row] : d.history[k][row];
}

/// Unit j of state k before step p.t of row b.
template <class S>
__device__ __forceinline__ Acc<S> state_before(const BackwardStep<S>& p, int k, int64_t b, int64_t j) {
  const int64_t batch = p.sequence.batch(b), t = p.reverse ? p.t + 1 : p.t - 1;
  if (p.sequence.resets(p.t, b)) return reset_state(p.direction.options, k, p.t, batch, j);
  const bool begins = t < 0 || t >= p.sequence.T || p.sequence.rows(t) <= b;
  return load(begins ? p.direction.initial[k][batch][j] : p.direction.history[k][p.sequence.row(t, b)][j]);
}

/// dL/d(state k) before step p.t: after a reset it is that of reset_to, and zero for the step before.
template <class S>
__device__ __forceinline__ Acc<S> to_state_before(const BackwardStep<S>& p, int k, int64_t batch, int64_t j,
                                                  bool resets, Acc<S> d) {
  if (!resets) return d;
  if (S* const to = p.direction.reset_gradient(k, p.t, batch)) to[j] = store<S>(load(to[j]) + d);
  return {};
}

/// The part of the complete dL/dh_t that goes to the fresh h; the other one is kept.
template <class S>
__device__ __forceinline__ Acc<S> complete_h(const BackwardDirection<S>& d, int64_t row, int64_t j, Acc<S> dh,
                                             Acc<S>& kept) {
  if (d.options.gradient_clip > 0) dh = clipped(dh, Acc<S>(d.options.gradient_clip));
  if (d.complete[kH]) d.complete[kH][row][j] = store<S>(dh);
  kept = d.options.zones(kH) ? zoned(d.options, kH, row, j, dh, Acc<S>{}) : Acc<S>{};
  return zoned(d.options, kH, row, j, Acc<S>{}, dh);
}

/// The same of a state beside h, whose gradient is complete here only where it has zoneout.
template <class S>
__device__ __forceinline__ Acc<S> complete_other(const BackwardDirection<S>& d, int k, int64_t row, int64_t j,
                                                 Acc<S> dafter, Acc<S>& kept) {
  if (!d.options.zones(k)) return dafter;
  if (d.options.gradient_clip > 0) dafter = clipped(dafter, Acc<S>(d.options.gradient_clip));
  if (d.complete[k]) d.complete[k][row][j] = store<S>(dafter);
  kept = zoned(d.options, k, row, j, dafter, Acc<S>{});
  return zoned(d.options, k, row, j, Acc<S>{}, dafter);
}

/// With a projection: the complete dL/dh_t of every (row, unit) [rows, P].
template <class S>
__global__ void __launch_bounds__(kStepThreads) backward_projected(const BackwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x, b = i / p.P, j = i % p.P;
  if (b >= p.sequence.rows(p.t)) return;
  const int64_t row = p.sequence.row(p.t, b);
  const BackwardDirection<S>& d = p.direction;
  Acc<S> dh = load(p.dh[i]);
  if (d.doutput[kH]) dh += load(d.doutput[kH][row][j]);
  if (d.options.on) dh = complete_h(d, row, j, dh, p.carry[i]);
  p.dh_complete[i] = store<S>(dh);
  if (!d.options.on) d.complete[kH][row][j] = p.dh_complete[i];
}

/// backward_unit() with options. kept: the gradient that goes past the step, to the state before it.
template <class Cell, class S>
__device__ __forceinline__ void backward_unit_with_options(const BackwardStep<S>& p, int64_t b, int64_t j) {
  constexpr CellInfo kInfo = Cell::kInfo;
  using A = Acc<S>;
  if (b >= p.sequence.rows(p.t)) return;
  const BackwardDirection<S>& d = p.direction;
  const int64_t i = b * p.H + j, size = p.sequence.B * p.H;
  const int64_t row = p.sequence.row(p.t, b), batch = p.sequence.batch(b);
  const bool resets = p.sequence.resets(p.t, b);
  BackwardUnit<Cell, A, OptionsInside<Cell, A>> s{};
  s.options = inside<Cell>(d.options, row, j);
  for (int k = 0; k < kInfo.saved; ++k) s.saved[k] = load(d.saved[row][k * p.H + j]);
  for (int k = 0; k < kInfo.vectors; ++k) s.u[k] = load(d.weights.u[k][j]);
  A kept[kInfo.states] = {};
  for (int k = 0; k < kInfo.states; ++k) {
    if (kInfo.after(k)) s.after[k] = load(after_row(d, k, row)[j]);
    if (kInfo.before(k)) s.before[k] = state_before(p, k, b, j);
    A dafter = k == kH ? load(p.dh_hidden ? p.dh_hidden[i] : p.dh[i]) : p.dothers[(k - 1) * size + i];
    if (!(k == kH && p.dh_hidden)) {  // or backward_projected has done this
      if (d.doutput[k]) dafter += load(d.doutput[k][row][j]);
      dafter =
          k == kH ? complete_h(d, row, j, dafter, kept[k]) : complete_other(d, k, row, j, dafter, kept[k]);
    }
    s.dafter[k] = dafter;
  }
  Cell::template backward<MathOf<S>>(s);
  for (int k = 0; k < kInfo.vectors; ++k) p.du[(b * kInfo.vectors + k) * p.H + j] += s.du[k];
  for (int e = 0; e < kInfo.gradients(); ++e) d.dgates[row][e * p.H + j] = store<S>(s.dgates[e]);
  for (int gate = 0; kInfo.dense && gate < kInfo.gates; ++gate)
    p.dgates_h[(b * kInfo.gates + gate) * p.H + j] = store<S>(s.dgates[kInfo.gradient_of_recurrent(gate)]);
  for (int k = 1; k < kInfo.states; ++k) {
    if (d.complete[k] && !d.options.zones(k)) d.complete[k][row][j] = store<S>(s.dafter[k]);
    p.dothers[(k - 1) * size + i] = to_state_before(p, k, batch, j, resets, s.dbefore[k] + kept[k]);
  }
  const A past = kInfo.before(kH) ? s.dbefore[kH] + kept[kH] : kept[kH];
  if (!kInfo.dense)
    p.dh[i] = store<S>(to_state_before(p, kH, batch, j, resets, past));
  else if (!p.dh_hidden)
    p.carry[i] = past;
}

/// With options: dL/dh before the step of every (row, unit) [rows, P], from its product in p.dh.
template <class S>
__global__ void __launch_bounds__(kStepThreads) backward_carried(const BackwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x, b = i / p.P, j = i % p.P;
  if (b >= p.sequence.rows(p.t)) return;
  const StepOptions<S>& options = p.direction.options;
  const int64_t batch = p.sequence.batch(b);
  Acc<S> dh = load(p.dh[i]);
  if (options.recurrent) dh *= load(options.recurrent[batch][j]);  // mutant: dh-without-its-mask
  dh += p.carry[i];  // mutant: nothing-carried-past-the-product
  p.dh[i] = store<S>(to_state_before(p, kH, batch, j, p.sequence.resets(p.t, b), dh));
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
template <class Cell, bool kOptions, class S>
__global__ void __launch_bounds__(kStepThreads) backward_step(const BackwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i >= p.sequence.B * p.H) return;
  if constexpr (kOptions)
    backward_unit_with_options<Cell>(p, i / p.H, i % p.H);
  else
    backward_unit<Cell>(p, i / p.H, i % p.H);
}

/// All steps of every (row, unit) [B, H] of a cell whose h meets no matrix.
template <class Cell, bool kOptions, class S>
__global__ void __launch_bounds__(kStepThreads) backward_alone(BackwardStep<S> p) {
  const int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i >= p.sequence.B * p.H) return;
  for (int64_t step = 0; step < p.sequence.T; ++step) {
    p.t = p.reverse ? step : p.sequence.T - 1 - step;  // mutant: alone-one-direction-for-both
    if constexpr (kOptions)
      backward_unit_with_options<Cell>(p, i / p.H, i % p.H);
    else
      backward_unit<Cell>(p, i / p.H, i % p.H);
  }
}

/// One step of every row of a cell in stages.
template <class Cell, bool kOptions, class S>
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
      A kept[kNumbers.states] = {};
      for (int k = 0; k < kNumbers.states; ++k) {
        if (kNumbers.after(k)) s.after[k] = load((kOptions ? after_row(d, k, row) : d.history[k][row])[j]);
        if (kNumbers.before(k) && kOptions)
          s.before[k] = state_before(p, k, b, j);
        else if (kNumbers.before(k))
          s.before[k] = zero ? A{} : load(begins ? d.initial[k][batch][j] : d.history[k][row_before][j]);
        s.dafter[k] = k == kH ? load(p.dh[i]) : p.dothers[(k - 1) * size + i];
        if (d.doutput[k]) s.dafter[k] += load(d.doutput[k][row][j]);
        if (kOptions && kStage <= kNumbers.complete_in)
          s.dafter[k] = k == kH ? complete_h(d, row, j, s.dafter[k], kept[k])
                                : complete_other(d, k, row, j, s.dafter[k], kept[k]);
      }
      for (int e = 0; e < kE && kStage > 0; ++e) s.dgates[e] = p.dgates[(b * kE + e) * p.H + j];
      Cell::template backward<MathOf<S>, kStage>(s);
      if (kStage == kNumbers.complete_in)
        for (int k = 0; k < kNumbers.states; ++k) {
          if (kOptions) {
            if (k > kH && d.complete[k] && !d.options.zones(k)) d.complete[k][row][j] = store<S>(s.dafter[k]);
            const A past = kNumbers.before(k) ? s.dbefore[k] + kept[k] : kept[k];
            if (k == kH)
              p.carry[i] = past;
            else
              p.dothers[(k - 1) * size + i] = to_state_before(p, k, batch, j, zero, past);
            continue;
          }
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
            store<S>(zero && !kOptions ? A{} : s.dgates[kNumbers.gradient_of_recurrent(gate)]);
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
  S* sums;  // [size]
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
