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

std::vector<std::int64_t> key_of(const GpuCall& call) {
  std::vector<std::int64_t> key = {call.op, static_cast<std::int64_t>(call.input.dtype), call.input.rows,
                                   call.input.in};
  for (int i = 0; i < call.count; ++i) key.push_back(call.maps[i].rank), key.push_back(call.maps[i].out);
  return key;
}

// With the addresses of the results in the maps.
cuda::LowRankCall kernel_call(const GpuCall& call) {
  const LowRankInput& input = call.input;
  const LowRankMap* const maps = call.maps;
  cuda::LowRankCall made = {};
  made.x = input.x, made.x_stride = input.x_stride, made.rows = input.rows, made.in = call.x.width;
  made.residual = maps[0].residual, made.residual_stride = maps[0].residual_stride;
  made.count = call.count, made.gate = cuda::kNoGate, made.dtype = static_cast<int>(input.dtype);
  made.norm = input.normalise, made.eps = input.eps;
  for (int i = 0; i < call.count; ++i)
    made.members[i] = {maps[i].v,   maps[i].v_stride, maps[i].u,   maps[i].u_stride, maps[i].bias, maps[i].y,
                       maps[i].out, maps[i].rank,     maps[i].out, call.pivot,       call.long_pivot};
  return made;
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

void remember(const GpuCall& call, int launch) {
  if (remembered.size() >= kMost) return;
  const bool fits = call.input.rows <= cuda::kMaxDecodeRows && call.count <= cuda::kMaxMembers;
  if (launch == kLibrary || fits) remembered[key_of(call)] = launch;
}

void forget() { remembered.clear(); }

PyObject* on_gpu_result(const GpuCall& call, bool list) {
  const auto known = remembered.find(key_of(call));
  if (known == remembered.end()) Py_RETURN_NONE;
  if (known->second == kLibrary) Py_RETURN_FALSE;
  const dlpack::Device device = call.x.tensor.device;
  if (cuda::current_device_index() != device.id) Py_RETURN_NONE;  // the kernels launch on the current one
  PyObject* const results = new_results(call.x, call.maps, call.count);
  if (results == nullptr) Py_RETURN_NONE;
  if (const auto instead = launch(kernel_call(call), known->second, device)) {
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

void remember(const GpuCall&, int) {}
void forget() {}
PyObject* on_gpu_result(const GpuCall&, bool) { Py_RETURN_NONE; }

}  // namespace taco::direct

#endif
