// The operators, written out once: for the CPU, for CUDA, and for the CUDA kernels on the host.
//
//   scan              one layer: the scan over time of each direction
//   scan_backward     back-propagation through it: gate gradients, never weight gradients
//   weight_gradients  gradients of weights and input from the gate gradients
//   pack              the weights in the form that the kernels stream, to be kept by the caller
//
// x, y and all that is saved are rows [N, *]: dense time-major, dense batch-first or packed (batch_sizes).
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/calls.h"

namespace fastrnn {

// What acts on the states between the steps (fastrnn/step_options.py has the formulas). options: those that
// there are of keep_h [D, N, P] and keep_c [D, N, H] (bool, zoneout), candidate [D, N, H], recurrent [D, B,
// P], fresh_h and fresh_c [D, N, *] (on the way back, from the end of saved), and reset_to of each state, [D,
// B, *] or [T, D, B, *]; option_slots: bit k is set where the k-th of these is there; numbers: zoneout of h
// and of c (1 with a mask), cell_clip and state_gradient_clip, 0: off.
constexpr const char* kOptionArguments = ", Tensor[] options, int option_slots, float[] numbers";

/// An operator, and its overload with kOptionArguments at the end of its arguments: a call without options
/// pays nothing for them.
struct Schema {
  const char *name, *overload, *arguments, *results;

