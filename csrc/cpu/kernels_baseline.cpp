#define FASTRNN_ISA baseline
#define FASTRNN_TABLE kBaseline
#define FASTRNN_NAME "baseline"
#include "cpu/kernels.inc"
