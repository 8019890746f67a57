// Long short-term memory with forget gates (Hochreiter and Schmidhuber 1997; Gers et al. 2000), as in
// torch.nn.LSTM.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

struct Lstm {
  enum Gate { kInput, kForget, kCandidate, kOutput };
  static constexpr CellInfo kInfo{.name = "lstm",
                                  .gates = 4,
                                  .states = 2,
                                  .reads_before = only(kC),
                                  .reads_after = only(kC),
                                  .saved = 4,
                                  .reuses_saved = true,
                                  .projects = true};

  template <class M, class V>
  FASTRNN_INLINE static void forward(ForwardUnit<Lstm, V>& s) {
    const V i = M::sigmoid(s.a[kInput]);
    const V f = M::sigmoid(s.a[kForget]);
    const V g = M::tanh(s.a[kCandidate]);
    const V o = M::sigmoid(s.a[kOutput]);
    const V c = f * s.before[kC] + i * g;
    s.after[kC] = c;
    s.after[kH] = o * M::tanh(c);
    s.saved[kInput] = i;
    s.saved[kForget] = f;
    s.saved[kCandidate] = g;
    s.saved[kOutput] = o;
  }

  template <class M, class V>
  FASTRNN_INLINE static void backward(BackwardUnit<Lstm, V>& s) {
    const V i = s.saved[kInput], f = s.saved[kForget], g = s.saved[kCandidate], o = s.saved[kOutput];
    const V tanh_c = M::tanh(s.after[kC]), dh = s.dafter[kH];
    const V dc = s.dafter[kC] + dh * o * (1 - tanh_c * tanh_c);
    s.dgates[kInput] = dc * g * i * (1 - i);
    s.dgates[kForget] = dc * s.before[kC] * f * (1 - f);
    s.dgates[kCandidate] = dc * i * (1 - g * g);
    s.dgates[kOutput] = dh * tanh_c * o * (1 - o);
    s.dafter[kC] = dc;
    s.dbefore[kC] = dc * f;
  }
};

}  // namespace fastrnn
