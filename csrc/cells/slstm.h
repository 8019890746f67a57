// sLSTM (Beck et al. 2024, xLSTM, section 2.2), as its authors' code has it: an LSTM whose input gate is an
// exponential, with a normalizer n, the sum of its gates, and a stabilizer m, with which no exponential is
// above 1. A unit with n = 0 has seen nothing yet, and takes its first input with weight 1.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

struct Slstm {
  enum Gate { kInput, kForget, kCandidate, kOutput };
  enum SlstmState { kNormalizer = kC + 1, kStabilizer };
  // lead = log f + m - a_i, by how much the past leads over the input; keep = 1 - f, the derivative of log f.
  enum Saved { kLead, kKeep, kSavedCandidate, kSavedOutput };
  static constexpr CellInfo kInfo{.name = "slstm",
                                  .gates = 4,
                                  .states = 4,
                                  .reads_before = only(kC) | only(kNormalizer) | only(kStabilizer),
                                  .reads_after = only(kC) | only(kNormalizer),
                                  .saved = 4,
                                  .reuses_saved = true};

  template <class M, class V>
  FASTRNN_INLINE static void forward(ForwardUnit<Slstm, V>& s) {
    const V a_i = s.a[kInput], a_f = s.a[kForget], c_prev = s.before[kC], n_prev = s.before[kNormalizer];
    const V past = M::log_sigmoid(a_f) + s.before[kStabilizer], lead = past - a_i;
    const V g = M::tanh(s.a[kCandidate]), o = M::sigmoid(s.a[kOutput]);
    const Mixture<V> mix = mixture<M>(lead, n_prev);
    const V c = mix.past * c_prev + mix.input * g, n = mix.past * n_prev + mix.input;
    s.after[kH] = o * c / n;
    s.after[kC] = c;
    s.after[kNormalizer] = n;
    const V larger = lead > 0 ? past : lead <= 0 ? a_i : past + a_i;  // a NaN stays one
    s.after[kStabilizer] = n_prev == 0 ? a_i : larger;
    s.saved[kLead] = lead;
    s.saved[kKeep] = M::sigmoid(-a_f);
    s.saved[kSavedCandidate] = g;
    s.saved[kSavedOutput] = o;
  }

  template <class M, class V>
  FASTRNN_INLINE static void backward(BackwardUnit<Slstm, V>& s) {
    const V lead = s.saved[kLead], g = s.saved[kSavedCandidate], o = s.saved[kSavedOutput];
    const V c_prev = s.before[kC], n_prev = s.before[kNormalizer];
    const Mixture<V> mix = mixture<M>(lead, n_prev);
    const V mean = s.after[kC] / s.after[kNormalizer], d_mean = s.dafter[kH] * o;
    const V dc = s.dafter[kC] + d_mean / s.after[kNormalizer], dm = s.dafter[kStabilizer];
    const V dn = s.dafter[kNormalizer] - d_mean * mean / s.after[kNormalizer];
    // The share of the larger one's gradient that is the past's: half where both are equal, as in
    // torch.maximum.
    const V zero{}, half = zero + 0.5f, one = zero + 1;
    const V leads = lead > 0 ? one : lead == 0 ? half : zero, share = n_prev == 0 ? zero : leads;
    const V d_lead = (1 - leads) * mix.past * (dc * c_prev + dn * n_prev) - share * mix.input * (dc * g + dn);
    const V d_past = d_lead + share * dm;
    s.dgates[kInput] = (1 - share) * dm - d_lead;
    s.dgates[kForget] = d_past * s.saved[kKeep];
    s.dgates[kCandidate] = dc * mix.input * (1 - g * g);
    s.dgates[kOutput] = s.dafter[kH] * mean * o * (1 - o);
    s.dafter[kC] = dc;
    s.dafter[kNormalizer] = dn;
    s.dbefore[kC] = dc * mix.past;
    s.dbefore[kNormalizer] = dn * mix.past;
    s.dbefore[kStabilizer] = d_past;
  }

 private:
  template <class V>
  struct Mixture {
    V past, input;
  };

  /// e^(log f + m - m'), where n = 0 at most 1, and e^(a_i - m'). One of them is 1.
  template <class M, class V>
  FASTRNN_INLINE static Mixture<V> mixture(V lead, V n_prev) {
    const V smaller = M::exp(lead > 0 ? -lead : lead), one = V{} + 1;
    return {lead > 0 ? one : smaller, (lead > 0) & (n_prev != 0) ? smaller : one};
  }
};

}  // namespace fastrnn
