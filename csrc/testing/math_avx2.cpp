#define FASTRNN_ISA avx2
#define FASTRNN_TABLE kMathAvx2
#define FASTRNN_NAME "avx2"
#include "testing/math.inc"
