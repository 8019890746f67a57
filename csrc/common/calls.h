// A call of an operator: its tensors checked, its results allocated, and the problem that a kernel is told.
// The same for every device.
#pragma once
#include <algorithm>
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
    bfloat16 = is_bfloat16(like, sized);
    H = sized.size(0) / G, P = projected ? at(kWeightHr).size(0) : H;
    I = gates_given ? D * G * H : sized.size(1);  // the width of x
    STD_TORCH_CHECK(H > 0 && P > 0, "H and P must be positive, got ", H, " and ", P);
    const Arguments arguments(like);
    for (int64_t d = 0; d < D; ++d) {
      const auto check = [&](Slot slot, const char* name, const char* letters,
                             const std::vector<int64_t>& expected) {
        if (has(slot)) arguments.check(at(slot, d), name, letters, expected);
      };
      const auto check_matrix = [&](Slot slot, const char* name, const char* letters,
                                    const std::vector<int64_t>& expected) {
        if (has(slot)) arguments.check(at(slot, d), name, letters, expected, bfloat16);
      };
      check_matrix(kWeightIh, "w_ih", "[G*H, I]", {G * H, I});
      check_matrix(kWeightHh, "w_hh", "[G*H, P]", {G * H, P});
      check_matrix(kWeightHr, "w_hr", "[P, H]", {P, H});
      check(kBiasIh, "b_ih", "[G*H]", {G * H}), check(kBiasHh, "b_hh", "[G*H]", {G * H});
      check(kVectors, "u", "[U, H]", {cell.vectors, H});
    }
    for (MaybeTensor& tensor : tensors_)
      if (tensor) tensor = tensor->dim() == 1 ? as_contiguous(*tensor) : with_rows(*tensor);
  }

  int64_t D, I, H, P;
  bool projected;
  bool bfloat16 = false;  // the matrices are, beside states in float32

  /// In the form that pack() gives them; the tensors are then none.
  struct Packed {
    const char* panels = nullptr;
    Storage storage = Storage::kAsGiven;
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
  static bool is_bfloat16(const Tensor& like, const Tensor& matrix) {
    using torch::headeronly::ScalarType;
    return like.is_cpu() && like.scalar_type() == ScalarType::Float &&
           matrix.scalar_type() == ScalarType::BFloat16;
  }

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

/// The options that act on the states between the steps, as every operator takes them: tensors, those that
/// there are of the slots below; numbers, one for each below, 0 where it is off. Without options there are
/// none.
struct OptionArguments {
  enum Slot { kKeep, kCandidate = kKeep + kZoned, kRecurrent, kFresh, kResetTo = kFresh + kZoned };
  enum Number { kShare, kCellClip = kShare + kZoned, kGradientClip, kNumbers };
  const Tensors& tensors;
  int64_t slots;
  const std::vector<double>& numbers;
};

/// The same of one call, checked.
class CallOptions {
 public:
  using Given = OptionArguments;

  CallOptions(const CellInfo& cell, const Sizes& sizes, int64_t N, int64_t T, bool has_reset,
              const Tensor& like, const Given& given) {
    if (given.numbers.empty() && given.tensors.empty()) return;
    const auto [D, B, I, H, P] = sizes;
    STD_TORCH_CHECK(given.numbers.size() == Given::kNumbers, "expected ", int(Given::kNumbers),
                    " numbers of options, got ", given.numbers.size());
    numbers_ = given.numbers;
    for (const double number : numbers_)
      STD_TORCH_CHECK(number >= 0, "numbers of options must not be negative, got ", number);
    tensors_.resize(size_t(Given::kResetTo + cell.states));
    size_t next = 0;
    const size_t count = given.tensors.size();
    for (size_t slot = 0; slot < tensors_.size(); ++slot)
      if (given.slots >> slot & 1 && next < count) tensors_[slot] = given.tensors[next++];
    STD_TORCH_CHECK(next == count && given.slots >> tensors_.size() == 0,
                    "the tensors of options must be those of their slots");
    for (int k = 0; k < kZoned; ++k) {
      const auto width = k == kH ? P : H;
      STD_TORCH_CHECK(numbers_[size_t(k)] <= 1, "zoneout must be at most 1, got ", numbers_[size_t(k)]);
      STD_TORCH_CHECK(k < cell.states || numbers_[size_t(k)] == 0, cell.name, " has no c for zoneout");
      if (MaybeTensor& keep = tensors_[size_t(Given::kKeep + k)]) {
        STD_TORCH_CHECK(keep->scalar_type() == torch::headeronly::ScalarType::Bool && numbers_[size_t(k)] > 0,
                        "the masks of zoneout must be bool, with a number above 0");
        Arguments(like).check_device(*keep, "keep");
        Arguments::check_sizes(*keep, "keep", "[D, N, *]", {D, N, width});
        keep = as_contiguous(*keep);
      }
      if (MaybeTensor& fresh = tensors_[size_t(Given::kFresh + k)]) {
        Arguments(like).check(*fresh, "fresh", "[D, N, *]", {D, N, width});
        fresh = as_contiguous(*fresh);
      }
    }
    if (MaybeTensor& mask = tensors_[Given::kCandidate]) {
      STD_TORCH_CHECK(cell.candidate, cell.name, " takes no factor of the candidate");
      Arguments(like).check(*mask, "candidate", "[D, N, H]", {D, N, H});
      mask = as_contiguous(*mask);
    }
    if (MaybeTensor& mask = tensors_[Given::kRecurrent]) {
      STD_TORCH_CHECK(cell.dense, cell.name, " has no product for a factor of h");
      Arguments(like).check(*mask, "recurrent", "[D, B, P]", {D, B, P});
      mask = as_contiguous(*mask);
    }
    for (int k = 0; k < cell.states; ++k) {
      MaybeTensor& to = tensors_[size_t(Given::kResetTo + k)];
      if (!to) continue;
      STD_TORCH_CHECK(has_reset, "reset_to needs reset");
      std::vector<int64_t> shape{D, B, k == kH ? P : H};
      if (to->dim() == 4) shape.insert(shape.begin(), T);
      Arguments(like).check(*to, "reset_to", "[D, B, *] or [T, D, B, *]", shape);
      to = with_rows(*to);
      resets_to = true;
    }
    STD_TORCH_CHECK(numbers_[Given::kCellClip] == 0 || cell.clips, cell.name, " takes no cell_clip");
    STD_TORCH_CHECK(numbers_[Given::kGradientClip] == 0 || cell.clips || cell.states == 1, cell.name,
                    " takes no state_gradient_clip");
  }

  bool resets_to = false;

  /// Whether anything acts in a forward scan, or on the way back.
  bool on(bool backward) const {
    const auto there = [](const auto& tensor) { return tensor.has_value(); };
    return numbers_.size() > 0 && (zones(kH) || zones(kC) || numbers_[Given::kCellClip] > 0 ||
                                   (backward && numbers_[Given::kGradientClip] > 0) ||
                                   std::any_of(tensors_.begin(), tensors_.end(), there));
  }
  bool zones(int state) const { return numbers_.size() > 0 && numbers_[size_t(Given::kShare + state)] > 0; }
  const MaybeTensor& fresh(int state) const {
    static const MaybeTensor kNone;
    return tensors_.empty() ? kNone : tensors_[size_t(Given::kFresh + state)];
  }
  const Tensor& reset_to(int state) const { return *tensors_[size_t(Given::kResetTo + state)]; }
  bool resets_to_state(int state) const {
    return resets_to && tensors_[size_t(Given::kResetTo + state)].has_value();
  }

  template <class S>
  StepOptions<S> of(int64_t d, bool backward) const {
    StepOptions<S> options{};
    options.on = on(backward);
    if (!options.on) return options;
    const auto masks = [&]<class M>(int slot, M) {
      const MaybeTensor& tensor = tensors_[size_t(slot)];
      return tensor ? direction_rows<const M>(*tensor, d) : Rows<const M>{};
    };
    for (int k = 0; k < kZoned; ++k) {
      options.keep[k] = masks(Given::kKeep + k, bool{});
      options.share[k] = numbers_[size_t(Given::kShare + k)];
    }
    options.candidate = masks(Given::kCandidate, S{}), options.recurrent = masks(Given::kRecurrent, S{});
    options.cell_clip = numbers_[Given::kCellClip];
    options.gradient_clip = backward ? numbers_[Given::kGradientClip] : 0;
    for (int k = 0; k < static_cast<int>(tensors_.size()) - Given::kResetTo; ++k) {
      if (!resets_to_state(k)) continue;
      options.reset_to[k] = steps_of<const S>(reset_to(k), d);
      options.reset_stride[k] = step_stride(reset_to(k));
    }
    return options;
  }

  /// [T, D, B, *] or [D, B, *] of one direction, at its first step.
  template <class S>
  static Rows<S> steps_of(const Tensor& tensor, int64_t d) {
    return {static_cast<S*>(tensor.data_ptr()) + d * tensor.stride(tensor.dim() - 3),
            tensor.stride(tensor.dim() - 2)};
  }
  static int64_t step_stride(const Tensor& tensor) { return tensor.dim() == 4 ? tensor.stride(0) : 0; }

 private:
  std::vector<double> numbers_;
  MaybeTensors tensors_;  // by their slots
};

/// How the rows of a sequence lie, as every operator takes it.
struct RowArguments {
  const MaybeTensor &batch_sizes, &lengths, &reset;
  bool batch_first;
  OptionArguments options;

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
  CallOptions options;

  ScanCall(const CellInfo& cell_, const LayerWeights& weights_, const Tensors& states_, const Tensor& rows,
           const char* name, const char* letters, const RowArguments& given)
      : cell(cell_),
        weights(weights_),
        states(check_states(cell_, weights_, states_)),
        sizes{weights_.D, states[kH].size(1), weights_.I, weights_.H, weights_.P},
        N(rows_in(rows, name, letters)),
        layout(given.layout(rows, N, sizes.B)),
        options(cell, sizes, N, layout.get().T, given.reset.has_value(), states[kH], given.options) {}

  const Tensor& like() const { return states[kH]; }
  int64_t width(int state) const { return state == kH ? sizes.P : sizes.H; }

  template <class Problem>
  Problem describe(const Sequence& sequence) const {
    Problem problem{};
    problem.sequence = sequence, problem.H = sizes.H, problem.P = sizes.P;
    problem.directions = static_cast<int>(sizes.D), problem.bfloat16 = weights.bfloat16;
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
  Tensors last, history;  // results beside y
  Tensors saved;  // the same; at its end states before their zoneout, those that backward reads

  ForwardCall(const CellInfo& cell_, const LayerWeights& weights_, const Tensor& x_, const Tensors& states_,
              const RowArguments& given, int64_t keep)
      : ScanCall(cell_, weights_, states_, x_, "x", "[N, I]", given), x(with_rows(x_)) {
    const auto [D, B, I, H, P] = sizes;
    STD_TORCH_CHECK(keep >= kNothing && keep <= kHistory, "keep must be 0, 1 or 2, got ", keep);
    Arguments(like()).check(x_, "x", "[N, I]", {N, I}, weights.bfloat16 && !cell.takes_gates);
    y = empty({N, D * P}, like());
    last.push_back(empty({D, B, P}, like()));
    for (int k = 1; k < cell.states; ++k) {
      last.push_back(torch::stable::clone(states[size_t(k)]));
      if (keep != kNothing) history.push_back(empty({D, N, H}, like()));
    }
    if (keep != kForBackward) return;
    if (cell.saved > 0) saved.push_back(empty({D, N, cell.saved_width(H)}, like()));
    for (int k = 0; k < kZoned; ++k)
      if (options.zones(k) && cell.after(k)) saved.push_back(empty({D, N, width(k)}, like()));
  }

  template <class S>
  ForwardProblem<S> problem(const Sequence& sequence) const {
    auto problem = describe<ForwardProblem<S>>(sequence);
    problem.x = rows<S>(x), problem.I = sizes.I, problem.projected = weights.projected;
    problem.packed = weights.packed.panels, problem.storage = weights.packed.storage;
    for (int64_t d = 0; d < sizes.D; ++d) {
      ForwardDirection<S>& direction = problem.direction[d];
      direction.weights = weights.of<S>(d);
      direction.h0 = direction_rows<const S>(states[kH], d);
      direction.history[kH] = columns<S>(y, d);
      for (size_t k = 0; k < last.size(); ++k) direction.last[k] = direction_rows<S>(last[k], d);
      for (size_t k = 0; k < history.size(); ++k) direction.history[k + 1] = direction_rows<S>(history[k], d);
      if (!saved.empty() && cell.saved > 0) direction.saved = direction_rows<S>(saved[0], d);
      direction.options = options.of<S>(d, false);
      size_t next = cell.saved > 0;
      for (int k = 0; k < kZoned && next < saved.size(); ++k)
        if (options.zones(k) && cell.after(k)) direction.fresh[k] = direction_rows<S>(saved[next++], d);
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
  Tensors dstates;  // a result; at its end the gradients of reset_to
  Tensors complete, du;

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
    for (int k = 0; k < kZoned; ++k)
      STD_TORCH_CHECK(options.fresh(k).has_value() == (options.zones(k) && cell.after(k)), cell.name,
                      " wants the states before their zoneout that it reads, and no others");
    for (int k = 0; k < cell.states && options.resets_to; ++k) {
      STD_TORCH_CHECK(options.resets_to_state(k), "reset_to must have all states");
      dstates.push_back(torch::stable::new_zeros(like(), sizes_of(options.reset_to(k))));
    }
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
      direction.options = options.of<S>(d, true);
      for (int k = 0; k < kZoned; ++k)
        if (options.fresh(k)) direction.fresh[k] = direction_rows<const S>(*options.fresh(k), d);
      for (size_t k = states.size(); k < dstates.size(); ++k) {
        direction.dreset[k - states.size()] = CallOptions::steps_of<S>(dstates[k], d);
        direction.dreset_stride[k - states.size()] = CallOptions::step_stride(dstates[k]);
      }
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
    STD_TORCH_CHECK(!weights.bfloat16, "gradients of bfloat16 weights are products of torch's");
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
      direction.options = options.of<S>(d, true);
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
