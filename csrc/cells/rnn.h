// The simple recurrent network (Elman 1990), h = act(W_ih x + b_ih + W_hh h + b_hh), as in torch.nn.RNN.
// Its derivative is a function of h alone, so nothing is saved.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

template <class Activation>
struct Rnn {
  static constexpr CellInfo kInfo{.name = Activation::kName, .gates = 1, .reads_after = only(kH)};

  template <class M, class V>
  FASTRNN_INLINE static void forward(ForwardUnit<Rnn, V>& s) {
    s.after[kH] = Activation::template value<M>(s.a[0]);
  }

  template <class M, class V>
  FASTRNN_INLINE static void backward(BackwardUnit<Rnn, V>& s) {
    s.dgates[0] = Activation::gradient(s.after[kH], s.dafter[kH]);
  }
};

struct Tanh {
  static constexpr const char* kName = "rnn_tanh";
  template <class M, class V>
  FASTRNN_INLINE static V value(V x) {
    return M::tanh(x);
  }
  template <class V>
  FASTRNN_INLINE static V gradient(V h, V dh) {
    return dh * (1 - h * h);
  }
};

struct Relu {
  static constexpr const char* kName = "rnn_relu";
  template <class M, class V>
  FASTRNN_INLINE static V value(V x) {
    return x < 0 ? V{} : x;  // in this order a NaN stays one
  }
  template <class V>
  FASTRNN_INLINE static V gradient(V h, V dh) {
    return h <= 0 ? V{} : dh;  // torch: zero at h = 0, and dh where h is NaN
  }
};

using RnnTanh = Rnn<Tanh>;
using RnnRelu = Rnn<Relu>;

}  // namespace fastrnn
