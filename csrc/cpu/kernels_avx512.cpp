#define FASTRNN_ISA avx512
#define FASTRNN_TABLE kAvx512
#define FASTRNN_NAME "avx512"
#include "cpu/kernels.inc"

#ifndef __AVX512F__
#error "the flags of this instruction set did not reach the compiler"
#endif
