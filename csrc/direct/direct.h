// Direct calls: an op on plain CPU tensors from Python straight to its kernel, past torch's dispatcher. What a call
// costs besides the kernel falls to a quarter, and when the caches hold the last layer's weights instead of this code,
// to a third (benchmarks/call_cost.py).
#pragma once

#include <Python.h>

namespace taco::direct {

// Adds the functions direct_* to the module. False with a Python error set when that fails.
bool add_to(PyObject* module);

}  // namespace taco::direct
