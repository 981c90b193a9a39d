// What each function gives back: the result; None where the call needs torch's dispatcher (a gradient, a mode, a
// subclass, anything out of shape, for which the ordinary way has the message); False where the tensors are plain and
// fit together, but there are more rows than these kernels are good for.
#include "direct/direct.h"

#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "direct/tensors.h"

namespace taco::direct {
namespace {

// Runs a kernel without the interpreter's lock; a C++ exception becomes a Python one.
template <class Kernel>
bool run(const Kernel& kernel) {
  PyObject* kind = nullptr;
  std::string message;
  Py_BEGIN_ALLOW_THREADS;
  try {
    kernel();
  } catch (const std::bad_alloc&) {
    kind = PyExc_MemoryError;
    message = "no memory for the kernel's work space";
  } catch (const std::out_of_range& error) {
    kind = PyExc_IndexError;
    message = error.what();
  } catch (const std::exception& error) {
    kind = PyExc_RuntimeError;
    message = error.what();
  }
  Py_END_ALLOW_THREADS;
  if (kind == nullptr) return true;
  PyErr_SetString(kind, message.c_str());
  return false;
}

// Allocates, computes and hands the result out; `compute(data, threads)`.
template <class Compute>
PyObject* result_of(const Rows& like, std::int64_t width, const Compute& compute) {
  const int threads = thread_count();
  if (threads < 0) return nullptr;
  void* data = nullptr;
  PyObject* const made = new_rows(like, width, data);
  if (made == nullptr) Py_RETURN_NONE;
  if (run([&] { compute(data, threads); })) return made;
  Py_DECREF(made);
  return nullptr;
}

// One factorised map of inputs of `width` features: v [rank, width], u [out, rank], bias [out] or None.
bool read_map(PyObject* v, PyObject* u, PyObject* bias, const Rows& like, std::int64_t width, LowRankMap& out) {
  Matrix right, left;
  if (!read_matrix(v, like, right) || right.columns != width) return false;
  if (!read_matrix(u, like, left) || left.columns != right.rows) return false;
  const void* offset = nullptr;
  if (!read_vector(bias, like, left.rows, offset)) return false;
  out = {right.data, right.stride, left.data, left.stride, offset, nullptr, right.rows, left.rows, nullptr, 0};
  return true;
}

bool read_residual(PyObject* object, const Rows& x, LowRankMap& map) {
  if (object == Py_None) return true;
  Rows rest;
  if (!read_like(object, x, map.out, rest)) return false;
  map.residual = rest.tensor.data, map.residual_stride = rest.stride;
  return true;
}

LowRankInput input_of(const Rows& x) { return {x.dtype, x.tensor.data, x.stride, x.rows, x.width, false, 0.0f}; }

// x, v, u, bias, residual
PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Rows x;
  LowRankMap map;
  if (count != 5 || !nothing_in_the_way() || !read_rows(args[0], x)) Py_RETURN_NONE;
  if (!read_map(args[1], args[2], args[3], x, x.width, map)) Py_RETURN_NONE;
  if (!read_residual(args[4], x, map)) Py_RETURN_NONE;
  if (!few_enough(kLinear, x, map.rank)) Py_RETURN_FALSE;
  return result_of(x, map.out, [&](void* y, int threads) {
    map.y = y;
    low_rank(input_of(x), &map, 1, threads);
  });
}

// h, v, u, bias, eps
PyObject* bridge(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Rows h;
  LowRankMap map;
  if (count != 5 || !PyFloat_CheckExact(args[4]) || !nothing_in_the_way() || !read_rows(args[0], h)) Py_RETURN_NONE;
  if (!read_map(args[1], args[2], args[3], h, h.width, map) || map.out != h.width) Py_RETURN_NONE;
  map.residual = h.tensor.data, map.residual_stride = h.stride;
  if (!few_enough(kBridge, h, map.rank)) Py_RETURN_FALSE;
  LowRankInput input = input_of(h);
  input.normalise = true;
  input.eps = static_cast<float>(PyFloat_AS_DOUBLE(args[4]));
  return result_of(h, map.out, [&](void* y, int threads) {
    map.y = y;
    low_rank(input, &map, 1, threads);
  });
}

// x, v, u, pivot, bias, residual
PyObject* pivoted(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Rows x;
  LowRankMap map;
  Matrix left;
  const void* pivot = nullptr;
  bool is_long = false;
  if (count != 6 || !nothing_in_the_way() || !read_rows(args[0], x)) Py_RETURN_NONE;
  // u's columns say how many of the inputs the identity takes
  if (!read_matrix(args[2], x, left) || left.columns >= x.width) Py_RETURN_NONE;
  if (!read_map(args[1], args[2], args[4], x, x.width - left.columns, map)) Py_RETURN_NONE;
  if (!read_index(args[3], x.width, pivot, is_long)) Py_RETURN_NONE;
  if (!read_residual(args[5], x, map)) Py_RETURN_NONE;
  if (!few_enough(kPivoted, x, map.rank)) Py_RETURN_FALSE;
  return result_of(x, map.out, [&](void* y, int threads) {
    const std::int64_t element = x.dtype == Dtype::kF32 ? 4 : 2;
    const std::unique_ptr<char[]> gathered(new char[static_cast<std::size_t>(x.rows * x.width * element)]);
    char* const behind = gathered.get() + map.rank * element;
    gather({x.tensor.data, x.stride, pivot, gathered.get(), x.width, behind, x.width, x.rows, x.width, map.rank, element},
           is_long, threads);
    map.y = y;
    map.direct = gathered.get(), map.direct_stride = x.width;
    low_rank({x.dtype, behind, x.width, x.rows, x.width - map.rank, false, 0.0f}, &map, 1, threads);
  });
}

// x, gate_v, gate_u, gate_bias, up_v, up_u, up_bias, down_v, down_u, down_bias, act
PyObject* mlp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static const char* const kNames[] = {"silu", "gelu_tanh", "gelu", "relu"};  // in the order of Activation
  Rows x;
  LowRankMap gate, up, down;
  if (count != 11 || !PyUnicode_CheckExact(args[10])) Py_RETURN_NONE;
  int act = 0;
  while (act < 4 && PyUnicode_CompareWithASCIIString(args[10], kNames[act]) != 0) ++act;
  if (act == 4 || !nothing_in_the_way() || !read_rows(args[0], x)) Py_RETURN_NONE;
  if (!read_map(args[1], args[2], args[3], x, x.width, gate)) Py_RETURN_NONE;
  if (!read_map(args[4], args[5], args[6], x, x.width, up) || up.out != gate.out) Py_RETURN_NONE;
  if (!read_map(args[7], args[8], args[9], x, gate.out, down)) Py_RETURN_NONE;
  if (!few_enough(kMlp, x, gate.rank + up.rank)) Py_RETURN_NONE;  // composed of its maps, each by its own rank
  return result_of(x, down.out, [&](void* y, int threads) {
    down.y = y;
    low_rank_mlp(input_of(x), gate, up, down, static_cast<Activation>(act), threads);
  });
}

