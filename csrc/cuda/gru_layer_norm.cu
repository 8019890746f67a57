#include "cuda/device.h"

static const bool added = fastrnn::Drivers<fastrnn::CudaDevice>::add<fastrnn::GruLayerNorm>();