  template <class Library>
  void define(Library& m) const {
    const std::string open = std::string("(") + arguments, close = std::string(") -> ") + results;
    m.def((name + open + close).c_str());
    m.def((overload + open + kOptionArguments + close).c_str());
  }
};

// cell: a name of cells/registry.h. states: h0 [D, B, P] and the others [D, B, H]. weights: for each
// direction those that there are of w_ih [G*H, I], w_hh [G*H, P], b_ih [G*H], b_hh [G*H], w_hr [P, H] and u
// [U, H] (vectors of parameters); slots: bit k is set where the k-th of these six is there. packed: what pack
// made of the weights, in their place. On the CPU x and the matrices may be bfloat16 beside states and
// vectors in float32, in scan and scan_backward: their products then round x, h and the gradients of the
// gates to it and sum in float32. batch_sizes int64 [T] (packed sequence), lengths int64 [B] (dense), reset
// bool [N], each or none. keep: 0 nothing, 1 what backward wants, 2 every state.
// -> y [N, D*P]; last: h_n [D, B, P] and the others [D, B, H]; history: every state beside h [D, N, H], or
//    none; saved: [D, N, S*H + R], or none, then the states before their zoneout [D, N, *] that backward
//    reads
constexpr Schema kScan{"scan", "scan.options",
                       "str cell, Tensor x, Tensor[] states, Tensor[] weights, int slots, Tensor? packed, "
                       "Tensor? batch_sizes, Tensor? lengths, Tensor? reset, bool batch_first, int keep",
                       "(Tensor y, Tensor[] last, Tensor[] history, Tensor[] saved)"};

// dlast, dhistory: gradients of last and history, each or none
// -> dgates [D, N, E*H]; dstates: those of the states before the first step, then those of reset_to;
// complete:
//    dL/dh_t [D, N, P] with all that later steps add (with a projection or keep) and that of the other states
//    [D, N, H] (with keep), where an option clips them clipped; du: for each direction [U, H], or none
constexpr Schema kScanBackward{
    "scan_backward", "scan_backward.options",
    "str cell, Tensor? dy, Tensor?[] dlast, Tensor?[] dhistory, Tensor y, Tensor[] history, Tensor? saved, "
    "Tensor[] states, Tensor[] weights, int slots, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, bool "
    "batch_first, bool keep",
    "(Tensor dgates, Tensor[] dstates, Tensor[] complete, Tensor[] du)"};

// The same for a cell that reuses_saved: dgates is written over saved. Rows of saved beyond the lengths must
// be zero, as scan leaves them.
constexpr Schema kScanBackwardOver{
    "scan_backward.over", "scan_backward.over_options",
    "str cell, Tensor? dy, Tensor?[] dlast, Tensor?[] dhistory, Tensor y, Tensor[] history, Tensor(a!) "
    "saved, Tensor[] states, Tensor[] weights, int slots, Tensor? batch_sizes, Tensor? lengths, Tensor? "
    "reset, bool batch_first, bool keep",
    "(Tensor[] dstates, Tensor[] complete, Tensor[] du)"};

// -> dx [N, I] (if inputs); dweights: for each direction those that the cell takes of dw_ih, dw_hh, db_ih,
// db_hh
//    (if of_weights)
constexpr Schema kWeightGradients{
    "weight_gradients", "weight_gradients.options",
    "str cell, Tensor dgates, Tensor x, Tensor y, Tensor[] states, Tensor[] weights, int slots, Tensor? "
    "batch_sizes, Tensor? lengths, Tensor? reset, bool batch_first, bool inputs, bool of_weights",
    "(Tensor[] dx, Tensor[] dweights)"};

// -> uint8 [bytes]: valid in this process alone. storage: what the matrices (not the biases and vectors) are
// rounded to, "bfloat16" or "int8"; "" for not at all.
constexpr const char* kPack = "pack(str cell, Tensor[] weights, int slots, str storage=\"\") -> Tensor";

inline const CellInfo& cell_named(const std::string& name) {
  const CellInfo* found = nullptr;
  AllCells::each([&]<class Cell>() {
    if (name == Cell::kInfo.name) found = &Cell::kInfo;
  });
  STD_TORCH_CHECK(found, "fastrnn has no cell ", name);
  return *found;
}

/// What every argument of a call has the dtype and device of.
inline const Tensor& first_state(const Tensors& states) {
  STD_TORCH_CHECK(!states.empty() && states[kH].dim() == 3, "states must begin with h0 [D, B, P]");
  return states[kH];
}

/// A Backend runs a call:
///   static void forward(const ForwardCall&), backward(const BackwardCall&), products(const ProductsCall&)
///   static LayerWeights unpack(const CellInfo&, const Tensor& like, const Tensor& packed)
template <class Backend>
std::tuple<Tensor, Tensors, Tensors, Tensors> scan(std::string cell, const Tensor& x, Tensors states,
                                                   Tensors given, int64_t slots, const MaybeTensor& packed,
                                                   const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
                                                   const MaybeTensor& reset, bool batch_first, int64_t keep,
                                                   Tensors options, int64_t option_slots,
                                                   std::vector<double> numbers) {
  const CellInfo& info = cell_named(cell);
  const Tensor& like = first_state(states);
  const LayerWeights weights =
      packed ? Backend::unpack(info, like, *packed) : LayerWeights(info, like, given, slots);
  const ForwardCall call(info, weights, x, states,
                         {batch_sizes, lengths, reset, batch_first, {options, option_slots, numbers}}, keep);
  Backend::forward(call);
  return call.results();
}

template <class Backend>
std::tuple<Tensor, Tensors, Tensors, Tensors> scan_backward(
    std::string cell, const MaybeTensor& dy, MaybeTensors dlast, MaybeTensors dhistory, const Tensor& y,
    Tensors history, const MaybeTensor& saved, Tensors states, Tensors given, int64_t slots,
    const MaybeTensor& batch_sizes, const MaybeTensor& lengths, const MaybeTensor& reset, bool batch_first,
    bool keep, Tensors options, int64_t option_slots, std::vector<double> numbers) {
  const CellInfo& info = cell_named(cell);
  const LayerWeights weights(info, first_state(states), given, slots);
  const BackwardCall call(info, weights, dy, dlast, dhistory, y, history, saved, states,
                          {batch_sizes, lengths, reset, batch_first, {options, option_slots, numbers}}, keep,
                          false);
  Backend::backward(call);
  return {call.dgates, call.dstates, call.complete, call.du};
}

template <class Backend>
std::tuple<Tensors, Tensors, Tensors> scan_backward_over(
    std::string cell, const MaybeTensor& dy, MaybeTensors dlast, MaybeTensors dhistory, const Tensor& y,
    Tensors history, const Tensor& saved, Tensors states, Tensors given, int64_t slots,
    const MaybeTensor& batch_sizes, const MaybeTensor& lengths, const MaybeTensor& reset, bool batch_first,
    bool keep, Tensors options, int64_t option_slots, std::vector<double> numbers) {
  const CellInfo& info = cell_named(cell);
  const LayerWeights weights(info, first_state(states), given, slots);
  const BackwardCall call(info, weights, dy, dlast, dhistory, y, history, saved, states,
                          {batch_sizes, lengths, reset, batch_first, {options, option_slots, numbers}}, keep,
                          true);
  Backend::backward(call);
  return {call.dstates, call.complete, call.du};
}

template <class Backend>
std::tuple<Tensors, Tensors> weight_gradients(std::string cell, const Tensor& dgates, const Tensor& x,
                                              const Tensor& y, Tensors states, Tensors given, int64_t slots,
                                              const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
                                              const MaybeTensor& reset, bool batch_first, bool inputs,
                                              bool of_weights, Tensors options, int64_t option_slots,
                                              std::vector<double> numbers) {
  const CellInfo& info = cell_named(cell);
  const LayerWeights weights(info, first_state(states), given, slots);
  const ProductsCall call(info, weights, dgates, x, y, states,
                          {batch_sizes, lengths, reset, batch_first, {options, option_slots, numbers}},
                          inputs, of_weights);
  Backend::products(call);
  return {call.dx, call.dweights};
}

/// An operator without its last three arguments, those of options.
template <class F>
struct Signature;
template <class R, class... A>
struct Signature<R (*)(A...)> {
  using Result = R;
  using Arguments = std::tuple<A...>;
  using Plain = std::make_index_sequence<sizeof...(A) - 3>;
};
template <auto kOperator, class Indices = typename Signature<decltype(kOperator)>::Plain>
struct WithoutOptions;
template <auto kOperator, size_t... I>
struct WithoutOptions<kOperator, std::index_sequence<I...>> {
  using Types = Signature<decltype(kOperator)>;
  template <size_t k>
  using Argument = std::tuple_element_t<k, typename Types::Arguments>;
  static typename Types::Result call(Argument<I>... arguments) {
    return kOperator(std::forward<Argument<I>>(arguments)..., {}, 0, {});
  }
};

template <class Library>
void define_scans(Library& m) {
  for (const Schema& schema : {kScan, kScanBackward, kScanBackwardOver}) schema.define(m);
}

template <class Backend, class Library>
void register_scans(Library& m) {
  m.impl("scan", TORCH_BOX(&WithoutOptions<&scan<Backend>>::call));
  m.impl("scan.options", TORCH_BOX(&scan<Backend>));
  m.impl("scan_backward", TORCH_BOX(&WithoutOptions<&scan_backward<Backend>>::call));
  m.impl("scan_backward.options", TORCH_BOX(&scan_backward<Backend>));
  m.impl("scan_backward.over", TORCH_BOX(&WithoutOptions<&scan_backward_over<Backend>>::call));
  m.impl("scan_backward.over_options", TORCH_BOX(&scan_backward_over<Backend>));
}

}  // namespace fastrnn
