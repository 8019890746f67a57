// Gated recurrent unit (Cho et al. 2014) as in torch.nn.GRU and cuDNN: the reset gate acts after the
// product with W_hn, so that one product serves all three gates.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

struct Gru {
  enum Gate { kReset, kUpdate, kNew };
  // q = W_hn h_{t-1} + b_hn is saved beside the three activated gates.
  enum Saved { kSavedReset, kSavedUpdate, kSavedNew, kSavedProduct };
  // The new gate is split: it has a gradient with respect to q, and one with respect to the argument of tanh.
  enum Gradient { kGradProduct, kGradReset, kGradUpdate, kGradNew };
  static constexpr CellInfo kInfo{.name = "gru",
                                  .gates = 3,
                                  .split = 1,
                                  .reads_before = only(kH),
                                  .saved = 4,
                                  .reuses_saved = true,
                                  .candidate = true};

  template <class M, class V, class Options>
  FASTRNN_INLINE static void forward(ForwardUnit<Gru, V, Options>& s) {
    const V q = s.a[kNew], h_prev = s.before[kH];
    const V r = M::sigmoid(s.a[kReset]);
    const V z = M::sigmoid(s.a[kUpdate]);
    const V n = M::tanh(s.x[0] + r * q);
    const V candidate = s.options.candidate(n);
    s.after[kH] = candidate + z * (h_prev - candidate);
    s.saved[kSavedReset] = r;
    s.saved[kSavedUpdate] = z;
    s.saved[kSavedNew] = n;
    s.saved[kSavedProduct] = q;
  }

  template <class M, class V, class Options>
  FASTRNN_INLINE static void backward(BackwardUnit<Gru, V, Options>& s) {
    const V r = s.saved[kSavedReset], z = s.saved[kSavedUpdate], n = s.saved[kSavedNew];
    const V q = s.saved[kSavedProduct], dh = s.dafter[kH];
    const V dn = s.options.candidate(dh * (1 - z) * (1 - n * n));
    s.dgates[kGradProduct] = dn * r;
    s.dgates[kGradReset] = dn * q * r * (1 - r);
    s.dgates[kGradUpdate] = dh * (s.before[kH] - s.options.candidate(n)) * z * (1 - z);
    s.dgates[kGradNew] = dn;
    s.dbefore[kH] = dh * z;
  }
};

}  // namespace fastrnn
