#define FASTRNN_ISA avx512
#define FASTRNN_TABLE kMathAvx512
#define FASTRNN_NAME "avx512"
#include "testing/math.inc"
