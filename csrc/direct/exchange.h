// torch's tensors from C: DLPack's exchange API, which torch has from 2.10 on. Its ABI is fixed by the DLPack
// standard, version 1 (https://dmlc.github.io/dlpack/latest/c_api.html), and stands here as far as it is
// used.
#pragma once
#include <Python.h>

#include <cstdint>

namespace fastrnn::dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kUnsigned = 1, kFloat = 2;

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

/// Each function returns 0, or -1 with Python's error set (allocate: with SetError called).
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context, SetError);
  int (*export_tensor)(void* object, ManagedTensor** out);
  int (*to_python)(ManagedTensor* stolen, void** object);
  int (*view)(void* object, Tensor* out);  // valid while the object is
  int (*stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace fastrnn::dlpack
