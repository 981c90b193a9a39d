// Plain tensors as the kernels take them, and the conditions under which a call may be direct. All tensors of a call
// are on the device of its input: the CPU, or a GPU where there are kernels for it (gpu.h).
//
// A tensor comes as a Python object (direct.cpp) or as torch's handle (registered.cpp); `read` makes a borrowed
// dlpack::Tensor of either, `absent` tells None. What follows is the same for both.
#pragma once

#include <Python.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/taco_cpu.h"
#include "direct/dlpack.h"

namespace taco::direct {

// "From this rank on, up to so many rows, and again where each thread has so many": the first whose rank fits counts.
struct Limit {
  std::int64_t rank, rows, each;
};
constexpr std::int64_t kAny = std::int64_t{1} << 62;  // dispatch.ANY

enum Op { kLinear, kBridge, kGroup, kMlp, kPivoted, kOps };
constexpr const char* kOpNames[kOps] = {"low_rank_linear", "low_rank_bridge", "low_rank_linear_group", "low_rank_mlp",
                                        "pivoted_low_rank_linear"};

struct State {
  const dlpack::ExchangeApi* api = nullptr;
  PyTypeObject* tensor = nullptr;     // torch.Tensor
  PyTypeObject* parameter = nullptr;  // torch.nn.Parameter
  std::vector<PyObject*> guards;      // functions without arguments; what is true in one of them asks for the dispatcher
  PyObject* threads = nullptr;        // torch.get_num_threads
  int (*threads_of_handles)() = nullptr;  // the same, for calls with torch's handles, which have no interpreter
  PyObject* forward_ad = nullptr;     // the names of torch.autograd.forward_ad: no function tells its level
  std::atomic<bool> enabled{false};    // read without the interpreter's lock
  std::vector<Limit> limits[kOps][3];  // by op and dtype
};

extern State state;

// Rows of an input: [..., width] whose rows lie evenly spaced.
struct Rows {
  dlpack::Tensor tensor;
  PyObject* object = nullptr;  // borrowed; null for a handle
  std::int64_t stride, rows, width;
  Dtype dtype;
};

struct Matrix {
  const void* data;
  std::int64_t stride, rows, columns;
};

bool nothing_in_the_way();  // asks the guards

bool read(PyObject* object, dlpack::Tensor& out);
inline bool absent(PyObject* object) { return object == Py_None; }

// Each of these is false for whatever a direct call is not for.
bool rows_of(Rows& out);  // from out.tensor
bool matrix_of(const dlpack::Tensor& t, const Rows& like, Matrix& out);
bool vector_of(const dlpack::Tensor& t, const Rows& like, std::int64_t size);
bool index_of(const dlpack::Tensor& t, const Rows& like, std::int64_t size, bool& is_long);
bool same_leading(const Rows& a, const Rows& b);  // dtype, device and all dimensions but the last

inline bool on_gpu(const Rows& x) { return x.tensor.device.type == dlpack::kCuda; }

inline PyObject* as_python(PyObject* object) { return object; }
template <class Handle>
PyObject* as_python(Handle) {
  return nullptr;
}

template <class Object>
bool read_rows(Object object, Rows& out) {
  out.object = as_python(object);
  return read(object, out.tensor) && rows_of(out);
}

template <class Object>
bool read_matrix(Object object, const Rows& like, Matrix& out) {
  dlpack::Tensor t;
  return read(object, t) && matrix_of(t, like, out);
}

// None is null.
template <class Object>
bool read_vector(Object object, const Rows& like, std::int64_t size, const void*& out) {
  out = nullptr;
  if (absent(object)) return true;
  dlpack::Tensor t;
  if (!read(object, t) || !vector_of(t, like, size)) return false;
  out = t.data;
  return true;
}

template <class Object>
bool read_index(Object object, const Rows& like, std::int64_t size, const void*& out, bool& is_long) {
  dlpack::Tensor t;
  if (!read(object, t) || !index_of(t, like, size, is_long)) return false;
  out = t.data;
  return true;
}

// Leading dimensions and dtype of `like`.
template <class Object>
bool read_like(Object object, const Rows& like, std::int64_t width, Rows& out) {
  return read_rows(object, out) && out.width == width && same_leading(out, like);
}

// Whether the CPU's kernels are the better choice for so many rows.
bool within_limits(Op op, const Rows& x, std::int64_t rank);

// The shape [leading dimensions of like, width]; false where it has more dimensions than fit.
constexpr int kDimensions = 8;
bool shape_like(const Rows& like, std::int64_t width, std::int64_t (&shape)[kDimensions]);

// A new tensor [leading dimensions of like, width] on its device, and where its data lies; null (no Python error) if
// there is none. `like` was read from a Python object.
PyObject* new_rows(const Rows& like, std::int64_t width, void*& data);

// A list of such tensors, one for each map, whose `y` is then where its data lies; null as above.
PyObject* new_results(const Rows& like, LowRankMap* maps, int count);

int thread_count();  // -1 with a Python error

}  // namespace taco::direct
