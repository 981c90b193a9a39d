// Kernels that torch's dispatcher calls without Python between: those of the ops `<op>_native`, which compiled code
// (torch.compile, vLLM) is given for CPU tensors without gradients. A kernel in Python costs 25 us of a call there, and
// over 100 us when the caches hold the last layer's weights.
#pragma once

#include <Python.h>

namespace taco::direct {

// The op's name; True when its twin now has its kernel, False where this torch does not offer what that needs.
PyObject* register_op(PyObject* module, PyObject* name);

}  // namespace taco::direct
