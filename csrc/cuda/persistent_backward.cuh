// Back-propagation through time in one launch: every block keeps its columns of W_hh on the multiprocessor. A
// step takes the complete dL/dh_t of the block's units through the cell; the blocks exchange the gate
// gradients; and their product with W_hh gives the recurrent part of dL/dh_{t-1}.
#pragma once
#include "cuda/backward_step.cuh"
#include "cuda/tiles.cuh"

namespace fastrnn {

template <class S>
struct PersistentBackward {
  Problem<BackwardDirection<S>> problem;
  Geometry geometry;
  char* exchange;  // [D][replicas][2] of exchange_bytes(), zero
  uint32_t* arrived;  // [D][replicas], zero
  float* du;  // [D][shares][U, H], zero: each thread's share of dL/du; or null
};

template <class Cell, class M, Form kForm>
__global__ void __launch_bounds__(shape_of(kForm, false, M::kArithmetic, Cell::kInfo.gates).threads(), 1)
    persistent_backward(const PersistentBackward<typename M::Storage> p) {
  using S = typename M::Storage;
  using Elem = typename M::Elem;
  constexpr CellInfo kInfo = Cell::kInfo;
  constexpr int G = kInfo.gates;
  constexpr Shape kShape = shape_of(kForm, false, M::kArithmetic, G);
  constexpr bool kOneBlock = kForm == Form::kOneBlock;
  const Geometry& g = p.geometry;
  const int H = int(p.problem.H), units = kOneBlock ? H : units_of(kShape, 1);
  const Place place(g, units, H, int(p.problem.sequence.B));
  const Steps steps(p.problem.sequence, place, place.direction == 0);
  const Share mine(units, place, kShape.threads());
  const int j = place.first_unit + mine.unit;
  const BackwardDirection<S>& d = p.problem.direction[place.direction];
  const BackwardColumns<S, kInfo.states> columns(d, j);
  // mutant: gates-not-in-whole-chunks
  const int gate_numbers = g.chunks / G * M::kInChunk;  // H, in whole chunks

  const SharedMemory offsets = shared_memory(kForm, kShape, g);
  float* const partial = dev::shared<float>(offsets.partial);
  char* const here = kOneBlock ? dev::shared<char>(offsets.exchange) : nullptr;
  const Exchange<kOneBlock> exchange(g, place, p.exchange, here, p.arrived);

  if (kOneBlock)
    for (int i = int(threadIdx.x); i < 2 * g.exchange_bytes() / 4; i += kShape.threads())
      reinterpret_cast<uint32_t*>(here)[i] = 0;
  WarpTiles<M, kShape, kOneBlock> tiles(g, dev::shared<char>(offsets.weights),
                                        dev::shared<char>(offsets.stage));
  // Row r is unit r; K goes through the units of every gate, each gate in whole chunks.
  tiles.load([&](int unit, int chunk, int word) {
    const int number = M::number(chunk, word), gate = number / gate_numbers, k = number % gate_numbers;
    return M::pack([&](int i) {
      return unit < place.units && k + i < H
                 ? load(d.weights.w_hh[int64_t(gate) * H + k + i][place.first_unit + unit])
                 : 0.f;
    });
  });

  // Of each pair of the thread: its row, counted from the first one of a step; dL/d(states) by way of the
  // later steps; and dL/dh beside the product.
  int offset[kShape.pairs] = {};
  float dstate[kShape.pairs][kInfo.states] = {}, direct[kShape.pairs] = {};
  float u[array_length(kInfo.vectors)], du[array_length(kInfo.vectors)] = {};
#pragma unroll
  for (int k = 0; k < kInfo.vectors; ++k) u[k] = mine.row(0) < place.rows ? load(d.weights.u[k][j]) : 0.f;
#pragma unroll
  for (int i = 0; i < kShape.pairs; ++i) {
    if (mine.row(i) >= place.rows) break;
    const int batch = steps.batch(mine.row(i));
    offset[i] = steps.offset(mine.row(i));
#pragma unroll
    for (int k = 0; k < kInfo.states; ++k) dstate[i][k] = load(d.dstate[k][batch][j]);
  }
  __syncthreads();  // mutant: backward-without-barrier-before-steps

  // dL/dh before a step, of the rows that take part in it, from the gate gradients of all blocks.
  const auto recur = [&](int step, int active) {
    exchange.wait(step);
    tiles.multiply(exchange.columns(step), partial, [&](const uint4* q) { return exchange.load(q); });
    __syncthreads();  // mutant: backward-without-barrier-after-product
#pragma unroll
    for (int i = 0; i < kShape.pairs; ++i) {
      if (mine.row(i) >= active) break;  // mutant: rows-yet-to-begin
      float sum[1];
      total<kShape, kOneBlock>(sum, g, partial, mine.unit, mine.row(i));
      dstate[i][kH] = sum[0] + direct[i];  // mutant: no-direct-gradient
    }
  };

  int active_after = 0;
  Steps::Rows rows = steps.at(0);
  for (int step = 0; step < steps.T; ++step) {
    const auto [start, active] = rows;
    const Steps::Rows before = steps.at(step + 1);
    // Load what was saved from global memory before the barrier, which hides its latency.
    StepInputs<Cell, S> inputs[kShape.pairs];
#pragma unroll
    for (int i = 0; i < kShape.pairs; ++i) {
      const int b = mine.row(i);
      if (b >= active) break;
      // mutant: rows-begin-a-step-late
      inputs[i].fetch(columns, start + offset[i], b < before.active ? before.start + offset[i] : -1,
                      steps.batch(b), H);  // mutant: c0-in-another-order
    }
    if (step > 0) recur(step - 1, active_after);

    float dgates[kShape.pairs][kInfo.gradients()];
    // Signal the other blocks first; none of them reads dgates, so these stores may come after.
    const auto keep = [&](int i) {
      S* const to = &columns.dgates[start + offset[i]];
#pragma unroll
      for (int e = 0; e < kInfo.gradients(); ++e) to[e * H] = store<S>(dgates[i][e]);
    };
#pragma unroll
    for (int i = 0; i < kShape.pairs; ++i) {
      const int b = mine.row(i);
      if (b >= active) break;
      const int row = start + offset[i];
      const bool zero = steps.resets(row);
      const auto s = inputs[i].backward(columns, row, zero, u, dstate[i][kH], dstate[i]);
#pragma unroll
      for (int k = 0; k < kInfo.vectors; ++k) du[k] += s.du[k];  // mutant: vectors-count-the-last-row-alone
      if constexpr (kInfo.before(kH)) direct[i] = s.dbefore[kH];
#pragma unroll
      for (int k = 1; k < kInfo.states; ++k) dstate[i][k] = s.dbefore[k];
#pragma unroll
      for (int e = 0; e < kInfo.gradients(); ++e) dgates[i][e] = s.dgates[e];
      Elem* const to = reinterpret_cast<Elem*>(exchange.columns(step) + b * g.stride()) + j;
#pragma unroll
      for (int gate = 0; gate < G; ++gate)
        // mutant: gradients-of-other-gates, back-reset-does-not-stop-the-product
        to[gate * gate_numbers] = M::element(zero ? 0.f : s.dgates[kInfo.gradient_of_recurrent(gate)]);
      if constexpr (kOneBlock) keep(i);
    }
    exchange.arrive();
    if constexpr (!kOneBlock)
#pragma unroll
      for (int i = 0; i < kShape.pairs; ++i) {
        if (mine.row(i) >= active) break;
        keep(i);
      }
    active_after = active, rows = before;
  }

  if (steps.T > 0) recur(steps.T - 1, active_after);  // mutant: last-product-missed
#pragma unroll
  for (int i = 0; i < kShape.pairs; ++i) {
    if (mine.row(i) >= place.rows) break;
    const int batch = steps.batch(mine.row(i));
#pragma unroll
    for (int k = 0; k < kInfo.states; ++k) d.dstate[k][batch][j] = store<S>(dstate[i][k]);
  }
  if (kInfo.vectors > 0 && mine.row(0) < place.rows) {
    // mutant: shares-of-vectors-in-one-place
    const int share = (place.direction * g.replicas + place.replica) * mine.between + mine.first;
#pragma unroll
    for (int k = 0; k < kInfo.vectors; ++k) p.du[(int64_t(share) * kInfo.vectors + k) * H + j] = du[k];
  }
}

}  // namespace fastrnn
