#include "testing/host_device.h"

static const bool added = fastrnn::Drivers<fastrnn::HostDevice>::add<fastrnn::GruLayerNorm>();
