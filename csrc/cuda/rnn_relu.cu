#include "cells/rnn.h"
#include "cuda/operators.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) { fastrnn::register_operators<fastrnn::RnnRelu>(m); }
