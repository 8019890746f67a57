// The CPU as a CUDA device: runs the driver and the kernels on the CPU's tensors, as a device of any size;
// for the tests alone.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>

#include "cuda/driver.cuh"

namespace fastrnn {

struct HostDevice {
  DeviceLimits limits;
  bool tf32;
  testing::Schedule schedule;
  int64_t resident;  // blocks of a cooperative grid that it holds at once

  /// What torch.ops.fastrnn_cuda_on_host.configure has set, for any tensor.
  static inline HostDevice* configured = nullptr;
  HostDevice(const DeviceLimits& limits_, bool tf32_, testing::Schedule schedule_, int64_t resident_)
      : limits(limits_), tf32(tf32_), schedule(schedule_), resident(resident_) {}
  explicit HostDevice(const Tensor&) : HostDevice(*configured) {}

  template <class Parameters>
  bool launch(void (*kernel)(Parameters), const Grid& grid, const Parameters& parameters) const {
    if (grid.cooperative && grid.blocks > resident) return false;
    const testing::Launch launch{unsigned(grid.blocks), unsigned(grid.threads), size_t(grid.shared_bytes),
                                 grid.cooperative, schedule};
    testing::run(launch, [&] { kernel(parameters); });
    return true;
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

}  // namespace fastrnn
