// LSTM with layer normalisation (Ba et al. 2016, eq. 20-22): a = gain_ih n(W_ih x) + b_ih + gain_hh n(W_hh h)
// + b_hh, h = o tanh(gain_c n(c) + shift_c), each n over all units of a row; c is carried as it is. The part
// of x is made for all steps at once, by torch.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

struct LstmLayerNorm {
  enum Gate { kInput, kForget, kCandidate, kOutput, kGates };
  // gain_hh of each gate, b_hh of each gate, gain_c, shift_c
  enum Vector { kGain, kBias = kGates, kGainC = 2 * kGates, kShiftC, kVectors };
  // Mean and 1 / standard deviation of W_hh h, and those of c.
  enum Row { kMean, kScale, kMeanC, kScaleC, kNumbers };
  static constexpr int kNorm = kGates;  // saved beside the gates: n(W_hh h) of each
  static constexpr CellInfo kInfo{.name = "lstm_layer_norm",
                                  .gates = kGates,
                                  .split = kGates,
                                  .states = 2,
                                  .reads_before = only(kC),
                                  .reads_after = only(kC),
                                  .vectors = kVectors,
                                  .saved = 2 * kGates,
                                  .takes_gates = true,
                                  .stages = 5,
                                  .saves_in = 2,
                                  .backward_stages = 3,
                                  .complete_in = 1,
                                  .row_numbers = kNumbers};

  // Mean and variance in two stages each: their difference in one would lose the digits of a small variance.
  template <int kStage, class S>
  FASTRNN_INLINE static void row(const S* sums, S units, S* numbers) {
    const S mean = sums[0] / (kStage < 2 ? 4 * units : units);
    if constexpr (kStage == 0) numbers[kMean] = mean;
    if constexpr (kStage == 1) numbers[kScale] = scale(mean);
    if constexpr (kStage == 2) numbers[kMeanC] = mean;
    if constexpr (kStage == 3) numbers[kScaleC] = scale(mean);
  }

  template <class M, int kStage, class V>
  FASTRNN_INLINE static void forward(ForwardUnit<LstmLayerNorm, V>& s) {
    s.sums[0] = s.sums[1] = V{};
    if constexpr (kStage == 0) s.sums[0] = s.a[kInput] + s.a[kForget] + s.a[kCandidate] + s.a[kOutput];
    if constexpr (kStage == 1)
      for (int g = 0; g < kGates; ++g) s.sums[0] += (s.a[g] - s.row[kMean]) * (s.a[g] - s.row[kMean]);
    if constexpr (kStage == 2) {
      const V i = M::sigmoid(argument(s, kInput)), f = M::sigmoid(argument(s, kForget));
      const V g = M::tanh(argument(s, kCandidate)), o = M::sigmoid(argument(s, kOutput));
      s.after[kC] = f * s.before[kC] + i * g;
      s.saved[kInput] = i;
      s.saved[kForget] = f;
      s.saved[kCandidate] = g;
      s.saved[kOutput] = o;
      for (int g = 0; g < kGates; ++g) s.saved[kNorm + g] = (s.a[g] - s.row[kMean]) * s.row[kScale];
      s.sums[0] = s.after[kC];
    }
    const V centred = s.after[kC] - s.row[kMeanC];
    if constexpr (kStage == 3) s.sums[0] = centred * centred;
    if constexpr (kStage == 4)
      s.after[kH] =
          M::sigmoid(argument(s, kOutput)) * M::tanh(s.u[kGainC] * (centred * s.row[kScaleC]) + s.u[kShiftC]);
  }

  template <class M, int kStage, class V>
  FASTRNN_INLINE static void backward(BackwardUnit<LstmLayerNorm, V>& s) {
    const V i = s.saved[kInput], f = s.saved[kForget], g = s.saved[kCandidate], o = s.saved[kOutput];
    V *const dproduct = s.dgates, *const da = s.dgates + kGates;  // of W_hh h, and of the gates' arguments
    s.sums[0] = s.sums[1] = V{};
    if constexpr (kStage < 2) {
      const V n = (s.after[kC] - s.row[kMeanC]) * s.row[kScaleC], dh = s.dafter[kH];
      const V t = M::tanh(s.u[kGainC] * n + s.u[kShiftC]);
      const V dt = dh * o * (1 - t * t), dn = dt * s.u[kGainC];
      if constexpr (kStage == 0) {
        for (int gate = 0; gate < kGates; ++gate) dproduct[gate] = da[gate] = V{};
        da[kOutput] = dh * t * o * (1 - o);
        s.du[kGainC] = dt * n;
        s.du[kShiftC] = dt;
        s.sums[0] = dn;
        s.sums[1] = dn * n;
        return;
      }
      const V dc = s.dafter[kC] + s.row[kScaleC] * (dn - (s.total[0][0] + n * s.total[0][1]) / s.units);
      s.dafter[kC] = dc;
      s.dbefore[kC] = dc * f;
      da[kInput] = dc * g * i * (1 - i);
      da[kForget] = dc * s.before[kC] * f * (1 - f);
      da[kCandidate] = dc * i * (1 - g * g);
      for (int gate = 0; gate < kGates; ++gate) {
        const V dnorm = da[gate] * s.u[kGain + gate];
        s.du[kGain + gate] = da[gate] * s.saved[kNorm + gate];
        s.du[kBias + gate] = da[gate];
        s.sums[0] += dnorm;
        s.sums[1] += dnorm * s.saved[kNorm + gate];
      }
    } else {
      for (int gate = 0; gate < kGates; ++gate) {
        const V rest = (s.total[1][0] + s.saved[kNorm + gate] * s.total[1][1]) / (4 * s.units);
        dproduct[gate] = s.row[kScale] * (da[gate] * s.u[kGain + gate] - rest);
      }
    }
  }

 private:
  template <class S>
  FASTRNN_INLINE static S scale(S variance) {
    return 1 / square_root(variance + S(1e-5));  // as torch.nn.LayerNorm has it
  }
  template <class V>
  FASTRNN_INLINE static V argument(const ForwardUnit<LstmLayerNorm, V>& s, int gate) {
    return s.x[gate] + s.u[kGain + gate] * ((s.a[gate] - s.row[kMean]) * s.row[kScale]) + s.u[kBias + gate];
  }
};

}  // namespace fastrnn
