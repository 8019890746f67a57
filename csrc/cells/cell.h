// What a cell is: the formulas of one time step, forward and backward, and nothing else. A cell knows
// neither time nor batch nor device. It is written once, on a vector type V (a CPU register of any
// width, a scalar on a GPU) and a policy M that supplies M::sigmoid and M::tanh for V.
//
//   struct Cell {
//     static constexpr const char* kName;      // its name in torch.ops.fastrnn
//     static constexpr int kGates;             // G: blocks of H rows in W_ih and W_hh
//     static constexpr int kSaved;             // S: activations per unit that the backward step wants
//     static constexpr int kGradients;         // E: gate gradients per unit that the backward step gives
//     static constexpr bool kCellState;        // has a second state c beside h
//     static constexpr bool kDirect;           // h_prev also reaches h without passing W_hh
//     static constexpr int kApart;             // so many last gates need the products of input and state
//     apart
//
//     forward<M>(x, a, h_prev, c, saved) -> h
//       x [G]      W_ih x_t + b_ih, in torch's gate order
//       a [G]      W_hh h_{t-1} + b_hh
//                  Of gates that are not kept apart only the sum x + a may be used.
//       c          in: c_{t-1}; out: c_t (only with kCellState)
//       saved [S]  what backward wants
//
//     backward<M>(saved, dsaved, h, h_prev, c, c_prev, dh, dc, dgates, dh_prev, dc_prev)
//       dsaved [S] further gradient with respect to the saved activations (second derivatives)
//       dh         dL/dh_t, complete; dc in: dL/dc_t from step t+1, out: complete
//       dgates [E] dL/d(gate before activation). The last G are those of x; those of a are
//                  dgates[recurrent(g)] for gate g of a
//       dh_prev    dL/dh_{t-1} by the direct way alone (only with kDirect)
//       dc_prev    dL/dc_{t-1} (only with kCellState)
//   };
#pragma once

#if defined(__CUDACC__)
#define FASTRNN_CELL __host__ __device__ __forceinline__ static
#else
#define FASTRNN_CELL __attribute__((always_inline)) static inline
#endif

namespace fastrnn {

/// Whether the gate gradients of a cell fit where its saved activations lie.
template <class Cell>
constexpr bool kInPlace = Cell::kSaved == Cell::kGradients;

}  // namespace fastrnn
