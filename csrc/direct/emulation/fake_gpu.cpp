// A GPU that is made of CPU memory, for tests of the direct calls where there is none: DLPack's interface as torch gives
// it, but for CPU tensors said to lie on a GPU, and in place of the CUDA kernels plain loops that note what they were
// handed. Built into a Python module by tests/kernels/test_direct_gpu.py, with the very sources of csrc/direct.
#include <Python.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "cpu/taco_cpu.h"
#include "cuda/taco_cuda.h"
#include "direct/direct.h"
#include "direct/dlpack.h"

namespace taco {

// No call of these tests may get to the CPU's kernels.
void low_rank(const LowRankInput&, const LowRankMap*, int, int) { std::abort(); }
void low_rank_mlp(const LowRankInput&, const LowRankMap&, const LowRankMap&, const LowRankMap&, Activation, int) {
  std::abort();
}
void pivoted_low_rank(const LowRankInput&, const void*, bool, LowRankMap, int) { std::abort(); }

}  // namespace taco

namespace {

namespace dlpack = taco::dlpack;

void* const kStream = reinterpret_cast<void*>(std::uintptr_t(77));

struct Fake {
  const dlpack::ExchangeApi* real = nullptr;
  dlpack::ExchangeApi api = {};
  std::map<const void*, dlpack::Device> places;  // of tensors that are elsewhere than on the first GPU
  std::map<dlpack::ManagedTensor*, void (*)(dlpack::ManagedTensor*)> live;  // work spaces and their own deleters
  int current = 0;
  int error = 0;            // what the next launch comes to
  int allocations = 1 << 30;  // so many more succeed
  long launches = 0, rows = 0, members = 0, how = 0, bytes = 0;  // of the last launch
} fake;

int from_object(void* object, dlpack::Tensor* out) {
  const int failed = fake.real->from_object(object, out);
  if (failed != 0) return failed;
  const auto place = fake.places.find(out->data);
  out->device = place == fake.places.end() ? dlpack::Device{dlpack::kCuda, 0} : place->second;
  return 0;
}

void gone(dlpack::ManagedTensor* self) {
  const auto own = fake.live.at(self);
  fake.live.erase(self);
  own(self);
}

int allocate(dlpack::Tensor* prototype, dlpack::ManagedTensor** out, void* context, dlpack::SetError set_error) {
  if (fake.allocations-- <= 0) {
    PyErr_SetString(PyExc_RuntimeError, "out of memory");
    return -1;
  }
  dlpack::Tensor here = *prototype;
  here.device = {dlpack::kCpu, 0};
  const int failed = fake.real->allocate(&here, out, context, set_error);
  if (failed == 0 && here.dtype.code == dlpack::kUnsigned) {
    fake.live[*out] = (*out)->deleter;
    (*out)->deleter = gone;
  }
  return failed;
}

int current_stream(std::int32_t type, std::int32_t id, void** stream) {
  *stream = kStream;
  return type == dlpack::kCuda && id == fake.current ? 0 : -1;
}

double number_at(const void* data, std::int64_t index, int dtype) {
  if (dtype == 0) return static_cast<const float*>(data)[index];
  const std::uint32_t bits = std::uint32_t(static_cast<const std::uint16_t*>(data)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void put_at(void* data, std::int64_t index, int dtype, double value) {
  const float narrow = static_cast<float>(value);
  if (dtype == 0) {
    static_cast<float*>(data)[index] = narrow;
    return;
  }
  std::uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  static_cast<std::uint16_t*>(data)[index] = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

namespace taco::cuda {

std::int64_t low_rank_decode_workspace_bytes(const LowRankCall& call) { return 64 * call.rows * call.count; }

int low_rank_decode(const LowRankCall& call, Launch launch, void* workspace, std::size_t bytes, void* stream) {
  if (fake.error != 0 || stream != kStream || workspace == nullptr || call.dtype == 1) return fake.error ? fake.error : 1;
  std::memset(workspace, 0xff, bytes);
  ++fake.launches;
  fake.rows = call.rows, fake.members = call.count, fake.how = launch, fake.bytes = static_cast<long>(bytes);
  for (int m = 0; m < call.count; ++m) {
    const Factors& f = call.members[m];
    for (std::int64_t row = 0; row < call.rows; ++row) {
      const auto column = [&](std::int64_t c) {
        if (f.pivot == nullptr) return c;
        return f.long_pivot ? static_cast<const std::int64_t*>(f.pivot)[c]
                            : std::int64_t(static_cast<const std::int32_t*>(f.pivot)[c]);
      };
      const auto at = [&](std::int64_t c) { return number_at(call.x, row * call.x_stride + column(c), call.dtype); };
      const std::int64_t before = f.pivot == nullptr ? 0 : f.rank, columns = call.in - before;
      const auto x = [&](std::int64_t i) { return at(before + i); };
      double squares = 0;
      for (std::int64_t i = 0; i < columns; ++i) squares += x(i) * x(i);
      const double scale = call.norm ? 1 / std::sqrt(squares / double(call.in) + call.eps) : 1;
      std::vector<double> middle(static_cast<std::size_t>(f.rank));
      for (std::int64_t r = 0; r < before; ++r) middle[static_cast<std::size_t>(r)] = at(r);
      for (std::int64_t r = 0; r < f.rank; ++r)
        for (std::int64_t i = 0; i < columns; ++i)
          middle[static_cast<std::size_t>(r)] += scale * x(i) * number_at(f.v, r * f.v_stride + i, call.dtype);
      for (std::int64_t o = 0; o < f.out; ++o) {
        double sum = f.bias == nullptr ? 0 : number_at(f.bias, o, call.dtype);
        if (call.residual != nullptr) sum += number_at(call.residual, row * call.residual_stride + o, call.dtype);
        for (std::int64_t r = 0; r < f.rank; ++r)
          sum += middle[static_cast<std::size_t>(r)] * number_at(f.u, o * f.u_stride + r, call.dtype);
        put_at(f.y, row * f.y_stride + o, call.dtype, sum);
      }
    }
  }
  return 0;
}

int current_device_index() { return fake.current; }
const char* error_string(int) { return "the launch failed"; }

}  // namespace taco::cuda

namespace {

PyObject* fake_api(PyObject*, PyObject* capsule) {
  fake.real = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (fake.real == nullptr) return nullptr;
  fake.api = *fake.real;
  fake.api.previous = nullptr;
  fake.api.from_object = from_object, fake.api.allocate = allocate, fake.api.current_stream = current_stream;
  return PyCapsule_New(&fake.api, "dlpack_exchange_api", nullptr);
}

// address, type and index of the device that the tensor there lies on
PyObject* place(PyObject*, PyObject* args) {
  unsigned long long address = 0;
  dlpack::Device device = {};
  if (!PyArg_ParseTuple(args, "Kii", &address, &device.type, &device.id)) return nullptr;
  fake.places[reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address))] = device;
  Py_RETURN_NONE;
}

// current device, error of the next launches, allocations that will succeed; forgets places
PyObject* set(PyObject*, PyObject* args) {
  if (!PyArg_ParseTuple(args, "iii", &fake.current, &fake.error, &fake.allocations)) return nullptr;
  fake.places.clear();
  Py_RETURN_NONE;
}

// launches so far; rows, members, launch and work space of the last; work spaces not given back
PyObject* noted(PyObject*, PyObject*) {
  return Py_BuildValue("(llllln)", fake.launches, fake.rows, fake.members, fake.how, fake.bytes,
                       static_cast<Py_ssize_t>(fake.live.size()));
}

PyMethodDef kMethods[] = {{"fake_api", fake_api, METH_O, "DLPack's interface with a GPU of CPU memory"},
                          {"place", place, METH_VARARGS, "(address, device type, index)"},
                          {"set", set, METH_VARARGS, "(current device, error, allocations)"},
                          {"noted", noted, METH_NOARGS, "(launches, rows, members, launch, bytes, work spaces alive)"},
                          {nullptr, nullptr, 0, nullptr}};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "fake_gpu", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_fake_gpu() {
  PyObject* const module = PyModule_Create(&kModule);
  if (module == nullptr || !taco::direct::add_to(module)) return nullptr;
  return module;
}
