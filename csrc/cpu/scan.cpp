// The CPU as a backend of the operators: from a call to the kernel of its cell and number type.
#include <cstring>

#include "common/operators.h"
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

/// f(kernels) with those of the cell, for numbers like those of `like`.
template <class F>
void with_kernels(const CellInfo& cell, const Tensor& like, F f) {
  const CellKernels* kernels = nullptr;
  with_cell<AllCells>(cell,
                      [&]<class Cell>() { kernels = &instruction_set().cells[AllCells::index<Cell>()]; });
  if (like.scalar_type() == ScalarType::Float) return f(kernels->f32);
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Double, "fastrnn's CPU kernels take float32 and float64");
  f(kernels->f64);
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

PackHeader header_of(const CellInfo& cell, const Tensor& like, const LayerWeights& weights) {
  PackHeader header{.isa = {},
                    .gates = cell.gates,
                    .scalar = static_cast<int64_t>(like.scalar_type()),
                    .D = weights.D,
                    .I = weights.I,
                    .H = weights.H,
                    .P = weights.P,
                    .split = cell.split,
                    .vectors = cell.vectors,
                    .projected = weights.projected,
                    .pairs = weights.packed.pairs,
                    .unused = {}};
  std::strncpy(header.isa, instruction_set().name, sizeof header.isa - 1);
  return header;
}

/// The bytes of the panels of these sizes; fills `to` from the weights where that is not null.
int64_t pack_panels(const CellInfo& cell, const Tensor& like, const LayerWeights& weights, char* to) {
  int64_t bytes = 0;
  with_kernels(cell, like, [&]<class S>(const Kernels<S>& kernels) {
    PackProblem<S> problem{
        weights.I, weights.H, weights.P, weights.projected, weights.packed.pairs, static_cast<int>(weights.D),
        {},        to};
    for (int64_t d = 0; to && d < weights.D; ++d) problem.weights[d] = weights.of<S>(d);
    bytes = kernels.pack(problem);
  });
  return bytes;
}

Tensor pack(std::string name, Tensors given, int64_t slots, bool bfloat16) {
  const CellInfo& cell = cell_named(name);
  STD_TORCH_CHECK(!given.empty(), "there are no weights to pack");
  const Tensor like = given[0];
  STD_TORCH_CHECK(!bfloat16 || like.scalar_type() == ScalarType::Float,
                  "only float32 weights can be stored as bfloat16");
  LayerWeights weights(cell, like, given, slots);
  weights.packed.pairs = bfloat16;
  const PackHeader header = header_of(cell, like, weights);
  const int64_t bytes = kHeaderBytes + pack_panels(cell, like, weights, nullptr);
  const Tensor packed = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  auto* const to = static_cast<char*>(packed.mutable_data_ptr());
  prefer_huge_pages(to, bytes);
  std::memset(to, 0, static_cast<size_t>(bytes));  // gaps too: the same weights give the same bytes
  std::memcpy(to, &header, sizeof header);
  pack_panels(cell, like, weights, to + kHeaderBytes);
  return packed;
}

struct Cpu {
  static void forward(const ForwardCall& call) {
    run(call, call.y, [](const auto& kernels) { return kernels.forward; });
  }
  static void backward(const BackwardCall& call) {
    run(call, call.y, [](const auto& kernels) { return kernels.backward; });
  }
  static void products(const ProductsCall& call) {
    run(call, call.y, [](const auto& kernels) { return kernels.products; });
  }

  /// The sizes that the header of a pack tells of, if its bytes can be that pack, for numbers like those of
  /// `like`.
  static LayerWeights unpack(const CellInfo& cell, const Tensor& like, const Tensor& packed) {
    STD_TORCH_CHECK(packed.is_cpu() && packed.dim() == 1 && packed.is_contiguous() &&
                        packed.scalar_type() == ScalarType::Byte && packed.numel() > kHeaderBytes,
                    "packed must be the result of fastrnn::pack for ", cell.name);
    const auto* const from = static_cast<const char*>(packed.const_data_ptr());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(from) % sizeof(double) == 0, "packed must be aligned");
    PackHeader header;
    std::memcpy(&header, from, sizeof header);
    const auto& [isa, gates, scalar, D, I, H, P, split, vectors, projected, pairs, unused] = header;
    const bool sizes =
        D >= 1 && D <= kMaxDirections && I >= 0 && H > 0 && P > 0 && (projected ? cell.projects : H == P) &&
        (!pairs || like.scalar_type() == ScalarType::Float) &&
        // A weight takes two bytes at least. After this no product of the sizes overflows.
        2.0 * double(H) * ((cell.takes_gates ? 0 : double(I)) + (cell.dense ? double(P) : 0)) <=
            double(packed.numel());
    const LayerWeights weights(sizes ? D : 1, I, H, P, projected != 0, {from + kHeaderBytes, pairs != 0});
    const PackHeader expected = header_of(cell, like, weights);
    STD_TORCH_CHECK(sizes && !std::memcmp(&header, &expected, sizeof header) &&
                        packed.numel() == kHeaderBytes + pack_panels(cell, like, weights, nullptr),
                    "packed must be the result of fastrnn::pack for ", cell.name,
                    ", from this process and for the dtype of h0");
    return weights;
  }

 private:
  template <class Call, class F>
  static void run(const Call& call, const Tensor& like, F choose) {
    with_kernels(call.cell, like, [&]<class S>(const Kernels<S>& kernels) {
      auto problem = call.template problem<S>(call.layout.get());
      problem.parallel = torch_threads();
      STD_TORCH_CHECK(choose(kernels)(problem), "fastrnn: not enough memory for the working arrays");
    });
  }
};

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  fastrnn::register_scans<fastrnn::Cpu>(m);
  m.impl("weight_gradients",
         TORCH_BOX(&fastrnn::WithoutOptions<&fastrnn::weight_gradients<fastrnn::Cpu>>::call));
  m.impl("weight_gradients.options", TORCH_BOX(&fastrnn::weight_gradients<fastrnn::Cpu>));
  m.impl("pack", TORCH_BOX(&fastrnn::pack));
}
