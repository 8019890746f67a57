// torch.ops.fastrnn_cuda_on_host.<cell> and <cell>_backward: the CUDA operators, driver and kernels, on the
// CPU and on its tensors, with a device of any size; for the tests alone.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>

#include "common/schemas.h"
#include "cuda/driver.cuh"

namespace fastrnn {
namespace {

struct HostDevice {
  DeviceLimits limits;
  testing::Schedule schedule;

  template <class Parameters>
  void launch(void (*kernel)(Parameters), const Grid& grid, const Parameters& parameters) const {
    const testing::Launch launch{unsigned(grid.blocks), unsigned(grid.threads), size_t(grid.shared_bytes),
                                 grid.cooperative, schedule};
    testing::run(launch, [&] { kernel(parameters); });
  }
  void multiply(Tensor& out, const Tensor& a, const Tensor& b) const {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
  void multiply_add(Tensor& out, const Tensor& addend, const Tensor& a, const Tensor& b) const {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), addend.get(), a.get(), b.get(), 1.0, 1.0));
  }
  Tensor copy(const int64_t* numbers, int64_t count) const {
    Tensor copy = torch::stable::empty({count}, torch::headeronly::ScalarType::Long);
    std::memcpy(copy.mutable_data_ptr(), numbers, size_t(count) * sizeof(int64_t));
    return copy;
  }
  void clear(void* memory, int64_t bytes) const { std::memset(memory, 0, size_t(bytes)); }
};

/// The operator's schema, with the device's arguments after its own.
std::string with_device(std::string schema) {
  return schema.insert(
      schema.find(") ->"),
      ", bool tf32, int multiprocessors, int shared_bytes, bool one_block, int order, int seed");
}

HostDevice host(int64_t multiprocessors, int64_t shared_bytes, bool one_block, int64_t order, int64_t seed) {
  return {{int(multiprocessors), int(shared_bytes), one_block},
          {static_cast<testing::Schedule::Order>(order), uint64_t(seed)}};
}

template <class Cell>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& h0, const MaybeTensor& c0, Tensors w_ih, Tensors w_hh, Tensors b_ih,
    Tensors b_hh, Tensors w_hr, Tensors u, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
    const MaybeTensor& reset, bool batch_first, int64_t save, bool tf32, int64_t multiprocessors,
    int64_t shared_bytes, bool one_block, int64_t order, int64_t seed) {
  const ForwardCall call(Cell::kInfo, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, u, batch_sizes, lengths, reset,
                         batch_first, save);
  HostDevice device = host(multiprocessors, shared_bytes, one_block, order, seed);
  Driver<HostDevice, Cell>(device, tf32).forward(call);
  return call.results();
}

template <class Cell, bool kWriteOver>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const MaybeTensor& dsaved_c,
    const Tensor& saved, const Tensor& saved_c, const Tensor& y, const Tensor& h0, const MaybeTensor& c0,
    Tensors w_hh, Tensors w_hr, Tensors u, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
    const MaybeTensor& reset, bool batch_first, bool keep, bool tf32, int64_t multiprocessors,
    int64_t shared_bytes, bool one_block, int64_t order, int64_t seed) {
  const BackwardCall call(Cell::kInfo, dy, dh_n, dc_n, dsaved_c, saved, saved_c, y, h0, c0, w_hh, w_hr, u,
                          batch_sizes, lengths, reset, batch_first, keep, kWriteOver);
  HostDevice device = host(multiprocessors, shared_bytes, one_block, order, seed);
  Driver<HostDevice, Cell>(device, tf32).backward(call);
  return call.results();
}

template <class Cell, class Library>
void define_operators(Library& m) {
  const std::string name = Cell::kInfo.name;
  m.def((name + with_device(kForward)).c_str());
  m.def((name + "_backward" + with_device(kBackward)).c_str());
  if constexpr (Cell::kInfo.reuses_saved)
    m.def((name + "_backward_in_place" + with_device(backward_in_place())).c_str());
}

template <class Cell, class Library>
void register_operators(Library& m) {
  const std::string name = Cell::kInfo.name;
  m.impl(name.c_str(), TORCH_BOX(&forward<Cell>));
  m.impl((name + "_backward").c_str(), TORCH_BOX((&backward<Cell, false>)));
  if constexpr (Cell::kInfo.reuses_saved)
    m.impl((name + "_backward_in_place").c_str(), TORCH_BOX((&backward<Cell, true>)));
}

}  // namespace
}  // namespace fastrnn
