// The simple recurrent network (Elman 1990), h = act(W_ih x + b_ih + W_hh h + b_hh), as in torch.nn.RNN.
// Its derivative is a function of h alone, so nothing is saved.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

template <class Activation>
struct Rnn {
  static constexpr const char* kName = Activation::kName;
  static constexpr int kGates = 1, kSaved = 0, kGradients = 1, kApart = 0;
  static constexpr bool kCellState = false, kDirect = false;

  FASTRNN_CELL constexpr int recurrent(int gate) { return gate; }

  template <class M, class V>
  FASTRNN_CELL V forward(const V* x, const V* a, V /*h_prev*/, V& /*c*/, V* /*saved*/) {
    return Activation::template value<M>(x[0] + a[0]);
  }

  template <class M, class V>
  FASTRNN_CELL void backward(const V* /*saved*/, const V* /*dsaved*/, V h, V /*h_prev*/, V /*c*/,
                             V /*c_prev*/, V dh, V& /*dc*/, V* dgates, V& /*dh_prev*/, V& /*dc_prev*/) {
    dgates[0] = Activation::gradient(h, dh);
  }
};

struct Tanh {
  static constexpr const char* kName = "rnn_tanh";
  template <class M, class V>
  FASTRNN_CELL V value(V x) {
    return M::tanh(x);
  }
  template <class V>
  FASTRNN_CELL V gradient(V h, V dh) {
    return dh * (1 - h * h);
  }
};

struct Relu {
  static constexpr const char* kName = "rnn_relu";
  template <class M, class V>
  FASTRNN_CELL V value(V x) {
    return x < 0 ? V{} : x;  // in this order a NaN stays one
  }
  template <class V>
  FASTRNN_CELL V gradient(V h, V dh) {
    return h <= 0 ? V{} : dh;  // torch: zero at h = 0, and dh where h is NaN
  }
};

using RnnTanh = Rnn<Tanh>;
using RnnRelu = Rnn<Relu>;

}  // namespace fastrnn
