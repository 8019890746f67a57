#include "cuda/device.h"
#include "linear/chunks.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  m.impl("linear_scan", TORCH_BOX(&fastrnn::linear_scan<fastrnn::ChunkedScan<fastrnn::CudaDevice>>));
}
