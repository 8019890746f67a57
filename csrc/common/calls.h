// A call of an operator: its tensors checked, its results allocated, and the problem that a kernel is told.
// The same for every device.
#pragma once
#include <tuple>

#include "cells/cell.h"
#include "common/arguments.h"

namespace fastrnn {

template <class S>
Weights<S> weights_of(const Tensors& w_ih, const Tensors& w_hh, const Tensors& b_ih, const Tensors& b_hh,
                      const Tensors& w_hr, const Tensors& u, int64_t direction) {
  const auto d = static_cast<size_t>(direction);
  const auto vector = [d](const Tensors& biases) {
    return biases.empty() ? nullptr : static_cast<const S*>(biases[d].const_data_ptr());
  };
  return {.w_ih = w_ih.empty() ? Rows<const S>{} : rows<S>(w_ih[d]),
          .w_hh = rows<S>(w_hh[d]),
          .b_ih = vector(b_ih),
          .b_hh = vector(b_hh),
          .w_hr = w_hr.empty() ? Rows<const S>{} : rows<S>(w_hr[d]),
          .u = u.empty() ? Rows<const S>{} : rows<S>(u[d])};
}

inline Tensors each_with_rows(const Tensors& matrices) {
  Tensors result;
  for (const Tensor& matrix : matrices) result.push_back(with_rows(matrix));
  return result;
}

inline Tensors each_contiguous(const Tensors& vectors) {
  Tensors result;
  for (const Tensor& vector : vectors) result.push_back(as_contiguous(vector));
  return result;
}

inline MaybeTensor contiguous_if(const MaybeTensor& tensor) {
  return tensor ? MaybeTensor(as_contiguous(*tensor)) : std::nullopt;
}

/// Rows of one direction of [D, N, *], or none.
template <class S>
Rows<const S> optional_rows(const MaybeTensor& tensor, int64_t d) {
  return tensor ? direction_rows<const S>(*tensor, d) : Rows<const S>{};
}

/// The sizes that all arguments must agree on, read off h0 and W_hh.
struct Sizes {
  int64_t D, B, P, H, G;
};

inline void check_c0(const CellInfo& cell, const Arguments& arguments, const MaybeTensor& c0,
                     const Sizes& sizes) {
  STD_TORCH_CHECK(c0.has_value() == cell.has_c(), cell.name, " takes ", cell.has_c() ? "a c0" : "no c0");
  if (c0) arguments.check(*c0, "c0", "[D, B, H]", {sizes.D, sizes.B, sizes.H});
}

inline Sizes check_weights(const CellInfo& cell, const Tensor& h0, const MaybeTensor& c0, const Tensors& w_hh,
                           const Tensors& w_hr, const Tensors& u) {
  STD_TORCH_CHECK(h0.dim() == 3, "h0 must be [D, B, P]");
  const int64_t D = h0.size(0), B = h0.size(1), P = h0.size(2), G = cell.gates;
  STD_TORCH_CHECK(D >= 1 && D <= kMaxDirections, "h0 must have 1 or 2 directions, got ", D);
  STD_TORCH_CHECK(!w_hh.empty() && w_hh[0].dim() == 2, "w_hh must be matrices [G*H, P]");
  const int64_t H = w_hh[0].size(0) / G;
  STD_TORCH_CHECK(H > 0 && P > 0, "H and P must be positive, got ", H, " and ", P);
  const Arguments arguments(h0, D);
  arguments.check_each(w_hh, "w_hh", "[G*H, P]", {G * H, P});
  STD_TORCH_CHECK(w_hr.empty() || cell.projects, cell.name, " has no projection");
  STD_TORCH_CHECK(!w_hr.empty() || H == P, "h0 must be as wide as the hidden size");
  if (!w_hr.empty()) arguments.check_each(w_hr, "w_hr", "[P, H]", {P, H});
  STD_TORCH_CHECK(!u.empty() || cell.vectors == 0, cell.name, " takes vectors u");
  if (!u.empty()) arguments.check_each(u, "u", "[U, H]", {cell.vectors, H});
  const Sizes sizes{D, B, P, H, G};
  check_c0(cell, arguments, c0, sizes);
  return sizes;
}

inline void check_inputs(const Arguments& arguments, const Sizes& sizes, int64_t I, const Tensors& w_ih,
                         const Tensors& b_ih, const Tensors& b_hh) {
  const int64_t GH = sizes.G * sizes.H;
  arguments.check_each(w_ih, "w_ih", "[G*H, I]", {GH, I});
  STD_TORCH_CHECK(b_ih.empty() == b_hh.empty(), "b_ih and b_hh come together or not at all");
  if (!b_ih.empty()) arguments.check_each(b_ih, "b_ih", "[G*H]", {GH});
  if (!b_hh.empty()) arguments.check_each(b_hh, "b_hh", "[G*H]", {GH});
}

inline int64_t rows_in(const Tensor& x, const char* name, const char* letters) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must be ", letters);
  return x.size(0);
}

