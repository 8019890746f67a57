#pragma once
#include <Python.h>

namespace fastrnn::direct {

/// What the Python module _C has: begin, forward and backward.
PyMethodDef* methods();

}  // namespace fastrnn::direct
