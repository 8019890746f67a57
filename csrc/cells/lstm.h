// Long short-term memory with forget gates (Hochreiter and Schmidhuber 1997; Gers et al. 2000), as in
// torch.nn.LSTM; and with peepholes (Gers and Schmidhuber 2000), through which i and f see c_{t-1}, and o
// c_t.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

template <bool kPeephole>
struct LstmCell {
  enum Gate { kInput, kForget, kCandidate, kOutput };
  enum Vector { kPeepInput, kPeepForget, kPeepOutput };  // weight_ci, weight_cf, weight_co
  static constexpr CellInfo kInfo{.name = kPeephole ? "lstm_peephole" : "lstm",
                                  .gates = 4,
                                  .states = 2,
                                  .reads_before = only(kC),
                                  .reads_after = only(kC),
                                  .vectors = kPeephole ? 3 : 0,
                                  .saved = 4,
                                  .reuses_saved = true,
                                  .projects = true,
                                  .candidate = true,
                                  .clips = true};

  template <class M, class V, class Options>
  FASTRNN_INLINE static void forward(ForwardUnit<LstmCell, V, Options>& s) {
    const V c_prev = s.before[kC];
    V a_i = s.a[kInput], a_f = s.a[kForget], a_o = s.a[kOutput];
    if constexpr (kPeephole) {
      a_i += s.u[kPeepInput] * c_prev;
      a_f += s.u[kPeepForget] * c_prev;
    }
    const V i = M::sigmoid(a_i), f = M::sigmoid(a_f), g = M::tanh(s.a[kCandidate]);
    const V c = s.options.updated(f * c_prev + i * s.options.candidate(g));
    if constexpr (kPeephole) a_o += s.u[kPeepOutput] * c;
    const V o = M::sigmoid(a_o);
    s.after[kC] = c;
    s.after[kH] = o * M::tanh(c);
    s.saved[kInput] = i;
    s.saved[kForget] = f;
    s.saved[kCandidate] = g;
    s.saved[kOutput] = o;
  }

  template <class M, class V, class Options>
  FASTRNN_INLINE static void backward(BackwardUnit<LstmCell, V, Options>& s) {
    const V i = s.saved[kInput], f = s.saved[kForget], g = s.saved[kCandidate], o = s.saved[kOutput];
    const V c_prev = s.before[kC], candidate = s.options.candidate(g), unclipped = f * c_prev + i * candidate;
    const V c = s.options.updated_again(unclipped, s.after[kC]), tanh_c = M::tanh(c), dh = s.dafter[kH];
    const V d_o = dh * tanh_c * o * (1 - o);
    V dc = s.dafter[kC] + dh * o * (1 - tanh_c * tanh_c);
    if constexpr (kPeephole) dc += d_o * s.u[kPeepOutput];
    s.dafter[kC] = dc = s.options.complete(dc);
    dc = s.options.before_clip(unclipped, dc);
    const V d_i = dc * candidate * i * (1 - i), d_f = dc * c_prev * f * (1 - f);
    s.dgates[kInput] = d_i;
    s.dgates[kForget] = d_f;
    s.dgates[kCandidate] = s.options.candidate(dc * i * (1 - g * g));
    s.dgates[kOutput] = d_o;
    s.dbefore[kC] = dc * f;
    if constexpr (kPeephole) {
      s.dbefore[kC] += d_i * s.u[kPeepInput] + d_f * s.u[kPeepForget];
      s.du[kPeepInput] = d_i * c_prev;
      s.du[kPeepForget] = d_f * c_prev;
      s.du[kPeepOutput] = d_o * c;
    }
  }
};

using Lstm = LstmCell<false>;
using LstmPeephole = LstmCell<true>;

}  // namespace fastrnn
