// A call of an operator: its tensors checked, its results allocated, and the problem that a kernel is told.
// The same for every device.
#pragma once
#include <tuple>

#include "cells/registry.h"
#include "common/arguments.h"

namespace fastrnn {

/// What an operator takes for each direction: a list of those that there are, and the set of these slots.
enum Slot { kWeightIh, kWeightHh, kBiasIh, kBiasHh, kWeightHr, kVectors, kSlots };

/// The sizes that all arguments agree on.
struct Sizes {
  int64_t D, B, I, H, P;
};

/// The weights of one layer.
class LayerWeights {
 public:
  LayerWeights(const CellInfo& cell, const Tensor& like, const Tensors& given, int64_t slots) {
    int64_t each = 0;
    for (int slot = 0; slot < kSlots; ++slot) each += slots >> slot & 1;
    const auto count = static_cast<int64_t>(given.size());
    STD_TORCH_CHECK(each > 0 && (count == each || count == kMaxDirections * each), "expected ", each,
                    " weights for each of 1 or 2 directions, got ", count);
    D = count / each;
    tensors_.resize(static_cast<size_t>(D * kSlots));
    for (size_t i = 0, next = 0; i < tensors_.size(); ++i)
      if (slots >> i % kSlots & 1) tensors_[i] = given[next++];
    const int64_t G = cell.gates;
    const bool dense = cell.dense, gates_given = cell.takes_gates;
    STD_TORCH_CHECK(has(kWeightIh) != gates_given, cell.name,
                    gates_given ? " takes no w_ih" : " takes w_ih [G*H, I]");
    STD_TORCH_CHECK(has(kWeightHh) == dense, cell.name, dense ? " takes w_hh [G*H, P]" : " takes no w_hh");
    STD_TORCH_CHECK((dense && !gates_given) || !has(kBiasHh), cell.name, " takes no b_hh");
    STD_TORCH_CHECK(!gates_given || !has(kBiasIh), cell.name, " takes no b_ih");
    const Tensor& sized = at(gates_given ? kWeightHh : kWeightIh);
    STD_TORCH_CHECK(sized.dim() == 2,
                    gates_given ? "w_hh must be matrices [G*H, P]" : "w_ih must be matrices [G*H, I]");
    projected = has(kWeightHr);
    STD_TORCH_CHECK(!projected || cell.projects, cell.name, " has no projection");
    STD_TORCH_CHECK(!projected || at(kWeightHr).dim() == 2, "w_hr must be matrices [P, H]");
    STD_TORCH_CHECK(has(kVectors) == (cell.vectors > 0), cell.name, cell.vectors ? " takes" : " takes no",
                    " vectors u");
    H = sized.size(0) / G, P = projected ? at(kWeightHr).size(0) : H;
    I = gates_given ? D * G * H : sized.size(1);  // the width of x
    STD_TORCH_CHECK(H > 0 && P > 0, "H and P must be positive, got ", H, " and ", P);
    const Arguments arguments(like);
    for (int64_t d = 0; d < D; ++d) {
      const auto check = [&](Slot slot, const char* name, const char* letters,
                             const std::vector<int64_t>& expected) {
        if (has(slot)) arguments.check(at(slot, d), name, letters, expected);
      };
      check(kWeightIh, "w_ih", "[G*H, I]", {G * H, I}), check(kWeightHh, "w_hh", "[G*H, P]", {G * H, P});
      check(kBiasIh, "b_ih", "[G*H]", {G * H}), check(kBiasHh, "b_hh", "[G*H]", {G * H});
      check(kWeightHr, "w_hr", "[P, H]", {P, H}), check(kVectors, "u", "[U, H]", {cell.vectors, H});
    }
    for (MaybeTensor& tensor : tensors_)
      if (tensor) tensor = tensor->dim() == 1 ? as_contiguous(*tensor) : with_rows(*tensor);
  }

  int64_t D, I, H, P;
  bool projected;

  /// In the form that pack() gives them; the tensors are then none.
  struct Packed {
    const char* panels = nullptr;
    bool pairs = false;  // they hold bfloat16
  } packed;
  LayerWeights(int64_t D_, int64_t I_, int64_t H_, int64_t P_, bool projected_, Packed packed_)
      : D(D_), I(I_), H(H_), P(P_), projected(projected_), packed(packed_), tensors_(size_t(D_ * kSlots)) {}

