// Plain CPU tensors as the kernels take them, and the conditions under which a call may be direct.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "cpu/taco_cpu.h"
#include "direct/dlpack.h"

namespace taco::direct {

// "From this rank on, up to so many rows": first that fits counts.
struct Limit {
  std::int64_t rank, rows;
};

enum Op { kLinear, kBridge, kGroup, kMlp, kPivoted, kOps };
constexpr const char* kOpNames[kOps] = {"low_rank_linear", "low_rank_bridge", "low_rank_linear_group", "low_rank_mlp",
                                        "pivoted_low_rank_linear"};

struct State {
  const dlpack::ExchangeApi* api = nullptr;
  PyTypeObject* tensor = nullptr;     // torch.Tensor
  PyTypeObject* parameter = nullptr;  // torch.nn.Parameter
  std::vector<PyObject*> guards;      // functions without arguments; what is true in one of them asks for the dispatcher
  PyObject* threads = nullptr;        // torch.get_num_threads
  bool enabled = false;
  std::vector<Limit> limits[kOps][3];  // by op and dtype
};

extern State state;

// Rows of an input: [..., width] whose rows lie evenly spaced.
struct Rows {
  dlpack::Tensor tensor;
  std::int64_t stride, rows, width;
  Dtype dtype;
};

struct Matrix {
  const void* data;
  std::int64_t stride, rows, columns;
};

// Each of these is false for whatever a direct call is not for; no Python error is set then.
bool nothing_in_the_way();
bool read_rows(PyObject* object, Rows& out);
bool read_matrix(PyObject* object, const Rows& like, Matrix& out);
bool read_vector(PyObject* object, const Rows& like, std::int64_t size, const void*& out);  // None is null
bool read_index(PyObject* object, std::int64_t size, const void*& out, bool& is_long);
bool read_like(PyObject* object, const Rows& like, std::int64_t width, Rows& out);  // leading dimensions of `like`

// Whether the kernels are the better choice for so many rows.
bool few_enough(Op op, const Rows& x, std::int64_t rank);

// A new tensor [leading dimensions of like, width] and where its data lies; null (no Python error) if there is none.
PyObject* new_rows(const Rows& like, std::int64_t width, void*& data);

int thread_count();  // -1 with a Python error

}  // namespace taco::direct
