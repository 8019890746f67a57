// The CPU operators: check the tensors, allocate the outputs, describe the problem, call the kernel.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/arguments.h"
#include "cpu/kernels.h"

namespace fastrnn {
namespace {

using torch::headeronly::ScalarType;

/// torch's own threads, as many as torch.get_num_threads() says.
Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
            });
          }};
}

template <class Cell>
const CellKernels& kernels_of() {
  for (const CellKernels& kernels : instruction_set().cells)
    if (kernels.cell == std::string(Cell::kName)) return kernels;
  STD_TORCH_CHECK(false, "fastrnn was built without ", Cell::kName);
}

/// f(S{}) with S the number type of the call.
template <class F>
void with_type(const Tensor& like, F f) {
  if (like.scalar_type() == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Double, "fastrnn's CPU kernels take float32 and float64");
  f(double{});
}

void check_memory(bool enough) {
  STD_TORCH_CHECK(enough, "fastrnn: not enough memory for the working arrays");
}

template <class S>
Weights<S> weights_of(const Tensors& w_ih, const Tensors& w_hh, const Tensors& b_ih, const Tensors& b_hh,
                      const Tensors& w_hr, int64_t direction) {
  const auto d = static_cast<size_t>(direction);
  return {.w_ih = w_ih.empty() ? Rows<const S>{} : rows<S>(w_ih[d]),
          .w_hh = rows<S>(w_hh[d]),
          .b_ih = b_ih.empty() ? nullptr : b_ih[d].const_data_ptr<S>(),
          .b_hh = b_hh.empty() ? nullptr : b_hh[d].const_data_ptr<S>(),
          .w_hr = w_hr.empty() ? Rows<const S>{} : rows<S>(w_hr[d])};
}

Tensors each_with_rows(const Tensors& matrices) {
  Tensors result;
  for (const Tensor& matrix : matrices) result.push_back(with_rows(matrix));
  return result;
}

/// The sizes that all arguments must agree on, read off h0 and W_hh.
struct Sizes {
  int64_t D, B, P, H, G;
};

template <class Cell>
Sizes check_weights(const Tensor& h0, const MaybeTensor& c0, const Tensors& w_hh, const Tensors& w_hr) {
  STD_TORCH_CHECK(h0.dim() == 3 && h0.is_cpu(), "h0 must be [D, B, P] on the CPU");
  constexpr int64_t G = Cell::kGates;
  const int64_t D = h0.size(0), B = h0.size(1), P = h0.size(2);
  STD_TORCH_CHECK(D >= 1 && D <= kMaxDirections, "h0 must have 1 or 2 directions, got ", D);
  STD_TORCH_CHECK(!w_hh.empty() && w_hh[0].dim() == 2, "w_hh must be matrices [G*H, P]");
  const int64_t H = w_hh[0].size(0) / G;
  STD_TORCH_CHECK(H > 0 && P > 0, "H and P must be positive, got ", H, " and ", P);
  const Arguments arguments(h0, D);
  arguments.check_each(w_hh, "w_hh", "[G*H, P]", {G * H, P});
  STD_TORCH_CHECK(w_hr.empty() ? H == P : Cell::kCellState,
                  w_hr.empty() ? "h0 must be as wide as the hidden size" : "only an LSTM has a projection");
  if (!w_hr.empty()) arguments.check_each(w_hr, "w_hr", "[P, H]", {P, H});
  STD_TORCH_CHECK(c0.has_value() == Cell::kCellState, Cell::kName, " takes ",
                  Cell::kCellState ? "a c0" : "no c0");
  if (c0) arguments.check(*c0, "c0", "[D, B, H]", {D, B, H});
  return {D, B, P, H, G};
}

