// The forward scan in one launch: every block keeps its rows of W_hh on the multiprocessor for all steps.
#pragma once
#include "cells/cell.h"
#include "common/problem.h"
#include "cuda/tiles.cuh"

namespace fastrnn {

/// Everything but what follows from the problem: gates of the input made before, and room for the exchange.
template <class S>
struct PersistentForward {
  Problem<ForwardDirection<S>> problem;
  Rows<const S> gates_x[kMaxDirections];  // [N, G*H] = x W_ih^T + b_ih
  Geometry geometry;
  char* exchange;     // [D][replicas][2] of exchange_bytes(), zero
  uint32_t* arrived;  // [D][replicas], zero
};

template <class Cell, class M, Form kForm>
__global__ void __launch_bounds__(shape_of(kForm, M::kArithmetic, Cell::kGates).threads(), 1)
    persistent_forward(const PersistentForward<typename M::Storage> p) {
  using S = typename M::Storage;
  using Elem = typename M::Elem;
  using Math = MathOf<S>;
  constexpr int G = Cell::kGates;
  constexpr Shape kShape = shape_of(kForm, M::kArithmetic, G);
  constexpr bool kOneBlock = kForm == Form::kSingle;
  const Geometry& g = p.geometry;
  const Sequence& sequence = p.problem.sequence;
  const int H = int(p.problem.H), thread = int(threadIdx.x);
  const Place place(g, H, int(sequence.B));
  const ForwardDirection<S>& d = p.problem.direction[place.direction];
  const Rows<const S> gates_x = p.gates_x[place.direction];
  const int pairs = place.units * place.rows;

  const SharedMemory offsets = shared_memory(kShape, g);
  float* const partial = dev::shared<float>(offsets.partial);
  float* const bias = dev::shared<float>(offsets.bias);
  float* const h = dev::shared<float>(offsets.h);
  float* const c = dev::shared<float>(offsets.c);
  char* const here = kOneBlock ? dev::shared<char>(offsets.exchange) : nullptr;
  const Exchange<kOneBlock> exchange(g, place, p.exchange, here, p.arrived);

  const auto time = [&](int64_t step) { return place.direction == 0 ? step : sequence.T - 1 - step; };
  const auto publish = [&](int64_t step, int b, int unit, float value) {
    const bool zero = sequence.resets_if_any(time(step), place.first_row + b);
    reinterpret_cast<Elem*>(exchange.columns(step) + b * g.stride())[place.first_unit + unit] =
        M::element(zero ? 0.f : value);
  };

  if (kOneBlock) {
    for (int i = thread; i < 2 * g.exchange_bytes() / 4; i += kShape.threads())
      reinterpret_cast<uint32_t*>(here)[i] = 0;
    __syncthreads();
  }
  WarpTiles<M, kShape> tiles(g, dev::shared<char>(offsets.weights));
  // Row r of the block is gate r / units of unit r % units.
  tiles.load([&](int row, int chunk, int word) {
    const int gate = row / g.units, unit = row % g.units, k = M::number(chunk, word);
    const bool inside = gate < G && unit < place.units;
    const S* const from = d.weights.w_hh[int64_t(gate) * H + place.first_unit + unit];
    return M::pack([&](int i) { return inside && k + i < H ? load(from[k + i]) : 0.f; });
  });
  for (int row = thread; row < G * g.units; row += kShape.threads()) {
    const int gate = row / g.units, unit = row % g.units;
    bias[row] =
        d.weights.b_hh && unit < place.units ? load(d.weights.b_hh[gate * H + place.first_unit + unit]) : 0.f;
  }
  for (int pair = thread; pair < pairs; pair += kShape.threads()) {
    const int unit = pair % place.units, b = pair / place.units, j = place.first_unit + unit;
    const int64_t batch = sequence.batch(place.first_row + b);
    h[pair] = load(d.h0[batch][j]);
    if constexpr (Cell::kCellState) c[pair] = load(d.c[batch][j]);
    publish(0, b, unit, h[pair]);
  }
  exchange.arrive();

  for (int64_t step = 0; step < sequence.T; ++step) {
    const int64_t t = time(step);
    const int active = int(sequence.rows(t)) - place.first_row;
    // The input's gates come from far: they are on their way while the blocks meet.
    S input[kShape.pairs][G];
#pragma unroll
    for (int i = 0; i < kShape.pairs; ++i) {
      const int pair = thread + i * kShape.threads(), b = pair / place.units;
      if (pair >= pairs || b >= active) continue;
      const S* const from =
          gates_x[sequence.row(t, place.first_row + b)] + place.first_unit + pair % place.units;
#pragma unroll
      for (int gate = 0; gate < G; ++gate) input[i][gate] = from[gate * H];
    }
    exchange.wait(step);
    tiles.multiply(exchange.columns(step), partial, [&](const uint4* q) { return exchange.load(q); });
    __syncthreads();

    float saved[kShape.pairs][larger(Cell::kSaved, 1)];
    // What no other block waits for: said to have arrived before it is stored.
    const auto keep = [&](int i) {
      const int pair = thread + i * kShape.threads(), b = pair / place.units;
      if (pair >= pairs || b >= active) return;
      const int j = place.first_unit + pair % place.units;
      const int64_t row = sequence.row(t, place.first_row + b);
      d.y[row][j] = store<S>(h[pair]);
      if (d.saved)
#pragma unroll
        for (int s = 0; s < Cell::kSaved; ++s) d.saved[row][s * H + j] = store<S>(saved[i][s]);
      if (Cell::kCellState && d.saved_c) d.saved_c[row][j] = store<S>(c[pair]);
    };
#pragma unroll
    for (int i = 0; i < kShape.pairs; ++i) {
      const int pair = thread + i * kShape.threads(), b = pair / place.units, unit = pair % place.units;
      if (pair >= pairs) continue;
      if (b < active) {
        float x[G], a[G];
#pragma unroll
        for (int gate = 0; gate < G; ++gate) {
          const int row = gate * g.units + unit;
          x[gate] = load(input[i][gate]);
          a[gate] = total<kShape>(g, partial, row, b) + bias[row];
        }
        const bool zero = sequence.resets(t, place.first_row + b);
        float cell_state = Cell::kCellState && !zero ? c[pair] : 0.f;
        h[pair] = Cell::template forward<Math>(x, a, zero ? 0.f : h[pair], cell_state, saved[i]);
        c[pair] = cell_state;
      }
      publish(step + 1, b, unit, h[pair]);
      if constexpr (kOneBlock) keep(i);
    }
    exchange.arrive();
    if constexpr (!kOneBlock)
#pragma unroll
      for (int i = 0; i < kShape.pairs; ++i) keep(i);
  }

  for (int pair = thread; pair < pairs; pair += kShape.threads()) {
    const int j = place.first_unit + pair % place.units;
    const int64_t batch = sequence.batch(place.first_row + pair / place.units);
    d.h_n[batch][j] = store<S>(h[pair]);
    if constexpr (Cell::kCellState) d.c[batch][j] = store<S>(c[pair]);
  }
}

}  // namespace fastrnn
