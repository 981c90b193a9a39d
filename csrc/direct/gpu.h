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

// What a call comes to. With a pivot (Pivoted) x's columns are put in its order before the product of `input`.
struct GpuCall {
  Op op;
  const Rows& x;
  LowRankInput input;
  LowRankMap* maps;
  int count;
  const void* pivot = nullptr;
  bool long_pivot = false;
};

// Notes that calls like this one are served by the CUDA kernels, launched in this way (cuda::Launch), or by the library
// (`launch` negative).
void remember(const GpuCall& call, int launch);

// Forgets all of them.
void forget();

// Serves a call whose input is on a GPU: results in order; with `list` as a list, else the one by itself. None where the
// ordinary way must be taken, False for the library; null with a Python error where a launch failed.
PyObject* on_gpu_result(const GpuCall& call, bool list);

}  // namespace taco::direct