template <class Cell>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& h0, const MaybeTensor& c0, Tensors w_ih, Tensors w_hh, Tensors b_ih,
    Tensors b_hh, Tensors w_hr, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
    const MaybeTensor& reset, bool batch_first, bool save) {
  const auto [D, B, P, H, G] = check_weights<Cell>(h0, c0, w_hh, w_hr);
  STD_TORCH_CHECK(x.dim() == 2, "x must be [N, I]");
  const int64_t N = x.size(0), I = x.size(1);
  const Arguments arguments(h0, D);
  arguments.check(x, "x", "[N, I]", {N, I});
  arguments.check_each(w_ih, "w_ih", "[G*H, I]", {G * H, I});
  STD_TORCH_CHECK(b_ih.empty() == b_hh.empty(), "b_ih and b_hh come together or not at all");
  if (!b_ih.empty()) arguments.check_each(b_ih, "b_ih", "[G*H]", {G * H});
  if (!b_hh.empty()) arguments.check_each(b_hh, "b_hh", "[G*H]", {G * H});
  const SequenceLayout layout(N, B, batch_sizes, lengths, reset, batch_first);

  const Tensor x_rows = with_rows(x);
  w_ih = each_with_rows(w_ih), w_hh = each_with_rows(w_hh), w_hr = each_with_rows(w_hr);
  for (Tensor& bias : b_ih) bias = as_contiguous(bias);
  for (Tensor& bias : b_hh) bias = as_contiguous(bias);
  const Tensor h0_rows = as_contiguous(h0);
  const Tensor y = empty({N, D * P}, h0), h_n = empty({D, B, P}, h0);
  const Tensor saved = save ? empty({D, N, Cell::kSaved * H}, h0) : empty({0}, h0);
  const Tensor saved_c = save && c0 ? empty({D, N, H}, h0) : empty({0}, h0);
  const Tensor c_n = c0 ? torch::stable::clone(as_contiguous(*c0)) : empty({0}, h0);

  with_type(h0, [&]<class S>(S) {
    ForwardProblem<S> problem{
        {layout.get(), H, P, static_cast<int>(D), {}, torch_threads()}, rows<S>(x_rows), I};
    for (int64_t d = 0; d < D; ++d)
      problem.direction[d] = {
          .weights = weights_of<S>(w_ih, w_hh, b_ih, b_hh, w_hr, d),
          .h0 = direction_rows<const S>(h0_rows, d),
          .y = {y.mutable_data_ptr<S>() + d * P, D * P},
          .h_n = direction_rows<S>(h_n, d),
          .c = c0 ? direction_rows<S>(c_n, d) : Rows<S>{},
          .saved = save ? direction_rows<S>(saved, d) : Rows<S>{},
          .saved_c = save && c0 ? direction_rows<S>(saved_c, d) : Rows<S>{},
      };
    if constexpr (std::is_same_v<S, float>)
      check_memory(kernels_of<Cell>().forward_f32(problem));
    else
      check_memory(kernels_of<Cell>().forward_f64(problem));
  });
  return {y, h_n, c_n, saved, saved_c};
}