/// What a forward scan writes beside y and the last states.
enum Save : int64_t { kNothing, kForBackward, kEveryCellState };

/// fastrnn::<cell>
struct ForwardCall {
  const CellInfo& cell;
  Sizes sizes;
  int64_t N, I;
  SequenceLayout layout;
  Tensor x, h0;
  Tensors w_ih, w_hh, b_ih, b_hh, w_hr, u;
  bool has_c, save_gates, save_c;
  Tensor y, h_n, c_n, saved, saved_c;  // results

  /// With packed weights, whose sizes are checked already.
  ForwardCall(const CellInfo& cell_, const Sizes& sizes_, const Tensor& x_, const Tensor& h0_,
              const MaybeTensor& c0, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
              const MaybeTensor& reset, bool batch_first, int64_t save)
      : cell(cell_),
        sizes(sizes_),
        N(rows_in(x_, "x", "[N, I]")),
        I(x_.size(1)),
        layout(N, sizes.B, batch_sizes, lengths, reset, batch_first),
        x(with_rows(x_)),
        h0(as_contiguous(h0_)),
        has_c(c0.has_value()),
        save_gates(save == kForBackward),
        save_c(has_c && save != kNothing) {
    const auto [D, B, P, H, G] = sizes;
    const Arguments arguments(h0_, D);
    arguments.check(x_, "x", "[N, I]", {N, I});
    if (reset) arguments.check_device(*reset, "reset");
    y = empty({N, D * P}, h0), h_n = empty({D, B, P}, h0);
    STD_TORCH_CHECK(save >= kNothing && save <= kEveryCellState, "save must be 0, 1 or 2, got ", save);
    saved = save_gates ? empty({D, N, cell.saved * H}, h0) : empty({0}, h0);
    saved_c = save_c ? empty({D, N, H}, h0) : empty({0}, h0);
    c_n = has_c ? torch::stable::clone(as_contiguous(*c0)) : empty({0}, h0);
  }

  ForwardCall(const CellInfo& cell_, const Tensor& x_, const Tensor& h0_, const MaybeTensor& c0,
              const Tensors& w_ih_, const Tensors& w_hh_, const Tensors& b_ih_, const Tensors& b_hh_,
              const Tensors& w_hr_, const Tensors& u_, const MaybeTensor& batch_sizes,
              const MaybeTensor& lengths, const MaybeTensor& reset, bool batch_first, int64_t save)
      : ForwardCall(cell_, check_weights(cell_, h0_, c0, w_hh_, w_hr_, u_), x_, h0_, c0, batch_sizes, lengths,
                    reset, batch_first, save) {
    check_inputs(Arguments(h0_, sizes.D), sizes, I, w_ih_, b_ih_, b_hh_);
    w_ih = each_with_rows(w_ih_), w_hh = each_with_rows(w_hh_), w_hr = each_with_rows(w_hr_);
    u = each_with_rows(u_);
    b_ih = each_contiguous(b_ih_), b_hh = each_contiguous(b_hh_);
  }

  template <class S>
  ForwardDirection<S> direction(int64_t d) const {
    const int64_t D = sizes.D, P = sizes.P;
    return {.weights = w_hh.empty() ? Weights<S>{} : weights_of<S>(w_ih, w_hh, b_ih, b_hh, w_hr, u, d),
            .h0 = direction_rows<const S>(h0, d),
            .y = {static_cast<S*>(y.mutable_data_ptr()) + d * P, D * P},
            .h_n = direction_rows<S>(h_n, d),
            .c = has_c ? direction_rows<S>(c_n, d) : Rows<S>{},
            .saved = save_gates ? direction_rows<S>(saved, d) : Rows<S>{},
            .saved_c = save_c ? direction_rows<S>(saved_c, d) : Rows<S>{}};
  }

  template <class S>
  ForwardProblem<S> problem(const Sequence& sequence) const {
    ForwardProblem<S> problem{{sequence, sizes.H, sizes.P, static_cast<int>(sizes.D), {}, {}},
                              rows<S>(x),
                              I,
                              !w_hr.empty(),
                              nullptr,
                              false};
    for (int64_t d = 0; d < sizes.D; ++d) problem.direction[d] = direction<S>(d);
    return problem;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results() const { return {y, h_n, c_n, saved, saved_c}; }
};

/// fastrnn::<cell>_backward, and <cell>_backward_in_place
struct BackwardCall {
  const CellInfo& cell;
  Sizes sizes;
  int64_t N;
  SequenceLayout layout;
  Tensor saved, saved_c, y, h0;
  MaybeTensor dy, dsaved_c, c0;
  Tensors w_hh, w_hr, u;
  bool with_dh, with_dc, in_place;
  Tensor dgates, dh0, dc0, dh, dc, du;  // results

