// What each function gives back: the result; None where the call needs torch's dispatcher (a gradient, a mode, a
// subclass, anything out of shape, for which the ordinary way has the message); False where the tensors are plain and
// fit together, but there are more rows than these kernels are good for.
#include "direct/direct.h"

#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "direct/calls.h"
#include "direct/gpu.h"
#include "direct/registered.h"
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

// On a CPU: allocates, computes and hands the result out.
template <class Call>
PyObject* result_of(Way way, Call& call) {
  if (way == Way::kOrdinary) Py_RETURN_NONE;
  if (way == Way::kLibrary) Py_RETURN_FALSE;
  const int threads = thread_count();
  if (threads < 0) return nullptr;
  void* data = nullptr;
  PyObject* const made = new_rows(call.x, call.width(), data);
  if (made == nullptr) Py_RETURN_NONE;
  if (run([&] { call.compute(data, threads); })) return made;
  Py_DECREF(made);
  return nullptr;
}

// What a map, alone or with a norm, comes to on the device that its input is on.
template <class Call>
PyObject* result_anywhere(Op op, Way way, Call& call) {
  if (way != Way::kOrdinary && on_gpu(call.x)) return on_gpu_result(op, call.x, call.input(), &call.map, 1, false);
  return result_of(way, call);
}

// x, v, u, bias, residual
Way read_linear(PyObject* const* args, Py_ssize_t count, Linear& call) {
  return count == 5 ? call.read(args[0], args[1], args[2], args[3], args[4]) : Way::kOrdinary;
}

PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!nothing_in_the_way()) Py_RETURN_NONE;
  Linear call;
  const Way way = read_linear(args, count, call);
  return result_anywhere(kLinear, way, call);
}

// h, v, u, bias, eps
Way read_bridge(PyObject* const* args, Py_ssize_t count, Bridge& call) {
  if (count != 5 || !PyFloat_CheckExact(args[4])) return Way::kOrdinary;
  return call.read(args[0], args[1], args[2], args[3], PyFloat_AS_DOUBLE(args[4]));
}

PyObject* bridge(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!nothing_in_the_way()) Py_RETURN_NONE;
  Bridge call;
  const Way way = read_bridge(args, count, call);
  return result_anywhere(kBridge, way, call);
}

// x, v, u, pivot, bias, residual
Way read_pivoted(PyObject* const* args, Py_ssize_t count, Pivoted& call) {
  return count == 6 ? call.read(args[0], args[1], args[2], args[3], args[4], args[5]) : Way::kOrdinary;
}

PyObject* pivoted(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!nothing_in_the_way()) Py_RETURN_NONE;
  Pivoted call;
  const Way way = read_pivoted(args, count, call);
  if (way != Way::kOrdinary && on_gpu(call.x))
    return on_gpu_result(kPivoted, call.x, call.input(), &call.map, 1, false, {call.pivot, call.is_long});
  return result_of(way, call);
}

// x, gate_v, gate_u, gate_bias, up_v, up_u, up_bias, down_v, down_u, down_bias, act
PyObject* mlp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static const char* const kNames[] = {"silu", "gelu_tanh", "gelu", "relu"};  // in the order of Activation
  if (count != 11 || !PyUnicode_CheckExact(args[10])) Py_RETURN_NONE;
  int act = 0;
  while (act < 4 && PyUnicode_CompareWithASCIIString(args[10], kNames[act]) != 0) ++act;
  if (act == 4 || !nothing_in_the_way()) Py_RETURN_NONE;
  Mlp call;
  PyObject* const maps[9] = {args[1], args[2], args[3], args[4], args[5], args[6], args[7], args[8], args[9]};
  const Way way = call.read(args[0], maps, static_cast<Activation>(act));
  if (way == Way::kOrdinary || on_gpu(call.x)) Py_RETURN_NONE;
  return result_of(way, call);
}