  bool has(Slot slot) const { return tensors_[slot].has_value(); }
  const Tensor& at(Slot slot, int64_t direction = 0) const {
    return *tensors_[size_t(direction * kSlots + slot)];
  }

  template <class S>
  Weights<S> of(int64_t d) const {
    const auto matrix = [&](Slot slot) { return has(slot) ? rows<S>(at(slot, d)) : Rows<const S>{}; };
    const auto vector = [&](Slot slot) {
      return has(slot) ? static_cast<const S*>(at(slot, d).const_data_ptr()) : nullptr;
    };
    return {matrix(kWeightIh), matrix(kWeightHh), vector(kBiasIh),
            vector(kBiasHh),   matrix(kWeightHr), matrix(kVectors)};
  }

 private:
  MaybeTensors tensors_;
};

/// h [D, B, P] and the others [D, B, H], contiguous.
inline Tensors check_states(const CellInfo& cell, const LayerWeights& weights, const Tensors& states) {
  STD_TORCH_CHECK(static_cast<int>(states.size()) == cell.states, cell.name, " has ", cell.states,
                  " states, got ", states.size());
  STD_TORCH_CHECK(states[kH].dim() == 3, "h0 must be [D, B, P]");
  const Arguments arguments(states[kH]);
  const int64_t B = states[kH].size(1);
  Tensors checked;
  for (const Tensor& state : states) {
    const bool is_h = checked.empty();
    arguments.check(state, is_h ? "h0" : "c0", is_h ? "[D, B, P]" : "[D, B, H]",
                    {weights.D, B, is_h ? weights.P : weights.H});
    checked.push_back(as_contiguous(state));
  }
  return checked;
}

inline int64_t rows_in(const Tensor& x, const char* name, const char* letters) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must be ", letters);
  return x.size(0);
}

/// How the rows of a sequence lie, as every operator takes it.
struct RowArguments {
  const MaybeTensor &batch_sizes, &lengths, &reset;
  bool batch_first;

  SequenceLayout layout(const Tensor& like, int64_t N, int64_t B) const {
    if (reset) Arguments(like).check_device(*reset, "reset");
    return {N, B, batch_sizes, lengths, reset, batch_first};
  }
};

/// What a forward scan keeps beside y and the last states.
enum Keep : int64_t { kNothing, kForBackward, kHistory };

/// What the problems of both scans have in common.
struct ScanCall {
  const CellInfo& cell;
  const LayerWeights& weights;
  Tensors states;  // before the first step
  Sizes sizes;
  int64_t N;
  SequenceLayout layout;

  ScanCall(const CellInfo& cell_, const LayerWeights& weights_, const Tensors& states_, const Tensor& rows,
           const char* name, const char* letters, const RowArguments& given)
      : cell(cell_),
        weights(weights_),
        states(check_states(cell_, weights_, states_)),
        sizes{weights_.D, states[kH].size(1), weights_.I, weights_.H, weights_.P},
        N(rows_in(rows, name, letters)),
        layout(given.layout(rows, N, sizes.B)) {}

  const Tensor& like() const { return states[kH]; }
  int64_t width(int state) const { return state == kH ? sizes.P : sizes.H; }

  template <class Problem>
  Problem describe(const Sequence& sequence) const {
    Problem problem{};
    problem.sequence = sequence, problem.H = sizes.H, problem.P = sizes.P;
    problem.directions = static_cast<int>(sizes.D);
    return problem;
  }

  /// The columns of direction d in rows [N, D*P].
  template <class S>
  Rows<S> columns(const Tensor& y, int64_t d) const {
    return {static_cast<S*>(y.data_ptr()) + d * sizes.P, y.stride(0)};
  }
};

/// fastrnn::scan
struct ForwardCall : ScanCall {
  Tensor x, y;
  Tensors last, history, saved;  // results beside y

  ForwardCall(const CellInfo& cell_, const LayerWeights& weights_, const Tensor& x_, const Tensors& states_,
              const RowArguments& given, int64_t keep)
      : ScanCall(cell_, weights_, states_, x_, "x", "[N, I]", given), x(with_rows(x_)) {
    const auto [D, B, I, H, P] = sizes;
    STD_TORCH_CHECK(keep >= kNothing && keep <= kHistory, "keep must be 0, 1 or 2, got ", keep);
    Arguments(like()).check(x_, "x", "[N, I]", {N, I});
    y = empty({N, D * P}, like());
    last.push_back(empty({D, B, P}, like()));
    for (int k = 1; k < cell.states; ++k) {
      last.push_back(torch::stable::clone(states[size_t(k)]));
      if (keep != kNothing) history.push_back(empty({D, N, H}, like()));
    }
    if (keep == kForBackward && cell.saved > 0) saved.push_back(empty({D, N, cell.saved_width(H)}, like()));
  }

