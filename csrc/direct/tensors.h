// Plain tensors of Python, read and made without torch's dispatcher.
#pragma once
#include <memory>
#include <vector>

#include "direct/exchange.h"

namespace fastrnn::direct {

/// A tensor as the calls of this folder take it: contiguous, on the CPU, without an empty dimension.
struct View {
  static constexpr int kMaxDims = 3;
  void* data = nullptr;
  int dims = 0;
  int64_t shape[kMaxDims]{};

  int64_t count() const {
    int64_t count = 1;
    for (int i = 0; i < dims; ++i) count *= shape[i];
    return count;
  }
  bool is(std::initializer_list<int64_t> sizes) const {
    if (dims != static_cast<int>(sizes.size())) return false;
    const int64_t* own = shape;
    for (const int64_t size : sizes)
      if (*own++ != size) return false;
    return true;
  }
};

/// A reference to a Python object, given up at the end.
struct Release {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

/// What is asked of torch once, by begin().
struct Torch {
  const dlpack::ExchangeApi* api = nullptr;
  PyObject *tensor_type = nullptr, *parameter_type = nullptr;
  PyObject *is_neg = nullptr, *requires_grad = nullptr;  // names
};
inline Torch torch_here;

/// begin(torch.Tensor, torch.nn.Parameter) -> whether this torch has the exchange API
inline PyObject* begin(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return PyErr_SetString(PyExc_TypeError, "begin takes two types"), nullptr;
  PyObject* const capsule = PyObject_GetAttrString(args[0], "__dlpack_c_exchange_api__");
  if (!capsule) return PyErr_Clear(), PyBool_FromLong(false);
  auto* const api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DecRef(capsule);
  if (!api) return PyErr_Clear(), PyBool_FromLong(false);
  if (api->version.major != 1 || !api->view) return PyBool_FromLong(false);
  torch_here = {api, Py_NewRef(args[0]), Py_NewRef(args[1]), PyUnicode_InternFromString("is_neg"),
                PyUnicode_InternFromString("requires_grad")};
  return PyBool_FromLong(true);
}

/// The tensors of one call, which all have one number type.
class Reader {
 public:
  /// differentiable: whether gradients are recorded.
  explicit Reader(bool differentiable) : differentiable_(differentiable) {}

  int bits() const { return bits_; }
  /// Whether gradients are recorded, and one of the tensors requires them.
  bool requires_grad() const { return requires_grad_; }

  /// Whether it is a plain tensor: none of a subclass, which would want to see the call, and no view of
  /// negated or conjugated numbers, which the memory does not hold.
  bool read(PyObject* object, View& view) {
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != torch_here.tensor_type && type != torch_here.parameter_type) return false;
    dlpack::Tensor t;
    if (torch_here.api->view(object, &t)) return PyErr_Clear(), false;
    const bool numbers = t.dtype.code == dlpack::kFloat && t.dtype.lanes == 1 &&
                         (bits_ ? t.dtype.bits == bits_ : t.dtype.bits == 32 || t.dtype.bits == 64);
    if (!numbers || t.device.type != dlpack::kCpu || t.dims > View::kMaxDims || !t.data) return false;
    bits_ = t.dtype.bits, view = {static_cast<char*>(t.data) + t.byte_offset, t.dims, {}};
    int64_t stride = 1;
    for (int i = t.dims - 1; i >= 0; --i) {
      const int64_t size = view.shape[i] = t.shape[i];
      if (size == 0 || (size != 1 && t.strides && t.strides[i] != stride)) return false;
      stride *= size;
    }
    if (differentiable_ && !requires_grad_) {
      const Object wanted(PyObject_GetAttr(object, torch_here.requires_grad));
      if (!wanted) return PyErr_Clear(), false;
      requires_grad_ = wanted.get() == Py_True;
    }
    const Object negated(PyObject_CallMethodObjArgs(object, torch_here.is_neg, nullptr));
    if (!negated) return PyErr_Clear(), false;
    return negated.get() == Py_False;
  }

 private:
  bool differentiable_, requires_grad_ = false;
  int bits_ = 0;
};

/// A plain tensor of bytes.
struct Bytes {
  const char* data = nullptr;
  int64_t count = 0;
};
inline bool read_bytes(PyObject* object, Bytes& bytes) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != torch_here.tensor_type) return false;
  dlpack::Tensor t;
  if (torch_here.api->view(object, &t)) return PyErr_Clear(), false;
  if (t.dims != 1 || t.dtype.code != dlpack::kUnsigned || t.dtype.bits != 8 || t.device.type != dlpack::kCpu)
    return false;
  if (t.strides && t.strides[0] != 1 && t.shape[0] != 1) return false;
  bytes = {static_cast<const char*>(t.data) + t.byte_offset, t.shape[0]};
  return true;
}

/// Python's error is set already.
struct PythonError {};

/// A new tensor, uninitialised.
struct NewTensor {
  Object object;
  void* data = nullptr;
};
inline NewTensor new_tensor(std::initializer_list<int64_t> sizes, int bits) {
  std::vector<int64_t> shape(sizes);
  dlpack::Tensor like{nullptr,
                      {dlpack::kCpu, 0},
                      static_cast<int32_t>(shape.size()),
                      {dlpack::kFloat, static_cast<uint8_t>(bits), 1},
                      shape.data(),
                      nullptr,
                      0};
  const auto fail = [](void*, const char*, const char* message) {
    PyErr_SetString(PyExc_RuntimeError, message);
  };
  dlpack::ManagedTensor* made = nullptr;
  if (torch_here.api->allocate(&like, &made, nullptr, fail)) throw PythonError{};
  void* const data = made->tensor.data;
  void* object = nullptr;
  if (torch_here.api->to_python(made, &object)) throw PythonError{};
  return {Object(static_cast<PyObject*>(object)), data};
}

/// The elements of a tuple or a list; none of None.
inline bool elements(PyObject* sequence, std::vector<PyObject*>& found) {
  if (sequence == Py_None) return true;
  const bool tuple = PyTuple_Check(sequence);
  if (!tuple && !PyList_Check(sequence)) return false;
  const Py_ssize_t count = tuple ? PyTuple_Size(sequence) : PyList_Size(sequence);
  found.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i)
    found.push_back(tuple ? PyTuple_GetItem(sequence, i) : PyList_GetItem(sequence, i));
  return true;
}

}  // namespace fastrnn::direct
