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

// What the functions below take, each as the call that it is.

// x, v, u, bias, residual
Way read_call(PyObject* const* args, Py_ssize_t count, Linear& call) {
  return count == 5 ? call.read(args[0], args[1], args[2], args[3], args[4]) : Way::kOrdinary;
}

// h, v, u, bias, eps
Way read_call(PyObject* const* args, Py_ssize_t count, Bridge& call) {
  if (count != 5 || !PyFloat_CheckExact(args[4])) return Way::kOrdinary;
  return call.read(args[0], args[1], args[2], args[3], PyFloat_AS_DOUBLE(args[4]));
}

// x, v, u, pivot, bias, residual
Way read_call(PyObject* const* args, Py_ssize_t count, Pivoted& call) {
  return count == 6 ? call.read(args[0], args[1], args[2], args[3], args[4], args[5]) : Way::kOrdinary;
}

// x, vs, us, biases: three tuples or lists
Way read_call(PyObject* const* args, Py_ssize_t count, Group& call) {
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

// The same calls on a GPU.
GpuCall gpu_call(Linear& call) { return {kLinear, call.x, call.input(), &call.map, 1}; }
GpuCall gpu_call(Bridge& call) { return {kBridge, call.x, call.input(), &call.map, 1}; }
GpuCall gpu_call(Pivoted& call) {
  return {kPivoted, call.x, call.input(), &call.map, 1, call.pivot, call.is_long};
}
GpuCall gpu_call(Group& call) { return {kGroup, call.x, input_of(call.x), call.maps, call.members}; }

// A function with one result.
template <class Call>
PyObject* one(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!nothing_in_the_way()) Py_RETURN_NONE;
  Call call;
  const Way way = read_call(args, count, call);
  if (way != Way::kOrdinary && on_gpu(call.x)) return on_gpu_result(gpu_call(call), false);
  return result_of(way, call);
}

// A sequence as it is now: while a kernel runs without the interpreter's lock, another thread may change a list, and
// with that free the tensors that were in it. Null with a Python error.
class Held {
 public:
  explicit Held(PyObject* sequence)
      : now_(PyList_Check(sequence) ? PyList_AsTuple(sequence) : (Py_INCREF(sequence), sequence)) {}
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { Py_XDECREF(now_); }
  PyObject* get() const { return now_; }

 private:
  PyObject* now_;
};

PyObject* group(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !nothing_in_the_way()) Py_RETURN_NONE;
  const Held vs(args[1]), us(args[2]), biases(args[3]);
  PyObject* const held[] = {args[0], vs.get(), us.get(), biases.get()};
  for (PyObject* const argument : held)
    if (argument == nullptr) return nullptr;
  Group call;
  const Way way = read_call(held, count, call);
  if (way == Way::kOrdinary) Py_RETURN_NONE;
  if (on_gpu(call.x)) return on_gpu_result(gpu_call(call), true);
  if (way == Way::kLibrary) Py_RETURN_FALSE;
  const int threads = thread_count();
  if (threads < 0) return nullptr;
  PyObject* const results = new_results(call.x, call.maps, call.members);
  if (results == nullptr) Py_RETURN_NONE;
  if (run([&] { call.compute(threads); })) return results;
  Py_DECREF(results);
  return nullptr;
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

int op_named(const char* name) {
  int op = 0;
  while (op < kOps && std::strcmp(name, kOpNames[op]) != 0) ++op;
  return op;
}

template <class Call>
void remember_on_gpu(PyObject* const* args, Py_ssize_t count, int launch) {
  Call call;
  if (read_call(args, count, call) != Way::kOrdinary && on_gpu(call.x)) remember(gpu_call(call), launch);
}

// op, launch, and what the op's function takes
PyObject* remember_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 2) {
    PyErr_SetString(PyExc_TypeError, "direct_remember(op, launch, ...)");
    return nullptr;
  }
  const char* const name = PyUnicode_AsUTF8(args[0]);
  if (name == nullptr) return nullptr;
  const int launch = static_cast<int>(PyLong_AsLong(args[1]));
  if (PyErr_Occurred()) return nullptr;
  args += 2, count -= 2;
  switch (op_named(name)) {
    case kLinear: remember_on_gpu<Linear>(args, count, launch); break;
    case kBridge: remember_on_gpu<Bridge>(args, count, launch); break;
    case kPivoted: remember_on_gpu<Pivoted>(args, count, launch); break;
    case kGroup: remember_on_gpu<Group>(args, count, launch); break;
    default: break;  // no kernel on a GPU
  }
  Py_RETURN_NONE;
}

