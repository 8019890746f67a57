// Long short-term memory with forget gates (Hochreiter and Schmidhuber 1997; Gers et al. 2000), as in
// torch.nn.LSTM.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

struct Lstm {
  enum Gate { kInput, kForget, kCandidate, kOutput };
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4, kSaved = 4, kGradients = 4, kApart = 0;
  static constexpr bool kCellState = true, kDirect = false;

  FASTRNN_CELL constexpr int recurrent(int gate) { return gate; }

  template <class M, class V>
  FASTRNN_CELL V forward(const V* x, const V* a, V /*h_prev*/, V& c, V* saved) {
    const V i = M::sigmoid(x[kInput] + a[kInput]);
    const V f = M::sigmoid(x[kForget] + a[kForget]);
    const V g = M::tanh(x[kCandidate] + a[kCandidate]);
    const V o = M::sigmoid(x[kOutput] + a[kOutput]);
    c = f * c + i * g;
    saved[kInput] = i;
    saved[kForget] = f;
    saved[kCandidate] = g;
    saved[kOutput] = o;
    return o * M::tanh(c);
  }

  template <class M, class V>
  FASTRNN_CELL void backward(const V* saved, const V* dsaved, V /*h*/, V /*h_prev*/, V c, V c_prev, V dh,
                             V& dc, V* dgates, V& /*dh_prev*/, V& dc_prev) {
    const V i = saved[kInput], f = saved[kForget], g = saved[kCandidate], o = saved[kOutput];
    const V tanh_c = M::tanh(c);
    dc = dc + dh * o * (1 - tanh_c * tanh_c);
    dgates[kInput] = (dc * g + dsaved[kInput]) * i * (1 - i);
    dgates[kForget] = (dc * c_prev + dsaved[kForget]) * f * (1 - f);
    dgates[kCandidate] = (dc * i + dsaved[kCandidate]) * (1 - g * g);
    dgates[kOutput] = (dh * tanh_c + dsaved[kOutput]) * o * (1 - o);
    dc_prev = dc * f;
  }
};

}  // namespace fastrnn
