// The CPU operators: check the tensors, allocate the outputs, describe the problem, call the kernel.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "common/calls.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

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
  return instruction_set().cells[AllCells::index<Cell>()];
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

/// One kernel or the other, by the number type.
template <class S, class Float, class Double, class Problem>
void run(Float f32, Double f64, const Problem& problem) {
  if constexpr (std::is_same_v<S, float>)
    check_memory(f32(problem));
  else
    check_memory(f64(problem));
}

template <class Cell>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& h0, const MaybeTensor& c0, Tensors w_ih, Tensors w_hh, Tensors b_ih,
    Tensors b_hh, Tensors w_hr, Tensors u, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
    const MaybeTensor& reset, bool batch_first, int64_t save) {
  const ForwardCall call(Cell::kInfo, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, u, batch_sizes, lengths, reset,
                         batch_first, save);
  with_type(h0, [&]<class S>(S) {
    auto problem = call.template problem<S>(call.layout.get());
    problem.parallel = torch_threads();
    run<S>(kernels_of<Cell>().forward_f32, kernels_of<Cell>().forward_f64, problem);
  });
  return call.results();
}

// ---- Packed weights, kept by the caller ----------------------------------------------------------------

/// Comes before the panels: the kernels, the number type and the sizes that these are for. Cells with the
/// same gates have the same panels.
struct PackHeader {
  char isa[16];
  int64_t gates, scalar, D, I, H, P, split, vectors, projected, pairs;
  int64_t unused[4];  // zero
};
constexpr int64_t kHeaderBytes = 128;
static_assert(sizeof(PackHeader) == kHeaderBytes);

template <class Cell>
PackHeader header_of(const Tensor& like, const Sizes& sizes, int64_t I, bool projected, bool pairs) {
  PackHeader header{.isa = {},
                    .gates = Cell::kInfo.gates,
                    .scalar = static_cast<int64_t>(like.scalar_type()),
                    .D = sizes.D,
                    .I = I,
                    .H = sizes.H,
                    .P = sizes.P,
                    .split = Cell::kInfo.split,
                    .vectors = Cell::kInfo.vectors,
                    .projected = projected,
                    .pairs = pairs,
                    .unused = {}};
  std::strncpy(header.isa, instruction_set().name, sizeof header.isa - 1);
  return header;
}

/// The bytes of the panels; fills `to` where that is not null.
template <class Cell>
int64_t pack_panels(const Tensor& like, const PackHeader& header, const Tensors& w_ih, const Tensors& w_hh,
                    const Tensors& b_ih, const Tensors& b_hh, const Tensors& w_hr, const Tensors& u,
                    char* to) {
  int64_t bytes = 0;
  with_type(like, [&]<class S>(S) {
    PackProblem<S> problem{
        header.I, header.H, header.P, header.projected != 0, header.pairs != 0, static_cast<int>(header.D),
        {},       to};
    for (int64_t d = 0; to && d < header.D; ++d)
      problem.weights[d] = weights_of<S>(w_ih, w_hh, b_ih, b_hh, w_hr, u, d);
    if constexpr (std::is_same_v<S, float>)
      bytes = kernels_of<Cell>().pack_f32(problem);
    else
      bytes = kernels_of<Cell>().pack_f64(problem);
  });
  return bytes;
}

template <class Cell>
Tensor pack(Tensors w_ih, Tensors w_hh, Tensors b_ih, Tensors b_hh, Tensors w_hr, Tensors u, bool bfloat16) {
  const auto D = static_cast<int64_t>(w_hh.size());
  STD_TORCH_CHECK(D >= 1 && w_hh[0].dim() == 2, "w_hh must be matrices [G*H, P]");
  STD_TORCH_CHECK(!w_ih.empty() && w_ih[0].dim() == 2, "w_ih must be matrices [G*H, I]");
  const Tensor like = w_hh[0];
  STD_TORCH_CHECK(!bfloat16 || like.scalar_type() == ScalarType::Float,
                  "only float32 weights can be stored as bfloat16");
  const int64_t P = like.size(1), I = w_ih[0].size(1);
  const Tensor h0 = empty({D, 0, P}, like);
  const MaybeTensor c0 =
      Cell::kInfo.has_c() ? MaybeTensor(empty({D, 0, like.size(0) / Cell::kInfo.gates}, like)) : std::nullopt;
  const Sizes sizes = check_weights(Cell::kInfo, h0, c0, w_hh, w_hr, u);
  check_inputs(Arguments(h0, D), sizes, I, w_ih, b_ih, b_hh);
  w_ih = each_with_rows(w_ih), w_hh = each_with_rows(w_hh), w_hr = each_with_rows(w_hr);
  b_ih = each_contiguous(b_ih), b_hh = each_contiguous(b_hh), u = each_with_rows(u);
  const PackHeader header = header_of<Cell>(like, sizes, I, !w_hr.empty(), bfloat16);
  const int64_t bytes = kHeaderBytes + pack_panels<Cell>(like, header, {}, {}, {}, {}, {}, {}, nullptr);
  const Tensor packed = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  auto* const to = static_cast<char*>(packed.mutable_data_ptr());
  prefer_huge_pages(to, bytes);
  std::memset(to, 0, static_cast<size_t>(bytes));  // gaps too: the same weights give the same bytes
  std::memcpy(to, &header, sizeof header);
  pack_panels<Cell>(like, header, w_ih, w_hh, b_ih, b_hh, w_hr, u, to + kHeaderBytes);
  return packed;
}

