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
};

template <class Cell, class M, Form kForm>
__global__ void __launch_bounds__(shape_of(kForm, M::kArithmetic, Cell::kGates).threads(), 1)
    persistent_backward(const PersistentBackward<typename M::Storage> p) {
  using S = typename M::Storage;
  using Elem = typename M::Elem;
  constexpr int G = Cell::kGates;
  constexpr Shape kShape = shape_of(kForm, M::kArithmetic, G);
  constexpr bool kOneBlock = kForm == Form::kSingle;
  const Geometry& g = p.geometry;
  const Sequence& sequence = p.problem.sequence;
  const int H = int(p.problem.H), thread = int(threadIdx.x);
  const Place place(g, H, int(sequence.B));
  const BackwardDirection<S>& d = p.problem.direction[place.direction];
  const bool reverse = place.direction == 1;
  const int pairs = place.units * place.rows;
  const int gate_numbers = g.chunks / G * M::kInChunk;  // H, in whole chunks

  const SharedMemory offsets = shared_memory(kShape, g);
  float* const partial = dev::shared<float>(offsets.partial);
  float* const dh = dev::shared<float>(offsets.h);
  float* const dc = dev::shared<float>(offsets.c);
  float* const direct = dev::shared<float>(offsets.direct);
  char* const here = kOneBlock ? dev::shared<char>(offsets.exchange) : nullptr;
  const Exchange<kOneBlock> exchange(g, place, p.exchange, here, p.arrived);

  const auto time = [&](int64_t step) { return reverse ? step : sequence.T - 1 - step; };
  const auto active_at = [&](int64_t step) { return int(sequence.rows(time(step))) - place.first_row; };

  if (kOneBlock)
    for (int i = thread; i < 2 * g.exchange_bytes() / 4; i += kShape.threads())
      reinterpret_cast<uint32_t*>(here)[i] = 0;
  WarpTiles<M, kShape> tiles(g, dev::shared<char>(offsets.weights));
  // Row r is unit r; K goes through the units of every gate, each gate in whole chunks.
  tiles.load([&](int unit, int chunk, int word) {
    const int number = M::number(chunk, word), gate = number / gate_numbers, k = number % gate_numbers;
    return M::pack([&](int i) {
      return unit < place.units && k + i < H
                 ? load(d.weights.w_hh[int64_t(gate) * H + k + i][place.first_unit + unit])
                 : 0.f;
    });
  });
  for (int pair = thread; pair < pairs; pair += kShape.threads()) {
    const int j = place.first_unit + pair % place.units;
    const int64_t batch = sequence.batch(place.first_row + pair / place.units);
    dh[pair] = load(d.dh[batch][j]);
    dc[pair] = Cell::kCellState ? load(d.dc[batch][j]) : 0.f;
    direct[pair] = 0.f;
  }
  __syncthreads();

  // dL/dh before a step, from the gate gradients of all blocks.
  const auto recur = [&](int64_t step) {
    exchange.wait(step);
    tiles.multiply(exchange.columns(step), partial, [&](const uint4* q) { return exchange.load(q); });
    __syncthreads();
    const int active = active_at(step);
    for (int pair = thread; pair < pairs; pair += kShape.threads()) {
      const int unit = pair % place.units, b = pair / place.units;
      if (b >= active) continue;
      dh[pair] = total<kShape>(g, partial, unit, b) + direct[pair];
    }
  };

  for (int64_t step = 0; step < sequence.T; ++step) {
    const int64_t t = time(step);
    const int active = active_at(step);
    // What was saved comes from far: it is on its way while the blocks meet.
    StepInputs<Cell, S> inputs[kShape.pairs];
#pragma unroll
    for (int i = 0; i < kShape.pairs; ++i) {
      const int pair = thread + i * kShape.threads(), b = pair / place.units;
      if (pair < pairs && b < active)
        inputs[i].fetch(sequence, d, t, place.first_row + b, place.first_unit + pair % place.units, H,
                        reverse);
    }
    if (step > 0) recur(step - 1);

    float dgates[kShape.pairs][Cell::kGradients];
    // What no other block waits for: said to have arrived before it is stored.
    const auto keep = [&](int i) {
      const int pair = thread + i * kShape.threads(), b = pair / place.units;
      if (pair >= pairs || b >= active) return;
      S* const to = d.dgates[sequence.row(t, place.first_row + b)] + place.first_unit + pair % place.units;
#pragma unroll
      for (int e = 0; e < Cell::kGradients; ++e) to[e * H] = store<S>(dgates[i][e]);
    };
#pragma unroll
    for (int i = 0; i < kShape.pairs; ++i) {
      const int pair = thread + i * kShape.threads(), b = pair / place.units, unit = pair % place.units;
      if (pair >= pairs || b >= active) continue;
      const int j = place.first_unit + unit;
      const bool zero = sequence.resets(t, place.first_row + b);
      inputs[i].backward(d, sequence.row(t, place.first_row + b), j, H, zero, dh[pair], dc[pair], dgates[i],
                         direct[pair], dc[pair]);
      Elem* const to = reinterpret_cast<Elem*>(exchange.columns(step) + b * g.stride()) + j;
#pragma unroll
      for (int gate = 0; gate < G; ++gate)
        to[gate * gate_numbers] = M::element(zero ? 0.f : dgates[i][Cell::recurrent(gate)]);
      if constexpr (kOneBlock) keep(i);
    }
    exchange.arrive();
    if constexpr (!kOneBlock)
#pragma unroll
      for (int i = 0; i < kShape.pairs; ++i) keep(i);
  }

  if (sequence.T > 0) recur(sequence.T - 1);
  for (int pair = thread; pair < pairs; pair += kShape.threads()) {
    const int j = place.first_unit + pair % place.units;
    const int64_t batch = sequence.batch(place.first_row + pair / place.units);
    d.dh[batch][j] = store<S>(dh[pair]);
    if constexpr (Cell::kCellState) d.dc[batch][j] = store<S>(dc[pair]);
  }
}

}  // namespace fastrnn
