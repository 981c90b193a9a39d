// Direct calls on a GPU: calls that the ordinary way has served go from then on straight to the same kernel.
//
// Which backend serves a call on a GPU is the dispatcher's choice (taco_kernels.dispatch, tables of measured GPUs). Once
// it has served one by the CUDA kernels or by the library, it says so here, and calls of the same op, dtype and sizes
// are direct. Nothing is remembered while a backend is forced.
#pragma once

#include <Python.h>

#include "cpu/taco_cpu.h"
#include "direct/tensors.h"

namespace taco::direct {

#ifdef TACO_WITH_CUDA
constexpr bool kHasGpu = true;
#else
constexpr bool kHasGpu = false;
#endif

// x's columns in another order, before the product (Pivoted); none where `index` is null.
struct Pivot {
  const void* index = nullptr;
  bool is_long = false;
};

// Notes that calls like this one are served by the CUDA kernels, launched in this way (cuda::Launch), or by the library
// (`launch` negative).
void remember(Op op, const LowRankInput& input, const LowRankMap* maps, int count, int launch);

// Forgets all of them.
void forget();

// Serves a call whose input is on a GPU: results in order; with `list` as a list, else the one by itself. None where the
// ordinary way must be taken, False for the library; null with a Python error where a launch failed.
PyObject* on_gpu_result(Op op, const Rows& x, const LowRankInput& input, LowRankMap* maps, int count, bool list,
                        Pivot pivot = {});

}  // namespace taco::direct
