// Kernels that torch's dispatcher calls without Python between: those of the ops `<op>_native`, which compiled code
// (torch.compile, vLLM) is given for CPU tensors without gradients. A kernel in Python costs 30 us of a call there, and several
// hundred when the caches hold the last layer's weights, ten times the work of a small map.
#pragma once

#include <Python.h>

namespace taco::direct {

// The op's name; True when its twin now has its kernel, False where this torch does not offer what that needs.
PyObject* register_op(PyObject* module, PyObject* name);

}  // namespace taco::direct