template <class Cell>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const MaybeTensor& dsaved,
    const MaybeTensor& dsaved_c, const Tensor& saved, const Tensor& saved_c, const Tensor& y,
    const Tensor& h0, const MaybeTensor& c0, Tensors w_hh, Tensors w_hr, const MaybeTensor& batch_sizes,
    const MaybeTensor& lengths, const MaybeTensor& reset, bool batch_first, bool keep) {
  const auto [D, B, P, H, G] = check_weights<Cell>(h0, c0, w_hh, w_hr);
  STD_TORCH_CHECK(y.dim() == 2, "y must be [N, D*P]");
  const int64_t N = y.size(0);
  const Arguments arguments(h0, D);
  const auto check = [&](const MaybeTensor& tensor, const char* name, const char* letters,
                         const std::vector<int64_t>& sizes) {
    if (tensor) arguments.check(*tensor, name, letters, sizes);
  };
  arguments.check(y, "y", "[N, D*P]", {N, D * P});
  arguments.check(saved, "saved", "[D, N, S*H]", {D, N, Cell::kSaved * H});
  if (c0) arguments.check(saved_c, "saved_c", "[D, N, H]", {D, N, H});
  check(dy, "dy", "[N, D*P]", {N, D * P});
  check(dh_n, "dh_n", "[D, B, P]", {D, B, P});
  check(dc_n, "dc_n", "[D, B, H]", {D, B, H});
  check(dsaved, "dsaved", "[D, N, S*H]", {D, N, Cell::kSaved * H});
  check(dsaved_c, "dsaved_c", "[D, N, H]", {D, N, H});
  const SequenceLayout layout(N, B, batch_sizes, lengths, reset, batch_first);

  w_hh = each_with_rows(w_hh), w_hr = each_with_rows(w_hr);
  const auto contiguous_if = [](const MaybeTensor& tensor) {
    return tensor ? MaybeTensor(as_contiguous(*tensor)) : std::nullopt;
  };
  const MaybeTensor dy_rows = dy ? MaybeTensor(with_rows(*dy)) : std::nullopt;
  const MaybeTensor dsaved_rows = contiguous_if(dsaved), dsaved_c_rows = contiguous_if(dsaved_c);
  const MaybeTensor c0_rows = contiguous_if(c0);
  const Tensor h0_rows = as_contiguous(h0), y_rows = as_contiguous(y);
  const Tensor saved_rows = as_contiguous(saved), saved_c_rows = as_contiguous(saved_c);

  const Tensor dgates = empty({D, N, Cell::kGradients * H}, h0);
  const Tensor dh0 =
      dh_n ? torch::stable::clone(as_contiguous(*dh_n)) : torch::stable::new_zeros(h0, {D, B, P});
  const Tensor dc0 = !c0    ? empty({0}, h0)
                     : dc_n ? torch::stable::clone(as_contiguous(*dc_n))
                            : torch::stable::new_zeros(h0, {D, B, H});
  const bool with_dh = keep || !w_hr.empty(), with_dc = keep && c0;
  const Tensor dh = with_dh ? empty({D, N, P}, h0) : empty({0}, h0);
  const Tensor dc = with_dc ? empty({D, N, H}, h0) : empty({0}, h0);

  with_type(h0, [&]<class S>(S) {
    const auto optional_rows = [](const MaybeTensor& tensor, int64_t d) {
      return tensor ? direction_rows<const S>(*tensor, d) : Rows<const S>{};
    };
    BackwardProblem<S> problem{layout.get(), H, P, static_cast<int>(D), {}, torch_threads()};
    for (int64_t d = 0; d < D; ++d)
      problem.direction[d] = {
          .weights = weights_of<S>({}, w_hh, {}, {}, w_hr, d),
          .dy = dy_rows ? Rows<const S>{dy_rows->const_data_ptr<S>() + d * P, dy_rows->stride(0)}
                        : Rows<const S>{},
          .dsaved = optional_rows(dsaved_rows, d),
          .dsaved_c = optional_rows(dsaved_c_rows, d),
          .saved = direction_rows<const S>(saved_rows, d),
          .saved_c = c0 ? direction_rows<const S>(saved_c_rows, d) : Rows<const S>{},
          .y = {y_rows.const_data_ptr<S>() + d * P, D * P},
          .h0 = direction_rows<const S>(h0_rows, d),
          .c0 = optional_rows(c0_rows, d),
          .dgates = direction_rows<S>(dgates, d),
          .dh = direction_rows<S>(dh0, d),
          .dc = c0 ? direction_rows<S>(dc0, d) : Rows<S>{},
          .dh_rows = with_dh ? direction_rows<S>(dh, d) : Rows<S>{},
          .dc_rows = with_dc ? direction_rows<S>(dc, d) : Rows<S>{},
      };
    if constexpr (std::is_same_v<S, float>)
      check_memory(kernels_of<Cell>().backward_f32(problem));
    else
      check_memory(kernels_of<Cell>().backward_f64(problem));
  });
  return {dgates, dh0, dc0, dh, dc};
}

