// torch.ops.fastrnn_cuda_on_host: fastrnn's operators by the CUDA driver and kernels, on the CPU.
#include "common/operators.h"
#include "linear/chunks.cuh"
#include "testing/host_device.h"

namespace fastrnn {
namespace {

void configure(bool tf32, int64_t multiprocessors, int64_t shared_bytes, bool one_block, int64_t order,
               int64_t seed, int64_t resident) {
  static HostDevice device{{}, false, {}, 0};
  device = {{int(multiprocessors), int(shared_bytes), one_block},
            tf32,
            {static_cast<testing::Schedule::Order>(order), uint64_t(seed)},
            resident};
  HostDevice::configured = &device;
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY(fastrnn_cuda_on_host, m) {
  m.def(
      "configure(bool tf32, int multiprocessors, int shared_bytes, bool one_block, int order, int seed, "
      "int resident=2147483647) -> ()");
  fastrnn::define_scans(m);
  m.def(fastrnn::kLinearScan);
}
STABLE_TORCH_LIBRARY_IMPL(fastrnn_cuda_on_host, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&fastrnn::configure));
}
STABLE_TORCH_LIBRARY_IMPL(fastrnn_cuda_on_host, CPU, m) {
  fastrnn::register_scans<fastrnn::Drivers<fastrnn::HostDevice>>(m);
  m.impl("linear_scan", TORCH_BOX(&fastrnn::linear_scan<fastrnn::ChunkedScan<fastrnn::HostDevice>>));
}
