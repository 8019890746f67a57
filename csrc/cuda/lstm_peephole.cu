#include "cells/lstm.h"
#include "cuda/operators.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) { fastrnn::register_operators<fastrnn::LstmPeephole>(m); }
