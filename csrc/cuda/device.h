// The CUDA device as the driver sees it (driver.cuh): launches on torch's current stream, torch's own matrix
// products, and what torch allows.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/driver.cuh"

namespace fastrnn {

/// Functions of torch's CUDA library, looked up when the module is loaded, so that one binary is built
/// without a CUDA build of torch.
struct TorchCuda {
  AOTITorchError (*mm_out)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
  AOTITorchError (*addmm_out)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double,
                              double);
  AOTITorchError (*current_stream)(int32_t, void**);
};
extern TorchCuda torch_cuda;

/// Whether torch lets recurrent layers round float32 to tf32 (torch.backends.cudnn.rnn.fp32_precision).
bool tf32_is_allowed();

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastrnn: ", what, ": ", cudaGetErrorString(error));
}

class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& like) : index_(like.get_device_index()), guard_(index_) {
    void* stream;
    TORCH_ERROR_CODE_CHECK(torch_cuda.current_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    limits = {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    // Asked for float32 alone, because the answer takes Python's lock.
    tf32 = like.scalar_type() == torch::headeronly::ScalarType::Float && tf32_is_allowed();
  }

  DeviceLimits limits;
  bool tf32;

  template <class Parameters>
  bool launch(void (*kernel)(Parameters), const Grid& grid, const Parameters& parameters) const {
    if (grid.shared_bytes > 48 << 10)  // more than the default limit
      check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes),
                 "shared memory of a block");
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = grid.cooperative;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream_;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(parameters));
    if (error == cudaErrorCooperativeLaunchTooLarge) {
      cudaGetLastError();  // which nobody else is to find
      return false;
    }
    check_cuda(error, "launch of a kernel");
    return true;
  }

  void multiply(Tensor& out, const Tensor& a, const Tensor& b) const {
    TORCH_ERROR_CODE_CHECK(torch_cuda.mm_out(out.get(), a.get(), b.get()));
  }
  void multiply_add(Tensor& out, const Tensor& addend, const Tensor& a, const Tensor& b) const {
    TORCH_ERROR_CODE_CHECK(torch_cuda.addmm_out(out.get(), addend.get(), a.get(), b.get(), 1.0, 1.0));
  }

  /// Copies int64 numbers to the device. The copy does not survive until a captured graph is replayed.
  Tensor copy(const int64_t* numbers, int64_t count) const {
    cudaStreamCaptureStatus status;
    check_cuda(cudaStreamIsCapturing(stream_, &status), "stream");
    STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone,
                    "fastrnn: packed sequences and lengths cannot be captured in a CUDA graph");
    const auto bytes = static_cast<size_t>(count) * sizeof(int64_t);
    const Tensor copy =
        torch::stable::empty({count}, torch::headeronly::ScalarType::Long, std::nullopt,
                             torch::stable::Device(torch::headeronly::DeviceType::CUDA, index_));
    check_cuda(cudaMemcpyAsync(copy.mutable_data_ptr(), numbers, bytes, cudaMemcpyHostToDevice, stream_),
               "copy of the lengths");
    return copy;
  }

  void clear(void* memory, int64_t bytes) const {
    check_cuda(cudaMemsetAsync(memory, 0, size_t(bytes), stream_), "memset");
  }

 private:
  int attribute(cudaDeviceAttr name) const {
    int value;
    check_cuda(cudaDeviceGetAttribute(&value, name, index_), "properties of the device");
    return value;
  }

  const int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fastrnn