template <class Cell>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> products(const Tensor& dgates, const Tensor& x,
                                                            const Tensor& y, const Tensor& h0, Tensors w_ih,
                                                            const MaybeTensor& batch_sizes,
                                                            const MaybeTensor& lengths,
                                                            const MaybeTensor& reset, bool batch_first,
                                                            bool inputs, bool weights) {
  constexpr int64_t G = Cell::kGates, E = Cell::kGradients;
  STD_TORCH_CHECK(h0.dim() == 3 && x.dim() == 2 && dgates.dim() == 3,
                  "expected h0 [D, B, P], x [N, I], dgates [D, N, E*H]");
  const int64_t D = h0.size(0), B = h0.size(1), P = h0.size(2), N = x.size(0), I = x.size(1),
                H = dgates.size(2) / E;
  STD_TORCH_CHECK(D >= 1 && D <= kMaxDirections, "h0 must have 1 or 2 directions, got ", D);
  const Arguments arguments(h0, D);
  arguments.check(dgates, "dgates", "[D, N, E*H]", {D, N, E * H});
  arguments.check(x, "x", "[N, I]", {N, I});
  arguments.check(y, "y", "[N, D*P]", {N, D * P});
  arguments.check_each(w_ih, "w_ih", "[G*H, I]", {G * H, I});
  const SequenceLayout layout(N, B, batch_sizes, lengths, reset, batch_first);

  const Tensor dgates_rows = as_contiguous(dgates), x_rows = with_rows(x), y_rows = as_contiguous(y);
  const Tensor h0_rows = as_contiguous(h0);
  w_ih = each_with_rows(w_ih);
  const Tensor dx = inputs ? empty({N, I}, h0) : empty({0}, h0);
  const Tensor dw_ih = weights ? empty({D, G * H, I}, h0) : empty({0}, h0);
  const Tensor dw_hh = weights ? empty({D, G * H, P}, h0) : empty({0}, h0);
  const Tensor db_ih = weights ? empty({D, G * H}, h0) : empty({0}, h0);
  const Tensor db_hh = weights ? empty({D, G * H}, h0) : empty({0}, h0);
  with_type(h0, [&]<class S>(S) {
    ProductsProblem<S> problem{{layout.get(), H, P, static_cast<int>(D), {}, torch_threads()},
                               rows<S>(x_rows),
                               inputs ? Rows<S>{dx.mutable_data_ptr<S>(), I} : Rows<S>{},
                               I,
                               weights};
    for (int64_t d = 0; d < D; ++d)
      problem.direction[d] = {
          .weights = {.w_ih = rows<S>(w_ih[static_cast<size_t>(d)])},
          .dgates = direction_rows<const S>(dgates_rows, d),
          .y = {y_rows.const_data_ptr<S>() + d * P, D * P},
          .h0 = direction_rows<const S>(h0_rows, d),
          .dw_ih = weights ? direction_rows<S>(dw_ih, d) : Rows<S>{},
          .dw_hh = weights ? direction_rows<S>(dw_hh, d) : Rows<S>{},
          .db_ih = weights ? db_ih.mutable_data_ptr<S>() + d * G * H : nullptr,
          .db_hh = weights ? db_hh.mutable_data_ptr<S>() + d * G * H : nullptr,
      };
    if constexpr (std::is_same_v<S, float>)
      check_memory(kernels_of<Cell>().products_f32(problem));
    else
      check_memory(kernels_of<Cell>().products_f64(problem));
  });
  return {dx, dw_ih, dw_hh, db_ih, db_hh};
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  fastrnn::AllCells::each([&]<class Cell>() {
    m.impl(Cell::kName, TORCH_BOX(&fastrnn::forward<Cell>));
    m.impl((std::string(Cell::kName) + "_backward").c_str(), TORCH_BOX(&fastrnn::backward<Cell>));
    m.impl((std::string(Cell::kName) + "_products").c_str(), TORCH_BOX(&fastrnn::products<Cell>));
  });
}