  template <class S>
  ForwardProblem<S> problem(const Sequence& sequence) const {
    auto problem = describe<ForwardProblem<S>>(sequence);
    problem.x = rows<S>(x), problem.I = sizes.I, problem.projected = weights.projected;
    problem.packed = weights.packed.panels, problem.pairs = weights.packed.pairs;
    for (int64_t d = 0; d < sizes.D; ++d) {
      ForwardDirection<S>& direction = problem.direction[d];
      direction.weights = weights.of<S>(d);
      direction.h0 = direction_rows<const S>(states[kH], d);
      direction.history[kH] = columns<S>(y, d);
      for (size_t k = 0; k < last.size(); ++k) direction.last[k] = direction_rows<S>(last[k], d);
      for (size_t k = 0; k < history.size(); ++k) direction.history[k + 1] = direction_rows<S>(history[k], d);
      if (!saved.empty()) direction.saved = direction_rows<S>(saved[0], d);
    }
    return problem;
  }

  std::tuple<Tensor, Tensors, Tensors, Tensors> results() const { return {y, last, history, saved}; }
};

/// fastrnn::scan_backward and its overload that writes over what was saved
struct BackwardCall : ScanCall {
  Tensor y;
  Tensors history;
  MaybeTensor saved;
  MaybeTensors doutput;  // of every state
  bool over;
  Tensor dgates;  // results
  Tensors dstates, complete, du;

  BackwardCall(const CellInfo& cell_, const LayerWeights& weights_, const MaybeTensor& dy,
               const MaybeTensors& dlast, const MaybeTensors& dhistory, const Tensor& y_,
               const Tensors& history_, const MaybeTensor& saved_, const Tensors& states_,
               const RowArguments& given, bool keep, bool over_)
      : ScanCall(cell_, weights_, states_, y_, "y", "[N, D*P]", given),
        y(as_contiguous(y_)),
        saved(contiguous_if(saved_)),
        over(over_) {
    const auto [D, B, I, H, P] = sizes;
    const Arguments arguments(like());
    const auto others = static_cast<size_t>(cell.states - 1);
    STD_TORCH_CHECK(dlast.size() == others + 1 && dhistory.size() == others && history_.size() == others,
                    cell.name, " has ", cell.states, " states, got ", dlast.size(),
                    " gradients of the last ones, ", dhistory.size(), " of the others' histories and ",
                    history_.size(), " histories");
    STD_TORCH_CHECK(saved.has_value() == (cell.saved > 0), cell.name,
                    cell.saved ? " wants what was saved" : " saves nothing");
    STD_TORCH_CHECK(!over || (cell.reuses_saved && saved_->is_contiguous()),
                    "only contiguous numbers of a cell that reuses them can be written over");
    arguments.check(y_, "y", "[N, D*P]", {N, D * P});
    if (saved) arguments.check(*saved, "saved", "[D, N, S*H + R]", {D, N, cell.saved_width(H)});
    if (dy) arguments.check(*dy, "dy", "[N, D*P]", {N, D * P});
    doutput.push_back(dy ? MaybeTensor(with_rows(*dy)) : std::nullopt);
    for (size_t k = 0; k < others; ++k) {
      arguments.check(history_[k], "history", "[D, N, H]", {D, N, H});
      history.push_back(as_contiguous(history_[k]));
      if (dhistory[k]) arguments.check(*dhistory[k], "dhistory", "[D, N, H]", {D, N, H});
      doutput.push_back(contiguous_if(dhistory[k]));
    }
    for (int k = 0; k < cell.states; ++k) {
      const std::vector<int64_t> shape{D, B, width(k)};
      const MaybeTensor& given = dlast[size_t(k)];
      if (given) arguments.check(*given, "dlast", k == kH ? "[D, B, P]" : "[D, B, H]", shape);
      dstates.push_back(given ? torch::stable::clone(as_contiguous(*given))
                              : torch::stable::new_zeros(like(), shape));
      if (keep || (k == kH && weights.projected)) complete.push_back(empty({D, N, width(k)}, like()));
    }
    dgates = over ? *saved : empty({D, N, cell.gradients() * H}, like());
    for (int64_t d = 0; d < D && cell.vectors > 0; ++d)
      du.push_back(torch::stable::new_zeros(like(), {cell.vectors, H}));
  }

