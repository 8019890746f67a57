// The CPU as a backend of the operators: from a call to the kernel of its cell and number type.
#include <algorithm>
#include <cstring>

#include "common/operators.h"
#include "cpu/bfloat16.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/packs.h"
#include "cpu/torch_threads.h"

namespace fastrnn {
namespace {

using torch::headeronly::ScalarType;

/// f(kernels) with those of the cell, for numbers like those of `like`.
template <class F>
auto with_kernels(const CellInfo& cell, const Tensor& like, F f) {
  const CellKernels* kernels = nullptr;
  with_cell<AllCells>(cell,
                      [&]<class Cell>() { kernels = &instruction_set().cells[AllCells::index<Cell>()]; });
  if (like.scalar_type() == ScalarType::Float) return f(kernels->f32);
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Double, "fastrnn's CPU kernels take float32 and float64");
  return f(kernels->f64);
}

Storage storage_named(const std::string& name) {
  if (name.empty()) return Storage::kAsGiven;
  if (name == "bfloat16") return Storage::kBfloat16;
  STD_TORCH_CHECK(name == "int8", "weights are stored as bfloat16 or int8, not as ", name);
  return Storage::kInt8;
}

Tensor pack(std::string name, Tensors given, int64_t slots, std::string stored_as) {
  const CellInfo& cell = cell_named(name);
  const Storage storage = storage_named(stored_as);
  STD_TORCH_CHECK(!given.empty(), "there are no weights to pack");
  const Tensor like = given[0];
  STD_TORCH_CHECK(storage == Storage::kAsGiven || like.scalar_type() == ScalarType::Float,
                  "only float32 weights can be stored as ", stored_as);
  const LayerWeights weights(cell, like, given, slots);
  const int64_t deepest = std::max({cell.takes_gates ? 0 : weights.I, weights.H, weights.P});
  STD_TORCH_CHECK(storage != Storage::kInt8 || deepest <= kMostInt8Depth, "int8 weights are for sizes up to ",
                  kMostInt8Depth, ", got ", deepest);
  return with_kernels(cell, like, [&]<class S>(const Kernels<S>& kernels) {
    PackProblem<S> problem{weights.I, weights.H,      weights.P, weights.projected,
                           storage,   int(weights.D), {},        {}};
    const PackHeader header = header_of(cell, problem);
    const int64_t bytes = kHeaderBytes + kernels.pack(problem);
    const Tensor packed = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    auto* const to = static_cast<char*>(packed.mutable_data_ptr());
    prefer_huge_pages(to, bytes);
    std::memset(to, 0, static_cast<size_t>(bytes));  // gaps too: the same weights give the same bytes
    std::memcpy(to, &header, sizeof header);
    for (int64_t d = 0; d < weights.D; ++d) problem.weights[d] = weights.of<S>(d);
    problem.to = to + kHeaderBytes;
    kernels.pack(problem);
    return packed;
  });
}

struct Cpu {
  static void forward(const ForwardCall& call) {
    check(call.weights);
    run(call, call.y, [](const auto& kernels) { return kernels.forward; });
  }
  static void backward(const BackwardCall& call) {
    check(call.weights);
    run(call, call.y, [](const auto& kernels) { return kernels.backward; });
  }
  static void products(const ProductsCall& call) {
    run(call, call.y, [](const auto& kernels) { return kernels.products; });
  }

  static LayerWeights unpack(const CellInfo& cell, const Tensor& like, const Tensor& packed) {
    STD_TORCH_CHECK(packed.is_cpu() && packed.dim() == 1 && packed.is_contiguous() &&
                        packed.scalar_type() == ScalarType::Byte,
                    "packed must be the result of fastrnn::pack for ", cell.name);
    const auto* const from = static_cast<const char*>(packed.const_data_ptr());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(from) % sizeof(double) == 0, "packed must be aligned");
    return with_kernels(cell, like, [&]<class S>(const Kernels<S>& kernels) {
      PackProblem<S> sizes;
      STD_TORCH_CHECK(read_pack(cell, kernels, from, packed.numel(), sizes),
                      "packed must be the result of fastrnn::pack for ", cell.name,
                      ", from this process and for the dtype of h0");
      return LayerWeights(sizes.directions, sizes.I, sizes.H, sizes.P, sizes.projected,
                          {from + kHeaderBytes, sizes.storage});
    });
  }

 private:
  static void check(const LayerWeights& weights) {
    STD_TORCH_CHECK(!weights.bfloat16 || bfloat16_products(),
                    "this processor has no products of bfloat16: convert the weights to float32");
  }

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
