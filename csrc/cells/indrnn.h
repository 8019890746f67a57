// Independently recurrent network (Li et al. 2018): h = act(W_ih x + b_ih + u h_{t-1}), each unit by itself.
#pragma once
#include "cells/rnn.h"

namespace fastrnn {

template <class Activation>
struct IndRnn {
  static constexpr CellInfo kInfo{.name = std::is_same_v<Activation, Tanh> ? "indrnn_tanh" : "indrnn_relu",
                                  .gates = 1,
                                  .reads_before = only(kH),
                                  .reads_after = only(kH),
                                  .vectors = 1,
                                  .dense = false};

  template <class M, class V>
  FASTRNN_INLINE static void forward(ForwardUnit<IndRnn, V>& s) {
    s.after[kH] = Activation::template value<M>(s.a[0] + s.u[0] * s.before[kH]);
  }

  template <class M, class V>
  FASTRNN_INLINE static void backward(BackwardUnit<IndRnn, V>& s) {
    const V d = Activation::gradient(s.after[kH], s.dafter[kH]);
    s.dgates[0] = d;
    s.dbefore[kH] = d * s.u[0];
    s.du[0] = d * s.before[kH];
  }
};

using IndRnnTanh = IndRnn<Tanh>;
using IndRnnRelu = IndRnn<Relu>;

}  // namespace fastrnn