  template <class S>
  BackwardProblem<S> problem(const Sequence& sequence) const {
    auto problem = describe<BackwardProblem<S>>(sequence);
    for (int64_t d = 0; d < sizes.D; ++d) {
      BackwardDirection<S>& direction = problem.direction[d];
      direction.weights = weights.of<S>(d);
      direction.history[kH] = columns<const S>(y, d);
      if (doutput[kH]) direction.doutput[kH] = columns<const S>(*doutput[kH], d);
      for (size_t k = 0; k < states.size(); ++k) {
        direction.initial[k] = direction_rows<const S>(states[k], d);
        direction.dstate[k] = direction_rows<S>(dstates[k], d);
        if (k > kH) direction.history[k] = direction_rows<const S>(history[k - 1], d);
        if (k > kH && doutput[k]) direction.doutput[k] = direction_rows<const S>(*doutput[k], d);
        if (k < complete.size()) direction.complete[k] = direction_rows<S>(complete[k], d);
      }
      if (saved) direction.saved = direction_rows<const S>(*saved, d);
      direction.dgates = direction_rows<S>(dgates, d);
      if (!du.empty()) direction.du = {static_cast<S*>(du[size_t(d)].mutable_data_ptr()), sizes.H};
    }
    return problem;
  }
};

/// fastrnn::weight_gradients
struct ProductsCall : ScanCall {
  Tensor dgates, x, y;
  // Results: dx [N, I] or none; of each direction dw_ih, dw_hh, db_ih, db_hh, those that the cell takes, or
  // none.
  Tensors dx, dweights;

  ProductsCall(const CellInfo& cell_, const LayerWeights& weights_, const Tensor& dgates_, const Tensor& x_,
               const Tensor& y_, const Tensors& states_, const RowArguments& given, bool inputs,
               bool wants_weights)
      : ScanCall(cell_, weights_, states_, x_, "x", "[N, I]", given),
        dgates(as_contiguous(dgates_)),
        x(with_rows(x_)),
        y(as_contiguous(y_)) {
    const auto [D, B, I, H, P] = sizes;
    const int64_t GH = cell.gates * H;
    const Arguments arguments(like());
    arguments.check(dgates_, "dgates", "[D, N, E*H]", {D, N, cell.gradients() * H});
    arguments.check(x_, "x", "[N, I]", {N, I});
    arguments.check(y_, "y", "[N, D*P]", {N, D * P});
    STD_TORCH_CHECK(!inputs || !cell.takes_gates, "the gradient of given gates is dgates");
    if (inputs) dx.push_back(empty({N, I}, like()));
    for (int64_t d = 0; d < D && wants_weights; ++d) {
      if (!cell.takes_gates) dweights.push_back(empty({GH, I}, like()));
      if (cell.dense) dweights.push_back(empty({GH, P}, like()));
      if (cell.takes_gates) continue;
      for (int bias = 0; bias < (cell.dense ? 2 : 1); ++bias) dweights.push_back(empty({GH}, like()));
    }
  }

  template <class S>
  ProductsProblem<S> problem(const Sequence& sequence) const {
    auto problem = describe<ProductsProblem<S>>(sequence);
    problem.x = rows<S>(x), problem.I = sizes.I, problem.weights = !dweights.empty();
    if (!dx.empty()) problem.dx = {static_cast<S*>(dx[0].mutable_data_ptr()), sizes.I};
    for (int64_t d = 0; d < sizes.D; ++d) {
      ProductsDirection<S>& direction = problem.direction[d];
      direction.weights = weights.of<S>(d);
      direction.dgates = direction_rows<const S>(dgates, d);
      direction.y = columns<const S>(y, d);
      direction.h0 = direction_rows<const S>(states[kH], d);
      if (dweights.empty()) continue;
      size_t next = size_t(d) * (dweights.size() / size_t(sizes.D));
      const auto take = [&] { return static_cast<S*>(dweights[next++].mutable_data_ptr()); };
      if (!cell.takes_gates) direction.dw_ih = {take(), sizes.I};
      if (cell.dense) direction.dw_hh = {take(), sizes.P};
      if (!cell.takes_gates) direction.db_ih = take();
      if (!cell.takes_gates && cell.dense) direction.db_hh = take();
    }
    return problem;
  }
};

}  // namespace fastrnn