/// Whether so many bytes can be the pack that their header tells of, for numbers like those of `like`.
template <class Cell>
bool is_pack(const PackHeader& header, int64_t bytes, const Tensor& like) {
  const auto& [isa, gates, scalar, D, I, H, P, split, vectors, projected, pairs, unused] = header;
  const PackHeader expected =
      header_of<Cell>(like, {D, 0, P, H, Cell::kInfo.gates}, I, projected != 0, pairs != 0);
  return !std::memcmp(&header, &expected, sizeof header) && D >= 1 && D <= kMaxDirections && I >= 0 &&
         H > 0 && P > 0 && (projected ? Cell::kInfo.projects : H == P) &&
         (!pairs || like.scalar_type() == ScalarType::Float) &&
         // A weight takes two bytes at least. After this no product of the sizes overflows.
         2.0 * double(H) * (double(I) + double(P)) <= double(bytes) &&
         bytes == kHeaderBytes + pack_panels<Cell>(like, header, {}, {}, {}, {}, {}, {}, nullptr);
}

/// forward() with the result of pack() in the place of the weights.
template <class Cell>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_packed(const Tensor& x, const Tensor& h0,
                                                                  const MaybeTensor& c0, const Tensor& packed,
                                                                  const MaybeTensor& batch_sizes,
                                                                  const MaybeTensor& lengths,
                                                                  const MaybeTensor& reset, bool batch_first,
                                                                  int64_t save) {
  STD_TORCH_CHECK(h0.dim() == 3 && x.dim() == 2, "expected x [N, I], h0 [D, B, P]");
  STD_TORCH_CHECK(packed.is_cpu() && packed.dim() == 1 && packed.is_contiguous() &&
                      packed.scalar_type() == ScalarType::Byte && packed.numel() > kHeaderBytes,
                  "packed must be the result of fastrnn::", Cell::kInfo.name, "_pack");
  const auto* const from = static_cast<const char*>(packed.const_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(from) % sizeof(double) == 0, "packed must be aligned");
  PackHeader header;
  std::memcpy(&header, from, sizeof header);
  STD_TORCH_CHECK(is_pack<Cell>(header, packed.numel(), h0),
                  "packed must be the result of fastrnn::", Cell::kInfo.name,
                  "_pack, from this process and for the dtype of h0");
  const Sizes sizes{header.D, h0.size(1), header.P, header.H, Cell::kInfo.gates};
  const Arguments arguments(h0, header.D);
  arguments.check(h0, "h0", "[D, B, P]", {header.D, sizes.B, header.P});
  arguments.check(x, "x", "[N, I]", {x.size(0), header.I});
  check_c0(Cell::kInfo, arguments, c0, sizes);
  const ForwardCall call(Cell::kInfo, sizes, x, h0, c0, batch_sizes, lengths, reset, batch_first, save);
  with_type(h0, [&]<class S>(S) {
    auto problem = call.template problem<S>(call.layout.get());
    problem.parallel = torch_threads();
    problem.projected = header.projected != 0;
    problem.packed = from + kHeaderBytes;
    problem.pairs = header.pairs != 0;
    run<S>(kernels_of<Cell>().forward_f32, kernels_of<Cell>().forward_f64, problem);
  });
  return call.results();
}

template <class Cell, bool kWriteOver>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const MaybeTensor& dsaved_c,
    const Tensor& saved, const Tensor& saved_c, const Tensor& y, const Tensor& h0, const MaybeTensor& c0,
    Tensors w_hh, Tensors w_hr, Tensors u, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
    const MaybeTensor& reset, bool batch_first, bool keep) {
  const BackwardCall call(Cell::kInfo, dy, dh_n, dc_n, dsaved_c, saved, saved_c, y, h0, c0, w_hh, w_hr, u,
                          batch_sizes, lengths, reset, batch_first, keep, kWriteOver);
  with_type(h0, [&]<class S>(S) {
    auto problem = call.template problem<S>(call.layout.get());
    problem.parallel = torch_threads();
    run<S>(kernels_of<Cell>().backward_f32, kernels_of<Cell>().backward_f64, problem);
  });
  return call.results();
}

template <class Cell>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> products(const Tensor& dgates, const Tensor& x,
                                                            const Tensor& y, const Tensor& h0, Tensors w_ih,
                                                            const MaybeTensor& batch_sizes,
                                                            const MaybeTensor& lengths,
                                                            const MaybeTensor& reset, bool batch_first,
                                                            bool inputs, bool weights) {
  constexpr int64_t G = Cell::kInfo.gates, E = Cell::kInfo.gradients();
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
    run<S>(kernels_of<Cell>().products_f32, kernels_of<Cell>().products_f64, problem);
  });
  return {dx, dw_ih, dw_hh, db_ih, db_hh};
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  fastrnn::AllCells::each([&]<class Cell>() {
    const std::string name = Cell::kInfo.name;
    m.impl(name.c_str(), TORCH_BOX(&fastrnn::forward<Cell>));
    m.impl((name + "_backward").c_str(), TORCH_BOX((&fastrnn::backward<Cell, false>)));
    if constexpr (Cell::kInfo.reuses_saved)
      m.impl((name + "_backward_in_place").c_str(), TORCH_BOX((&fastrnn::backward<Cell, true>)));
    m.impl((name + "_products").c_str(), TORCH_BOX(&fastrnn::products<Cell>));
    m.impl((name + "_pack").c_str(), TORCH_BOX(&fastrnn::pack<Cell>));
    m.impl((name + "_packed").c_str(), TORCH_BOX(&fastrnn::forward_packed<Cell>));
  });
}
