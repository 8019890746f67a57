// The forward scan in one launch: every block keeps its rows of W_hh on the multiprocessor for all steps.
#pragma once
#include "cells/cell.h"
#include "common/problem.h"
#include "cuda/tiles.cuh"

namespace fastrnn {

/// Arguments of the kernel: the problem, the input's part of the gates, computed before, and the exchange
/// buffers.
template <class S>
struct PersistentForward {
  Problem<ForwardDirection<S>> problem;
  Rows<const S> gates_x[kMaxDirections];  // [N, G*H] = x W_ih^T + b_ih
  Geometry geometry;
  char* exchange;     // [D][replicas][2] of exchange_bytes(), zero
  uint32_t* arrived;  // [D][replicas], zero
};

template <class Cell, class M, Form kForm>
__global__ void __launch_bounds__(shape_of(kForm, true, M::kArithmetic, Cell::kInfo.gates).threads(), 1)
    persistent_forward(const PersistentForward<typename M::Storage> p) {
  using S = typename M::Storage;
  using Elem = typename M::Elem;
  using Math = MathOf<S>;
  constexpr CellInfo kInfo = Cell::kInfo;
  constexpr int G = kInfo.gates;
  constexpr Shape kShape = shape_of(kForm, true, M::kArithmetic, G);
  constexpr bool kOneBlock = kForm == Form::kOneBlock;
  const Geometry& g = p.geometry;
  const int H = int(p.problem.H), units = kOneBlock ? H : units_of(kShape, G);
  const Place place(g, units, H, int(p.problem.sequence.B));
  const Steps steps(p.problem.sequence, place, place.direction == 1);
  const Share mine(units, place, kShape.threads());
  const int j = place.first_unit + mine.unit;
  const ForwardDirection<S>& d = p.problem.direction[place.direction];
  const Column<const S> gates_x(p.gates_x[place.direction], j);
  const Column<S> saved_gates(d.saved, j);
  Column<S> history[kInfo.states];
#pragma unroll
  for (int k = 0; k < kInfo.states; ++k) history[k] = {d.history[k], j};

  const SharedMemory offsets = shared_memory(kForm, kShape, g);
  float* const partial = dev::shared<float>(offsets.partial);
  char* const here = kOneBlock ? dev::shared<char>(offsets.exchange) : nullptr;
  const Exchange<kOneBlock> exchange(g, place, p.exchange, here, p.arrived);

  if (kOneBlock) {
    for (int i = int(threadIdx.x); i < 2 * g.exchange_bytes() / 4; i += kShape.threads())
      reinterpret_cast<uint32_t*>(here)[i] = 0;  // mutant: forward-exchange-not-cleared
    __syncthreads();  // mutant: forward-without-barrier-after-clearing
  }
  WarpTiles<M, kShape, kOneBlock> tiles(g, dev::shared<char>(offsets.weights),
                                        dev::shared<char>(offsets.stage));
  // Row r of the block is gate r % G of unit r / G.
  tiles.load([&](int row, int chunk, int word) {
    const int gate = row % G, unit = row / G, k = M::number(chunk, word);
    const bool inside = unit < place.units;
    const S* const from = d.weights.w_hh[int64_t(gate) * H + place.first_unit + unit];
    return M::pack([&](int i) { return inside && k + i < H ? load(from[k + i]) : 0.f; });
  });

  // Of each pair of the thread:
  int offset[kShape.pairs] = {};  // its row, counted from the first one of a step
  float state[kShape.pairs][kInfo.states] = {}, bias[G], u[array_length(kInfo.vectors)];
  const auto publish = [&](int step, int i) {
    const int b = mine.row(i);
    reinterpret_cast<Elem*>(exchange.columns(step) + b * g.stride())[j] =
        // mutant: reset-does-not-reach-the-product
        M::element(steps.resets_if_any(step, b, offset[i]) ? 0.f : state[i][kH]);
  };
#pragma unroll
  for (int gate = 0; gate < G; ++gate)
    bias[gate] = d.weights.b_hh && mine.row(0) < place.rows ? load(d.weights.b_hh[gate * H + j]) : 0.f;
#pragma unroll
  for (int k = 0; k < kInfo.vectors; ++k) u[k] = mine.row(0) < place.rows ? load(d.weights.u[k][j]) : 0.f;
#pragma unroll
  for (int i = 0; i < kShape.pairs; ++i) {
    if (mine.row(i) >= place.rows) break;
    const int batch = steps.batch(mine.row(i));
    offset[i] = steps.offset(mine.row(i));
    state[i][kH] = load(d.h0[batch][j]);  // mutant: h0-in-another-order
#pragma unroll
    for (int k = 1; k < kInfo.states; ++k) state[i][k] = load(d.last[k][batch][j]);
    publish(0, i);
  }
  exchange.arrive();

  for (int step = 0; step < steps.T; ++step) {
    const auto [start, active] = steps.at(step);
    // Load the input's gates from global memory before the barrier, which hides their latency.
    S input[kShape.pairs][G];
#pragma unroll
    for (int i = 0; i < kShape.pairs; ++i) {
      if (mine.row(i) >= active) break;
      const S* const from = &gates_x[start + offset[i]];
#pragma unroll
      for (int gate = 0; gate < G; ++gate) input[i][gate] = from[gate * H];  // mutant: input-of-another-gate
    }
    exchange.wait(step);
    tiles.multiply(exchange.columns(step), partial, [&](const uint4* q) { return exchange.load(q); });
    __syncthreads();  // mutant: forward-without-barrier-after-product

    float saved[kShape.pairs][array_length(kInfo.saved)];
    // Signal the other blocks first; none of them reads history or saved, so these stores may come after.
    const auto keep = [&](int i) {
      const int row = start + offset[i];
      history[kH][row] = store<S>(state[i][kH]);
      if (saved_gates) {
        S* const to = &saved_gates[row];
#pragma unroll
        for (int k = 0; k < kInfo.saved; ++k) to[k * H] = store<S>(saved[i][k]);
      }
#pragma unroll
      for (int k = 1; k < kInfo.states; ++k)
        if (history[k]) history[k][row] = store<S>(state[i][k]);
    };
#pragma unroll
    for (int i = 0; i < kShape.pairs; ++i) {
      const int b = mine.row(i);
      if (b >= place.rows) break;
      if (b < active) {  // mutant: ended-rows-go-on
        float sums[G];
        total<kShape, kOneBlock>(sums, g, partial, mine.unit, b);
        ForwardUnit<Cell, float> s{};
#pragma unroll
        // mutant: no-bias
        for (int gate = 0; gate < G; ++gate) s.set_gate(gate, load(input[i][gate]), sums[gate] + bias[gate]);
        const bool zero = steps.resets(start + offset[i]);
#pragma unroll
        // mutant: reset-does-not-reach-c, reset-does-not-reach-h
        for (int k = 0; k < kInfo.states; ++k) s.before[k] = zero ? 0.f : state[i][k];
#pragma unroll
        for (int k = 0; k < kInfo.vectors; ++k) s.u[k] = u[k];
        Cell::template forward<Math>(s);
#pragma unroll
        for (int k = 0; k < kInfo.states; ++k) state[i][k] = s.after[k];
#pragma unroll
        for (int k = 0; k < kInfo.saved; ++k) saved[i][k] = s.saved[k];
      }
      publish(step + 1, i);
      if (kOneBlock && b < active) keep(i);  // mutant: ended-rows-are-stored
    }
    exchange.arrive();
    if constexpr (!kOneBlock)
#pragma unroll
      for (int i = 0; i < kShape.pairs; ++i) {
        if (mine.row(i) >= active) break;
        keep(i);
      }
  }

#pragma unroll
  for (int i = 0; i < kShape.pairs; ++i) {
    if (mine.row(i) >= place.rows) break;
    const int batch = steps.batch(mine.row(i));
#pragma unroll
    for (int k = 0; k < kInfo.states; ++k) d.last[k][batch][j] = store<S>(state[i][k]);
  }
}

}  // namespace fastrnn