PyObject* forget_calls(PyObject*, PyObject*) {
  forget();
  Py_RETURN_NONE;
}

// capsule, torch.Tensor, torch.nn.Parameter, guards (tuple), torch.get_num_threads, the names of
// torch.autograd.forward_ad (dict); whether direct calls are possible
PyObject* setup(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6 || !PyType_Check(args[1]) || !PyType_Check(args[2]) || !PyTuple_Check(args[3]) ||
      !PyDict_Check(args[5])) {
    PyErr_SetString(PyExc_TypeError, "direct_setup(capsule, Tensor, Parameter, guards, get_num_threads, forward_ad)");
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
  for (int i = 1; i < 6; ++i) Py_INCREF(args[i]);
  state.tensor = reinterpret_cast<PyTypeObject*>(args[1]);
  state.parameter = reinterpret_cast<PyTypeObject*>(args[2]);
  state.guards.clear();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[3]); ++i) state.guards.push_back(PyTuple_GET_ITEM(args[3], i));
  state.threads = args[4];
  state.forward_ad = args[5];
  Py_RETURN_TRUE;
}

PyObject* enable(PyObject*, PyObject* flag) {
  state.enabled = state.api != nullptr && PyObject_IsTrue(flag) == 1;
  return PyBool_FromLong(state.enabled);
}

// op, dtype code, tuple of (rank, rows, rows per thread)
PyObject* limit(PyObject*, PyObject* args) {
  const char* name = nullptr;
  int dtype = 0;
  PyObject* given = nullptr;
  if (!PyArg_ParseTuple(args, "siO!", &name, &dtype, &PyTuple_Type, &given)) return nullptr;
  const int op = op_named(name);
  if (op == kOps || dtype < 0 || dtype > 2) {
    PyErr_SetString(PyExc_ValueError, "direct_limit: there is no such op or dtype");
    return nullptr;
  }
  std::vector<Limit> limits;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
    long long rank = 0, rows = 0, each = 0;
    PyObject* const item = PyTuple_GET_ITEM(given, i);
    if (!PyTuple_Check(item)) {
      PyErr_SetString(PyExc_TypeError, "direct_limit: limits are tuples (rank, rows, rows per thread)");
      return nullptr;
    }
    if (!PyArg_ParseTuple(item, "LLL", &rank, &rows, &each)) return nullptr;
    limits.push_back({rank, rows, each});
  }
  state.limits[op][dtype] = limits;
  Py_RETURN_NONE;
}

template <class Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef kMethods[] = {
    {"direct_low_rank_linear", as_method(one<Linear>), METH_FASTCALL, "(x, v, u, bias, residual)"},
    {"direct_low_rank_bridge", as_method(one<Bridge>), METH_FASTCALL, "(h, v, u, bias, eps)"},
    {"direct_pivoted_low_rank_linear", as_method(one<Pivoted>), METH_FASTCALL, "(x, v, u, pivot, bias, residual)"},
    {"direct_low_rank_mlp", as_method(mlp), METH_FASTCALL, "(x, three times v, u and bias, act)"},
    {"direct_low_rank_linear_group", as_method(group), METH_FASTCALL, "(x, vs, us, biases)"},
    {"direct_setup", as_method(setup), METH_FASTCALL, "(capsule, Tensor, Parameter, guards, get_num_threads, forward_ad)"},
    {"direct_enable", as_method(enable), METH_O, "whether direct calls are made; returns whether they are"},
    {"direct_limit", as_method(limit), METH_VARARGS, "(op, dtype, limits): from which rank on how many rows"},
    {"direct_remember", as_method(remember_call), METH_FASTCALL,
     "(op, launch, ...): the ordinary way serves calls like this one on a GPU by CUDA, or by the library (launch < 0)"},
    {"direct_forget", forget_calls, METH_NOARGS, "forgets what direct_remember was told"},
    {"direct_register", register_op, METH_O, "op: gives <op>_native its kernel; returns whether it has one"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_to(PyObject* module) { return PyModule_AddFunctions(module, kMethods) == 0; }

}  // namespace taco::direct
