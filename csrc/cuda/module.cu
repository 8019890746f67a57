// The Python module _C_cuda: to import it registers the CUDA operators, if torch is a CUDA build.
#include <Python.h>
#include <dlfcn.h>

#include "cuda/device.h"

namespace fastrnn {

TorchCuda torch_cuda{};

namespace {

/// The function of this name in torch's CUDA library, which torch has loaded.
template <class Function>
bool look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) PyErr_Format(PyExc_ImportError, "this torch's CUDA library has no %s", name);
  return function != nullptr;
}

bool look_up_all() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (!library) {
    PyErr_SetString(PyExc_ImportError, "this torch is not a CUDA build");
    return false;
  }
  return look_up(library, "aoti_torch_cuda_mm_out", torch_cuda.mm_out) &&
         look_up(library, "aoti_torch_cuda_addmm_out", torch_cuda.addmm_out) &&
         look_up(library, "aoti_torch_get_current_cuda_stream", torch_cuda.current_stream);
}

}  // namespace

bool tf32_is_allowed() {
  // The setting may change between two calls and torch's C interface does not have it, so Python is asked.
  // What does not change is looked up once.
  const PyGILState_STATE gil = PyGILState_Ensure();
  static PyObject *getter, *arguments;
  if (!getter) {
    if (PyObject* const torch_c = PyImport_ImportModule("torch._C")) {
      arguments = Py_BuildValue("(ss)", "cuda", "rnn");
      getter = PyObject_GetAttrString(torch_c, "_get_fp32_precision_getter");
      Py_DecRef(torch_c);
    }
  }
  bool allowed = false;
  if (PyObject* const precision = getter ? PyObject_Call(getter, arguments, nullptr) : nullptr) {
    allowed = PyUnicode_CompareWithASCIIString(precision, "tf32") == 0;
    Py_DecRef(precision);
  }
  PyErr_Clear();
  PyGILState_Release(gil);
  return allowed;
}

}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  fastrnn::register_scans<fastrnn::Drivers<fastrnn::CudaDevice>>(m);
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return fastrnn::look_up_all() ? PyModule_Create(&definition) : nullptr;
}
