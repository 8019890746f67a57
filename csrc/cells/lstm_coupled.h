// Long short-term memory with coupled gates (Greff et al. 2017, "CIFG"): what is forgotten makes room for
// what comes in, i = 1 - f, so that three gates remain.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

struct LstmCoupled {
  enum Gate { kForget, kCandidate, kOutput };
  static constexpr CellInfo kInfo{.name = "lstm_coupled",
                                  .gates = 3,
                                  .states = 2,
                                  .reads_before = only(kC),
                                  .reads_after = only(kC),
                                  .saved = 3,
                                  .reuses_saved = true,
                                  .projects = true,
                                  .candidate = true,
                                  .clips = true};

  template <class M, class V, class Options>
  FASTRNN_INLINE static void forward(ForwardUnit<LstmCoupled, V, Options>& s) {
    const V c_prev = s.before[kC];
    const V f = M::sigmoid(s.a[kForget]), g = M::tanh(s.a[kCandidate]), o = M::sigmoid(s.a[kOutput]);
    const V c = s.options.updated(f * c_prev + (1 - f) * s.options.candidate(g));
    s.after[kC] = c;
    s.after[kH] = o * M::tanh(c);
    s.saved[kForget] = f;
    s.saved[kCandidate] = g;
    s.saved[kOutput] = o;
  }

  template <class M, class V, class Options>
  FASTRNN_INLINE static void backward(BackwardUnit<LstmCoupled, V, Options>& s) {
    const V f = s.saved[kForget], g = s.saved[kCandidate], o = s.saved[kOutput];
    const V c_prev = s.before[kC], candidate = s.options.candidate(g);
    const V unclipped = f * c_prev + (1 - f) * candidate;
    const V tanh_c = M::tanh(s.options.updated_again(unclipped, s.after[kC])), dh = s.dafter[kH];
    V dc = s.dafter[kC] + dh * o * (1 - tanh_c * tanh_c);
    s.dafter[kC] = dc = s.options.complete(dc);
    dc = s.options.before_clip(unclipped, dc);
    s.dgates[kForget] = dc * (c_prev - candidate) * f * (1 - f);
    s.dgates[kCandidate] = s.options.candidate(dc * (1 - f) * (1 - g * g));
    s.dgates[kOutput] = dh * tanh_c * o * (1 - o);
    s.dbefore[kC] = dc * f;
  }
};

}  // namespace fastrnn
