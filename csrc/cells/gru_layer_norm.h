// Gated recurrent units with normalisation, n over all units of a row of all three gates.
//   gru_layer_norm: torch.nn.GRU of x's part gain_ih n(W_ih x) + b_ih, made for all steps at once by torch,
//     and the recurrent one gain n(W_hh h) + shift, shift being b_hh (Ba et al. 2016).
//   layer_norm_gru: Dreamer's (Hafner et al. 2020). r, c, u = gain n(W_ih x + bias + W_hh h) + shift, then
//     h' = u tanh(sigmoid(r) c) + (1 - u) h with u = sigmoid(u - 1).
//   rms_norm_gru: the same, where n divides by the root of the mean square.
#pragma once
#include "cells/cell.h"

namespace fastrnn {

enum class Norm { kApart, kTogether, kRms };  // of W_hh h, or of its sum with x's part

template <Norm kNorm>
struct NormGru {
  static constexpr bool kTogether = kNorm != Norm::kApart, kCentred = kNorm != Norm::kRms;
  static constexpr int kReset = 0, kUpdate = kTogether ? 2 : 1, kNew = 3 - kUpdate, kGates = 3;
  // gain and shift of each gate; what is added to the variance, of which the mean over the units counts
  enum Vector { kGain, kShift = kGates, kEps = 2 * kGates, kVectors = kTogether ? kEps + 1 : kEps };
  enum Saved { kNormed, kSavedReset = kGates, kSavedUpdate, kSavedNew, kSaved };
  enum Row { kScale, kMean };  // 1 / standard deviation
  static constexpr CellInfo kInfo{.name = kNorm == Norm::kApart      ? "gru_layer_norm"
                                          : kNorm == Norm::kTogether ? "layer_norm_gru"
                                                                     : "rms_norm_gru",
                                  .gates = kGates,
                                  .split = kGates,
                                  .reads_before = only(kH),
                                  .vectors = kVectors,
                                  .saved = kSaved,
                                  .takes_gates = true,
                                  .stages = kCentred ? 3 : 2,
                                  .saves_in = kCentred ? 2 : 1,
                                  .backward_stages = 2,
                                  .complete_in = 0,
                                  .row_numbers = kCentred ? 2 : 1};

  // Mean and variance in a stage each: their difference in one would lose the digits of a small variance.
  template <int kStage, class S>
  FASTRNN_INLINE static void row(const S* sums, S units, S* numbers) {
    const S mean = sums[0] / (kGates * units);
    if constexpr (kStage == kInfo.stages - 2)
      numbers[kScale] = 1 / square_root(kTogether ? mean : mean + S(1e-5));  // as torch.nn.LayerNorm has it
    else
      numbers[kMean] = mean;
  }

  template <class M, int kStage, class V>
  FASTRNN_INLINE static void forward(ForwardUnit<NormGru, V>& s) {
    s.sums[0] = s.sums[1] = V{};
    if constexpr (kStage == kInfo.stages - 1) {
      V q[kGates], x[kGates]{};
      for (int g = 0; g < kGates; ++g) {
        s.saved[kNormed + g] = centred(s, g) * s.row[kScale];
        q[g] = s.u[kGain + g] * s.saved[kNormed + g] + s.u[kShift + g];
        if constexpr (!kTogether) x[g] = s.x[g];
      }
      const V r = M::sigmoid(x[kReset] + q[kReset]);
      const V z = M::sigmoid(kTogether ? 1 - q[kUpdate] : x[kUpdate] + q[kUpdate]);  // 1 - sigmoid(u - 1)
      const V n = M::tanh(x[kNew] + r * q[kNew]);
      s.after[kH] = n + z * (s.before[kH] - n);
      s.saved[kSavedReset] = r;
      s.saved[kSavedUpdate] = z;
      s.saved[kSavedNew] = n;
    } else if constexpr (kStage == kInfo.stages - 2) {
      for (int g = 0; g < kGates; ++g) s.sums[0] += centred(s, g) * centred(s, g);
      if constexpr (kTogether) s.sums[0] += kGates * s.u[kEps];
    } else {
      for (int g = 0; g < kGates; ++g) s.sums[0] += product(s, g);
    }
  }

  template <class M, int kStage, class V>
  FASTRNN_INLINE static void backward(BackwardUnit<NormGru, V>& s) {
    V *const dproduct = s.dgates, *const dx = s.dgates + kGates;  // of W_hh h, and of x's part
    s.sums[0] = s.sums[1] = V{};
    if constexpr (kStage == 0) {
      const V r = s.saved[kSavedReset], z = s.saved[kSavedUpdate], n = s.saved[kSavedNew];
      const V q = s.u[kGain + kNew] * s.saved[kNormed + kNew] + s.u[kShift + kNew], dh = s.dafter[kH];
      const V dn = dh * (1 - z) * (1 - n * n), dz = dh * (s.before[kH] - n) * z * (1 - z);
      V dq[kGates];
      dq[kReset] = dx[kReset] = dn * q * r * (1 - r);
      dq[kUpdate] = dx[kUpdate] = kTogether ? -dz : dz;
      dq[kNew] = dn * r;
      dx[kNew] = dn;
      for (int g = 0; g < kGates; ++g) {
        s.du[kGain + g] = dq[g] * s.saved[kNormed + g];
        s.du[kShift + g] = dq[g];
        dproduct[g] = dq[g] * s.u[kGain + g];
        s.sums[0] += dproduct[g];
        s.sums[1] += dproduct[g] * s.saved[kNormed + g];
      }
      s.dbefore[kH] = dh * z;
    } else {
      for (int g = 0; g < kGates; ++g) {
        V rest = s.saved[kNormed + g] * s.total[0][1];
        if constexpr (kCentred) rest += s.total[0][0];
        dproduct[g] = s.row[kScale] * (dproduct[g] - rest / (kGates * s.units));
        if constexpr (kTogether) dx[g] = dproduct[g];
      }
      if constexpr (kTogether) s.du[kEps] = s.row[kScale] * s.row[kScale] * s.total[0][1] / (-2 * s.units);
    }
  }

 private:
  template <class V>
  FASTRNN_INLINE static V product(const ForwardUnit<NormGru, V>& s, int gate) {
    return kTogether ? s.x[gate] + s.a[gate] : s.a[gate];
  }
  template <class V>
  FASTRNN_INLINE static V centred(const ForwardUnit<NormGru, V>& s, int gate) {
    if constexpr (kCentred) return product(s, gate) - s.row[kMean];
    return product(s, gate);
  }
};

using GruLayerNorm = NormGru<Norm::kApart>;
using LayerNormGru = NormGru<Norm::kTogether>;
using RmsNormGru = NormGru<Norm::kRms>;

}  // namespace fastrnn
