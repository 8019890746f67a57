#define FASTRNN_ISA baseline
#define FASTRNN_TABLE kMathBaseline
#define FASTRNN_NAME "baseline"
#include "testing/math.inc"