// x, vs, us, biases: three tuples or lists
PyObject* group(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kMembers = 8;
  Rows x;
  LowRankMap maps[kMembers];
  if (count != 4) Py_RETURN_NONE;
  for (int i = 1; i < 4; ++i)
    if (!PyTuple_Check(args[i]) && !PyList_Check(args[i])) Py_RETURN_NONE;
  const Py_ssize_t members = PySequence_Fast_GET_SIZE(args[1]);
  if (members < 1 || members > kMembers) Py_RETURN_NONE;
  if (PySequence_Fast_GET_SIZE(args[2]) != members || PySequence_Fast_GET_SIZE(args[3]) != members) Py_RETURN_NONE;
  if (!nothing_in_the_way() || !read_rows(args[0], x)) Py_RETURN_NONE;
  std::int64_t ranks = 0;
  for (Py_ssize_t i = 0; i < members; ++i) {
    PyObject* const part[3] = {PySequence_Fast_GET_ITEM(args[1], i), PySequence_Fast_GET_ITEM(args[2], i),
                               PySequence_Fast_GET_ITEM(args[3], i)};
    if (!read_map(part[0], part[1], part[2], x, x.width, maps[i])) Py_RETURN_NONE;
    ranks += maps[i].rank;
  }
  if (!few_enough(kGroup, x, ranks)) Py_RETURN_FALSE;
  const int threads = thread_count();
  PyObject* const results = threads < 0 ? nullptr : PyList_New(members);
  if (results == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < members; ++i) {
    PyObject* const y = new_rows(x, maps[i].out, maps[i].y);
    if (y == nullptr) {
      Py_DECREF(results);
      Py_RETURN_NONE;
    }
    PyList_SET_ITEM(results, i, y);
  }
  if (run([&] { low_rank(input_of(x), maps, static_cast<int>(members), threads); })) return results;
  Py_DECREF(results);
  return nullptr;
}

