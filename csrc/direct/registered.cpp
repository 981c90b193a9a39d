#include "direct/registered.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "direct/calls.h"
#include "direct/torch_c.h"

namespace taco::direct {
namespace {

using torch_c::Tensor;
using torch_c::Value;

torch_c::Functions torch;

// What torch numbers the dtypes that the kernels know, as DLPack says it.
struct Known {
  std::int32_t number;
  dlpack::DataType type;
};
Known known[5];

void asked(torch_c::Error error, const char* what) {
  // torch has printed its own message
  if (error != 0) throw std::runtime_error(std::string("taco_kernels: torch could not ") + what);
}

// torch's handle of an argument; null for None. What the templates of tensors.h take beside Python objects.
struct Handle {
  Tensor tensor;
};

Handle tensor_of(Value value) { return {reinterpret_cast<Tensor>(value)}; }

// An optional argument: null, or the address of the value.
Handle optional_of(Value value) { return value == 0 ? Handle{nullptr} : tensor_of(*reinterpret_cast<Value*>(value)); }

bool absent(Handle handle) { return handle.tensor == nullptr; }

bool read(Handle handle, dlpack::Tensor& out) {
  std::int64_t dimensions = 0;
  std::int32_t number = 0;
  if (torch.dimensions(handle.tensor, &dimensions) || torch.sizes(handle.tensor, &out.shape) ||
      torch.strides(handle.tensor, &out.strides) || torch.dtype(handle.tensor, &number) ||
      torch.data(handle.tensor, &out.data))
    return false;
  out.device = {dlpack::kCpu, 0};
  out.ndim = static_cast<std::int32_t>(dimensions);
  out.byte_offset = 0;
  for (const Known& entry : known)
    if (entry.number == number) {
      out.dtype = entry.type;
      return out.data != nullptr;
    }
  return false;
}

// Lets go of what a kernel was handed, at the end of the call: tensors and optional ones are the kernel's.
class Handed {
 public:
  Handed() = default;
  // The first places of a stack: so many tensors, and so many optional ones behind them.
  Handed(const Value* stack, int tensors, int optionals) {
    for (int i = 0; i < tensors; ++i) tensor(stack[i]);
    for (int i = 0; i < optionals; ++i) optional(stack[tensors + i]);
  }
  Handed(const Handed&) = delete;
  Handed& operator=(const Handed&) = delete;
  ~Handed() {
    for (int i = 0; i < count_; ++i) torch.release(tensors_[i]);
  }
  void tensor(Value value) { tensors_[count_++] = tensor_of(value).tensor; }
  void optional(Value value) {
    if (value == 0) return;
    auto* const inner = reinterpret_cast<Value*>(value);
    tensor(*inner);
    delete inner;
  }

