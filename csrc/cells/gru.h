// Gated recurrent unit (Cho et al. 2014) as in torch.nn.GRU and cuDNN: the reset gate acts after the
// product with W_hn, so that one product serves all three gates.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

struct Gru {
  enum Gate { kReset, kUpdate, kNew };
  // q = W_hn h_{t-1} + b_hn is saved beside the three activated gates.
  enum Saved { kSavedReset, kSavedUpdate, kSavedNew, kSavedProduct };
  // The new gate has two gradients: with respect to q, and with respect to the whole argument of tanh.
  // In this order the gradients of x (r, z, n) and of a (q, r, z) are each contiguous.
  enum Gradient { kGradProduct, kGradReset, kGradUpdate, kGradNew };
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3, kSaved = 4, kGradients = 4, kApart = 1;
  static constexpr bool kCellState = false, kDirect = true;

  FASTRNN_CELL constexpr int recurrent(int gate) { return gate == kNew ? kGradProduct : gate + 1; }

  template <class M, class V>
  FASTRNN_CELL V forward(const V* x, const V* a, V h_prev, V& /*c*/, V* saved) {
    const V r = M::sigmoid(x[kReset] + a[kReset]);
    const V z = M::sigmoid(x[kUpdate] + a[kUpdate]);
    const V n = M::tanh(x[kNew] + r * a[kNew]);
    saved[kSavedReset] = r;
    saved[kSavedUpdate] = z;
    saved[kSavedNew] = n;
    saved[kSavedProduct] = a[kNew];
    return n + z * (h_prev - n);
  }

  template <class M, class V>
  FASTRNN_CELL void backward(const V* saved, const V* dsaved, V /*h*/, V h_prev, V /*c*/, V /*c_prev*/, V dh,
                             V& /*dc*/, V* dgates, V& dh_prev, V& /*dc_prev*/) {
    const V r = saved[kSavedReset], z = saved[kSavedUpdate], n = saved[kSavedNew];
    const V q = saved[kSavedProduct];
    const V dn = (dh * (1 - z) + dsaved[kSavedNew]) * (1 - n * n);
    dgates[kGradProduct] = dn * r + dsaved[kSavedProduct];
    dgates[kGradReset] = (dn * q + dsaved[kSavedReset]) * r * (1 - r);
    dgates[kGradUpdate] = (dh * (h_prev - n) + dsaved[kSavedUpdate]) * z * (1 - z);
    dgates[kGradNew] = dn;
    dh_prev = dh * z;
  }
};

}  // namespace fastrnn
