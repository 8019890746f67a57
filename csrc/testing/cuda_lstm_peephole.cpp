#include "cells/lstm.h"
#include "testing/cuda_operators.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_cuda_on_host, m) {
  fastrnn::define_operators<fastrnn::LstmPeephole>(m);
}
STABLE_TORCH_LIBRARY_IMPL(fastrnn_cuda_on_host, CPU, m) {
  fastrnn::register_operators<fastrnn::LstmPeephole>(m);
}