 private:
  Tensor tensors_[1 + 3 * Group::kMembers];  // of a group the most
  int count_ = 0;
};

Tensor new_rows(const Rows& like, std::int64_t width, std::int32_t number, void*& data) {
  std::int64_t shape[kDimensions], strides[kDimensions];
  shape_like(like, width, shape);
  std::int64_t stride = 1;
  for (int d = like.tensor.ndim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= shape[d];
  }
  Tensor made = nullptr;
  asked(torch.empty(like.tensor.ndim, shape, strides, number, torch.cpu(), 0, &made), "make a tensor");
  asked(torch.data(made, &data), "tell where a tensor's data lie");
  return made;
}

int threads_of_torch() {
  std::uint32_t count = 1;
  asked(torch.threads(&count), "tell its number of threads");
  return static_cast<int>(count);
}

std::int32_t number_of(Value tensor) {
  std::int32_t number = 0;
  asked(torch.dtype(tensor_of(tensor).tensor, &number), "tell a tensor's dtype");
  return number;
}

bool served(Way way, const Rows& x) { return way == Way::kDirect && x.tensor.ndim <= kDimensions; }

// The op's ordinary kernel, with the same arguments, which it takes over.
void ordinary(const char* op, Value* stack) {
  if (torch.call(op, "", stack, torch_c::kVersion) != 0)
    throw std::runtime_error(std::string(op) + " refused the call; torch has printed why");
}

// Computes a call whose stack begins with so many tensors and so many optional ones, or hands it on; `arguments` are
// what the call's `read` takes.
template <class Call, class... Arguments>
void serve(const char* op, Value* stack, int tensors, int optionals, Arguments... arguments) {
  Call call;
  if (!state.enabled || !served(call.read(arguments...), call.x)) return ordinary(op, stack);
  const Handed handed(stack, tensors, optionals);
  void* data = nullptr;
  const Tensor made = new_rows(call.x, call.width(), number_of(stack[0]), data);
  try {
    call.compute(data, threads_of_torch());
  } catch (...) {
    torch.release(made);
    throw;
  }
  stack[0] = reinterpret_cast<Value>(made);
}

// x, v, u, bias, residual
void linear(Value* stack, std::uint64_t, std::uint64_t) {
  serve<Linear>("taco_kernels::low_rank_linear", stack, 3, 2, tensor_of(stack[0]), tensor_of(stack[1]),
                tensor_of(stack[2]), optional_of(stack[3]), optional_of(stack[4]));
}

// h, v, u, bias, eps
void bridge(Value* stack, std::uint64_t, std::uint64_t) {
  double eps = 0;
  std::memcpy(&eps, &stack[4], sizeof eps);
  serve<Bridge>("taco_kernels::low_rank_bridge", stack, 3, 1, tensor_of(stack[0]), tensor_of(stack[1]),
                tensor_of(stack[2]), optional_of(stack[3]), eps);
}

// x, v, u, pivot, bias, residual
void pivoted(Value* stack, std::uint64_t, std::uint64_t) {
  serve<Pivoted>("taco_kernels::pivoted_low_rank_linear", stack, 4, 2, tensor_of(stack[0]), tensor_of(stack[1]),
                 tensor_of(stack[2]), tensor_of(stack[3]), optional_of(stack[4]), optional_of(stack[5]));
}

// x, vs, us, biases
void group(Value* stack, std::uint64_t, std::uint64_t) {
  torch_c::List lists[3];
  std::size_t sizes[3];
  for (int i = 0; i < 3; ++i) {
    lists[i] = reinterpret_cast<torch_c::List>(stack[i + 1]);
    asked(torch.list_size(lists[i], &sizes[i]), "tell a list's length");
  }
  Group call;
  Value members[Group::kMembers][3];
  bool plain = state.enabled && read_rows(tensor_of(stack[0]), call.x) && sizes[0] <= Group::kMembers &&
               sizes[1] == sizes[0] && sizes[2] == sizes[0];
  for (std::size_t m = 0; plain && m < sizes[0]; ++m) {
    for (int i = 0; i < 3; ++i) asked(torch.list_get(lists[i], m, &members[m][i]), "read a list");
    plain = call.add(tensor_of(members[m][0]), tensor_of(members[m][1]), optional_of(members[m][2]));
  }
  if (!plain || !served(call.way(), call.x)) return ordinary("taco_kernels::low_rank_linear_group", stack);
  const std::int32_t number = number_of(stack[0]);
  Handed handed;
  handed.tensor(stack[0]);
  for (int m = 0; m < call.members; ++m) {
    handed.tensor(members[m][0]);
    handed.tensor(members[m][1]);
    handed.optional(members[m][2]);
  }
  for (torch_c::List list : lists) torch.release_list(list);  // the lists, not what was in them
  torch_c::List results = nullptr;
  asked(torch.new_list(sizes[0], &results), "make a list");
  Tensor ys[Group::kMembers] = {};
  try {
    for (int m = 0; m < call.members; ++m) {
      ys[m] = new_rows(call.x, call.maps[m].out, number, call.maps[m].y);
      asked(torch.list_add(results, reinterpret_cast<Value>(ys[m])), "add to a list");
    }
    call.compute(threads_of_torch());
  } catch (...) {
    torch.release_list(results);
    for (Tensor y : ys)
      if (y != nullptr) torch.release(y);
    throw;
  }
  stack[0] = reinterpret_cast<Value>(results);
}

struct Registered {
  const char* op;
  const char* name;
  torch_c::Kernel kernel;
};

constexpr Registered kRegistered[] = {{"low_rank_linear", "low_rank_linear_native", linear},
                                      {"low_rank_bridge", "low_rank_bridge_native", bridge},
                                      {"low_rank_linear_group", "low_rank_linear_group_native", group},
                                      {"pivoted_low_rank_linear", "pivoted_low_rank_linear_native", pivoted}};

// Once: torch's functions, its numbers for dtypes, and our place in its registry, which is kept.
torch_c::Library library() {
  static torch_c::Library made = nullptr;
  if (made != nullptr || !torch_c::find(torch)) return made;
  known[0] = {torch.float32(), {dlpack::kFloat, 32, 1}};
  known[1] = {torch.float16(), {dlpack::kFloat, 16, 1}};
  known[2] = {torch.bfloat16(), {dlpack::kBfloat, 16, 1}};
  known[3] = {torch.int32(), {dlpack::kInt, 32, 1}};
  known[4] = {torch.int64(), {dlpack::kInt, 64, 1}};
  if (torch.library("taco_kernels", "CPU", __FILE__, __LINE__, &made) != 0) made = nullptr;
  return made;
}

}  // namespace

PyObject* register_op(PyObject*, PyObject* name) {
  state.threads_of_handles = threads_of_torch;
  if (!PyUnicode_Check(name)) {
    PyErr_SetString(PyExc_TypeError, "direct_register: the name of an op");
    return nullptr;
  }
  for (const Registered& entry : kRegistered)
    if (PyUnicode_CompareWithASCIIString(name, entry.op) == 0) {
      const torch_c::Library ours = library();
      const bool made =
          ours != nullptr && torch.implement(ours, entry.name, entry.kernel, torch_c::kVersion) == 0;
      return PyBool_FromLong(made);
    }
  Py_RETURN_FALSE;
}

}  // namespace taco::direct