// capsule, torch.Tensor, torch.nn.Parameter, guards (tuple), torch.get_num_threads; whether direct calls are possible
PyObject* setup(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !PyType_Check(args[1]) || !PyType_Check(args[2]) || !PyTuple_Check(args[3])) {
    PyErr_SetString(PyExc_TypeError, "direct_setup(capsule, Tensor, Parameter, guards, get_num_threads)");
    return nullptr;
  }
  void* const pointer = PyCapsule_GetPointer(args[0], "dlpack_exchange_api");
  if (pointer == nullptr) return nullptr;
  auto* api = static_cast<const dlpack::ExchangeApi*>(pointer);
  while (api != nullptr && api->version.major != dlpack::kMajor) api = api->previous;
  if (api == nullptr || api->from_object == nullptr || api->allocate == nullptr || api->object_from_managed == nullptr)
    Py_RETURN_FALSE;
  state.api = api;
  // held for the life of the process, as the module is
  for (int i = 1; i < 5; ++i) Py_INCREF(args[i]);
  state.tensor = reinterpret_cast<PyTypeObject*>(args[1]);
  state.parameter = reinterpret_cast<PyTypeObject*>(args[2]);
  state.guards.clear();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[3]); ++i) state.guards.push_back(PyTuple_GET_ITEM(args[3], i));
  state.threads = args[4];
  Py_RETURN_TRUE;
}

PyObject* enable(PyObject*, PyObject* flag) {
  state.enabled = state.api != nullptr && PyObject_IsTrue(flag) == 1;
  return PyBool_FromLong(state.enabled);
}

// op, dtype code, tuple of (rank, rows)
PyObject* limit(PyObject*, PyObject* args) {
  const char* name = nullptr;
  int op = 0, dtype = 0;
  PyObject* pairs = nullptr;
  if (!PyArg_ParseTuple(args, "siO!", &name, &dtype, &PyTuple_Type, &pairs)) return nullptr;
  while (op < kOps && std::strcmp(name, kOpNames[op]) != 0) ++op;
  if (op == kOps || dtype < 0 || dtype > 2) {
    PyErr_SetString(PyExc_ValueError, "direct_limit: there is no such op or dtype");
    return nullptr;
  }
  std::vector<Limit> limits;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(pairs); ++i) {
    long long rank = 0, rows = 0;
    PyObject* const pair = PyTuple_GET_ITEM(pairs, i);
    if (!PyTuple_Check(pair)) {
      PyErr_SetString(PyExc_TypeError, "direct_limit: pairs are tuples (rank, rows)");
      return nullptr;
    }
    if (!PyArg_ParseTuple(pair, "LL", &rank, &rows)) return nullptr;
    limits.push_back({rank, rows});
  }
  state.limits[op][dtype] = limits;
  Py_RETURN_NONE;
}

template <class Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef kMethods[] = {
    {"direct_low_rank_linear", as_method(linear), METH_FASTCALL, "(x, v, u, bias, residual)"},
    {"direct_low_rank_bridge", as_method(bridge), METH_FASTCALL, "(h, v, u, bias, eps)"},
    {"direct_pivoted_low_rank_linear", as_method(pivoted), METH_FASTCALL, "(x, v, u, pivot, bias, residual)"},
    {"direct_low_rank_mlp", as_method(mlp), METH_FASTCALL, "(x, three times v, u and bias, act)"},
    {"direct_low_rank_linear_group", as_method(group), METH_FASTCALL, "(x, vs, us, biases)"},
    {"direct_setup", as_method(setup), METH_FASTCALL, "(capsule, Tensor, Parameter, guards, get_num_threads)"},
    {"direct_enable", as_method(enable), METH_O, "whether direct calls are made; returns whether they are"},
    {"direct_limit", as_method(limit), METH_VARARGS, "(op, dtype, pairs): from which rank on up to how many rows"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_to(PyObject* module) { return PyModule_AddFunctions(module, kMethods) == 0; }

}  // namespace taco::direct