// x, vs, us, biases: three tuples or lists
Way read_group(PyObject* const* args, Py_ssize_t count, Group& call) {
  if (count != 4) return Way::kOrdinary;
  for (int i = 1; i < 4; ++i)
    if (!PyTuple_Check(args[i]) && !PyList_Check(args[i])) return Way::kOrdinary;
  const Py_ssize_t members = PySequence_Fast_GET_SIZE(args[1]);
  if (PySequence_Fast_GET_SIZE(args[2]) != members || PySequence_Fast_GET_SIZE(args[3]) != members)
    return Way::kOrdinary;
  if (!read_rows(args[0], call.x)) return Way::kOrdinary;
  for (Py_ssize_t i = 0; i < members; ++i)
    if (!call.add(PySequence_Fast_GET_ITEM(args[1], i), PySequence_Fast_GET_ITEM(args[2], i),
                  PySequence_Fast_GET_ITEM(args[3], i)))
      return Way::kOrdinary;
  return call.way();
}

PyObject* group(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!nothing_in_the_way()) Py_RETURN_NONE;
  Group call;
  const Way way = read_group(args, count, call);
  if (way == Way::kOrdinary) Py_RETURN_NONE;
  if (on_gpu(call.x)) return on_gpu_result(kGroup, call.x, input_of(call.x), call.maps, call.members, true);
  if (way == Way::kLibrary) Py_RETURN_FALSE;
  const int threads = thread_count();
  PyObject* const results = threads < 0 ? nullptr : PyList_New(call.members);
  if (results == nullptr) return nullptr;
  for (int i = 0; i < call.members; ++i) {
    PyObject* const y = new_rows(call.x, call.maps[i].out, call.maps[i].y);
    if (y == nullptr) {
      Py_DECREF(results);
      Py_RETURN_NONE;
    }
    PyList_SET_ITEM(results, i, y);
  }
  if (run([&] { call.compute(threads); })) return results;
  Py_DECREF(results);
  return nullptr;
}

int op_named(const char* name) {
  int op = 0;
  while (op < kOps && std::strcmp(name, kOpNames[op]) != 0) ++op;
  return op;
}

// op, launch, and what the op's function takes
PyObject* remember_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const char* const name = count < 2 ? nullptr : PyUnicode_AsUTF8(args[0]);
  const long launch = name == nullptr ? -1 : PyLong_AsLong(args[1]);
  if (PyErr_Occurred()) return nullptr;
  if (name == nullptr) {
    PyErr_SetString(PyExc_TypeError, "direct_remember(op, launch, ...)");
    return nullptr;
  }
  const auto note = [&](Op op, const Rows& x, const LowRankInput& input, const LowRankMap* maps, int members) {
    if (on_gpu(x)) remember(op, input, maps, members, static_cast<int>(launch));
  };
  const int op = op_named(name);
  PyObject* const* const rest = args + 2;
  if (op == kLinear) {
    Linear call;
    if (read_linear(rest, count - 2, call) != Way::kOrdinary) note(kLinear, call.x, call.input(), &call.map, 1);
  } else if (op == kBridge) {
    Bridge call;
    if (read_bridge(rest, count - 2, call) != Way::kOrdinary) note(kBridge, call.x, call.input(), &call.map, 1);
  } else if (op == kPivoted) {
    Pivoted call;
    if (read_pivoted(rest, count - 2, call) != Way::kOrdinary) note(kPivoted, call.x, call.input(), &call.map, 1);
  } else if (op == kGroup) {
    Group call;
    if (read_group(rest, count - 2, call) != Way::kOrdinary)
      note(kGroup, call.x, input_of(call.x), call.maps, call.members);
  }
  Py_RETURN_NONE;
}

PyObject* forget_calls(PyObject*, PyObject*) {
  forget();
  Py_RETURN_NONE;
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
  int dtype = 0;
  PyObject* pairs = nullptr;
  if (!PyArg_ParseTuple(args, "siO!", &name, &dtype, &PyTuple_Type, &pairs)) return nullptr;
  const int op = op_named(name);
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
    {"direct_remember", as_method(remember_call), METH_FASTCALL,
     "(op, launch, ...): the ordinary way serves calls like this one on a GPU by CUDA, or by the library (launch < 0)"},
    {"direct_forget", forget_calls, METH_NOARGS, "forgets what direct_remember was told"},
    {"direct_register", register_op, METH_O, "op: gives <op>_native its kernel; returns whether it has one"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_to(PyObject* module) { return PyModule_AddFunctions(module, kMethods) == 0; }

}  // namespace taco::direct
