#include "direct/gpu.h"

#ifdef TACO_WITH_CUDA

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "cuda/taco_cuda.h"

namespace taco::direct {
namespace {

constexpr std::size_t kMost = 4096;  // sizes that are remembered; prompts come in many lengths
constexpr int kLibrary = -1;

// Under the interpreter's lock, which every caller holds.
std::map<std::vector<std::int64_t>, int> remembered;  // sizes -> launch

std::vector<std::int64_t> key_of(Op op, const LowRankInput& input, const LowRankMap* maps, int count) {
  std::vector<std::int64_t> key = {op, static_cast<std::int64_t>(input.dtype), input.rows, input.in};
  for (int i = 0; i < count; ++i) key.push_back(maps[i].rank), key.push_back(maps[i].out);
  return key;
}

cuda::LowRankCall call_of(const LowRankInput& input, const LowRankMap* maps, int count, Pivot pivot) {
  cuda::LowRankCall call = {};
  call.x = input.x, call.x_stride = input.x_stride, call.rows = input.rows, call.in = input.in;
  call.residual = maps[0].residual, call.residual_stride = maps[0].residual_stride;
  call.count = count, call.gate = cuda::kNoGate, call.dtype = static_cast<int>(input.dtype);
  call.norm = input.normalise, call.eps = input.eps;
  call.pivot = pivot.index, call.long_pivot = pivot.is_long;
  for (int i = 0; i < count; ++i)
    call.members[i] = {maps[i].v,    maps[i].v_stride, maps[i].u,    maps[i].u_stride,
                       maps[i].bias, maps[i].y,        maps[i].rank, maps[i].out};
  return call;
}

void ignore_error(void*, const char*, const char*) {}

// Work space from torch's allocator. It is given back when the call returns, while the kernel may still run: the
// allocator hands it to the same stream only, in order.
class Workspace {
 public:
  Workspace(dlpack::Device device, std::int64_t bytes) {
    dlpack::Tensor prototype = {nullptr, device, 1, {dlpack::kUnsigned, 8, 1}, &bytes, nullptr, 0};
    if (state.api->allocate(&prototype, &made_, nullptr, ignore_error) != 0) made_ = nullptr;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (made_ != nullptr && made_->deleter != nullptr) made_->deleter(made_);
  }
  void* data() const {
    return made_ == nullptr ? nullptr : static_cast<char*>(made_->tensor.data) + made_->tensor.byte_offset;
  }

 private:
  dlpack::ManagedTensor* made_ = nullptr;
};

PyObject* failed(int error) {
  PyErr_Format(PyExc_RuntimeError, "cuda: %s", cuda::error_string(error));
  return nullptr;
}

PyObject* ordinary() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

// Launches the call, whose results have been made. Nothing, or what to return instead of them (null: a Python error).
std::optional<PyObject*> launch(const cuda::LowRankCall& call, int how, dlpack::Device device) {
  void* stream = nullptr;
  if (state.api->current_stream == nullptr || state.api->current_stream(device.type, device.id, &stream) != 0)
    return ordinary();
  const std::int64_t bytes = cuda::low_rank_decode_workspace_bytes(call);
  if (bytes < 0) return failed(static_cast<int>(-bytes));
  const Workspace workspace(device, bytes);
  if (bytes > 0 && workspace.data() == nullptr) return ordinary();  // which has torch's message
  int error = 0;
  Py_BEGIN_ALLOW_THREADS;
  error = cuda::low_rank_decode(call, static_cast<cuda::Launch>(how), workspace.data(), static_cast<std::size_t>(bytes),
                                stream);
  Py_END_ALLOW_THREADS;
  if (error != 0) return failed(error);
  return std::nullopt;
}

}  // namespace

void remember(Op op, const LowRankInput& input, const LowRankMap* maps, int count, int launch) {
  if (remembered.size() >= kMost) return;
  const bool fits = input.rows <= cuda::kMaxDecodeRows && count <= cuda::kMaxMembers;
  if (launch == kLibrary || fits) remembered[key_of(op, input, maps, count)] = launch;
}

void forget() { remembered.clear(); }

PyObject* on_gpu_result(Op op, const Rows& x, const LowRankInput& input, LowRankMap* maps, int count, bool list,
                        Pivot pivot) {
  const auto known = remembered.find(key_of(op, input, maps, count));
  if (known == remembered.end()) Py_RETURN_NONE;
  if (known->second == kLibrary) Py_RETURN_FALSE;
  // the kernels launch on the current device
  if (cuda::current_device_index() != x.tensor.device.id) Py_RETURN_NONE;
  PyObject* const results = PyList_New(count);
  if (results == nullptr) return nullptr;
  for (int i = 0; i < count; ++i) {
    PyObject* const y = new_rows(x, maps[i].out, maps[i].y);
    if (y == nullptr) {
      Py_DECREF(results);
      Py_RETURN_NONE;
    }
    PyList_SET_ITEM(results, i, y);
  }
  if (const auto instead = launch(call_of(input, maps, count, pivot), known->second, x.tensor.device)) {
    Py_DECREF(results);
    return *instead;
  }
  if (list) return results;
  PyObject* const one = PyList_GET_ITEM(results, 0);
  Py_INCREF(one);
  Py_DECREF(results);
  return one;
}

}  // namespace taco::direct

#else

namespace taco::direct {

void remember(Op, const LowRankInput&, const LowRankMap*, int, int) {}
void forget() {}
PyObject* on_gpu_result(Op, const Rows&, const LowRankInput&, LowRankMap*, int, bool, Pivot) { Py_RETURN_NONE; }

}  // namespace taco::direct

#endif
