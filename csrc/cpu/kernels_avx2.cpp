#define FASTRNN_ISA avx2
#define FASTRNN_TABLE kAvx2
#define FASTRNN_NAME "avx2"
#include "cpu/kernels.inc"

#ifndef __AVX2__
#error "the flags of this instruction set did not reach the compiler"
#endif