  BackwardCall(const CellInfo& cell_, const MaybeTensor& dy_, const MaybeTensor& dh_n,
               const MaybeTensor& dc_n, const MaybeTensor& dsaved_c_, const Tensor& saved_,
               const Tensor& saved_c_, const Tensor& y_, const Tensor& h0_, const MaybeTensor& c0_,
               const Tensors& w_hh_, const Tensors& w_hr_, const Tensors& u_, const MaybeTensor& batch_sizes,
               const MaybeTensor& lengths, const MaybeTensor& reset, bool batch_first, bool keep,
               bool in_place_)
      : cell(cell_),
        sizes(check_weights(cell_, h0_, c0_, w_hh_, w_hr_, u_)),
        N(rows_in(y_, "y", "[N, D*P]")),
        layout(N, sizes.B, batch_sizes, lengths, reset, batch_first),
        saved(as_contiguous(saved_)),
        saved_c(as_contiguous(saved_c_)),
        y(as_contiguous(y_)),
        h0(as_contiguous(h0_)),
        dy(dy_ ? MaybeTensor(with_rows(*dy_)) : std::nullopt),
        dsaved_c(contiguous_if(dsaved_c_)),
        c0(contiguous_if(c0_)),
        w_hh(each_with_rows(w_hh_)),
        w_hr(each_with_rows(w_hr_)),
        u(each_with_rows(u_)),
        with_dh(keep || !w_hr_.empty()),
        with_dc(keep && c0_),
        in_place(in_place_) {
    const auto [D, B, P, H, G] = sizes;
    const Arguments arguments(h0_, D);
    const auto check = [&](const MaybeTensor& tensor, const char* name, const char* letters,
                           const std::vector<int64_t>& expected) {
      if (tensor) arguments.check(*tensor, name, letters, expected);
    };
    arguments.check(y_, "y", "[N, D*P]", {N, D * P});
    if (reset) arguments.check_device(*reset, "reset");
    arguments.check(saved_, "saved", "[D, N, S*H]", {D, N, cell.saved * H});
    if (c0_) arguments.check(saved_c_, "saved_c", "[D, N, H]", {D, N, H});
    check(dy_, "dy", "[N, D*P]", {N, D * P});
    check(dh_n, "dh_n", "[D, B, P]", {D, B, P});
    check(dc_n, "dc_n", "[D, B, H]", {D, B, H});
    check(dsaved_c_, "dsaved_c", "[D, N, H]", {D, N, H});
    const auto initial = [&](const MaybeTensor& given, int64_t width) {
      return given ? torch::stable::clone(as_contiguous(*given))
                   : torch::stable::new_zeros(h0, {D, B, width});
    };
    STD_TORCH_CHECK(!in_place || saved_.is_contiguous(), "saved must be contiguous to be written over");
    dgates = in_place ? saved : empty({D, N, cell.gradients() * H}, h0);
    dh0 = initial(dh_n, P);
    dc0 = c0 ? initial(dc_n, H) : empty({0}, h0);
    dh = with_dh ? empty({D, N, P}, h0) : empty({0}, h0);
    dc = with_dc ? empty({D, N, H}, h0) : empty({0}, h0);
    du = cell.vectors ? torch::stable::new_zeros(h0, {D, cell.vectors, H}) : empty({0}, h0);
  }

  template <class S>
  BackwardDirection<S> direction(int64_t d) const {
    const int64_t D = sizes.D, P = sizes.P;
    return {.weights = weights_of<S>({}, w_hh, {}, {}, w_hr, u, d),
            .dy = dy ? Rows<const S>{static_cast<const S*>(dy->const_data_ptr()) + d * P, dy->stride(0)}
                     : Rows<const S>{},
            .dsaved_c = optional_rows<S>(dsaved_c, d),
            .saved = direction_rows<const S>(saved, d),
            .saved_c = c0 ? direction_rows<const S>(saved_c, d) : Rows<const S>{},
            .y = {static_cast<const S*>(y.const_data_ptr()) + d * P, D * P},
            .h0 = direction_rows<const S>(h0, d),
            .c0 = optional_rows<S>(c0, d),
            .dgates = direction_rows<S>(dgates, d),
            .du = cell.vectors ? direction_rows<S>(du, d) : Rows<S>{},
            .dh = direction_rows<S>(dh0, d),
            .dc = c0 ? direction_rows<S>(dc0, d) : Rows<S>{},
            .dh_rows = with_dh ? direction_rows<S>(dh, d) : Rows<S>{},
            .dc_rows = with_dc ? direction_rows<S>(dc, d) : Rows<S>{}};
  }

  template <class S>
  BackwardProblem<S> problem(const Sequence& sequence) const {
    BackwardProblem<S> problem{sequence, sizes.H, sizes.P, static_cast<int>(sizes.D), {}, {}};
    for (int64_t d = 0; d < sizes.D; ++d) problem.direction[d] = direction<S>(d);
    return problem;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results() const {
    return {in_place ? empty({0}, h0) : dgates, dh0, dc0, dh, dc, du};
  }
};

}  // namespace fastrnn
