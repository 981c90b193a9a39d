#include "direct/tensors.h"

#include "direct/gpu.h"

namespace taco::direct {

State state;

namespace {

// Whether a tensor's data have the other sign, as those of a conjugate's imaginary part. Such a view has no unit stride,
// which every tensor here must have, but where its last dimension has one element and was added to it.
bool negated(PyObject* object, const dlpack::Tensor& t) {
  if (t.ndim < 1 || t.shape[t.ndim - 1] != 1) return false;
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* const answer = PyObject_CallMethodNoArgs(object, name);
  if (answer == nullptr) PyErr_Clear();
  Py_XDECREF(answer);
  return answer != Py_False;
}

}  // namespace

bool read(PyObject* object, dlpack::Tensor& out) {
  // exact types: a subclass has behaviour of its own, which lives in the dispatcher
  if (Py_TYPE(object) != state.tensor && Py_TYPE(object) != state.parameter) return false;
  if (state.api->from_object(object, &out) != 0) {  // no storage: wrapped by a transform, sparse, meta
    PyErr_Clear();
    return false;
  }
  out.data = static_cast<char*>(out.data) + out.byte_offset;
  const bool here = out.device.type == dlpack::kCpu || (kHasGpu && out.device.type == dlpack::kCuda);
  return here && out.dtype.lanes == 1 && out.data != nullptr && !negated(object, out);
}

namespace {

bool dtype_of(dlpack::DataType type, Dtype& out) {
  if (type.code == dlpack::kFloat && type.bits == 32) out = Dtype::kF32;
  else if (type.code == dlpack::kFloat && type.bits == 16) out = Dtype::kF16;
  else if (type.code == dlpack::kBfloat && type.bits == 16) out = Dtype::kBF16;
  else return false;
  return true;
}

bool same_device(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.device.type == b.device.type && a.device.id == b.device.id;
}

bool alike(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits && same_device(a, b);
}

// Unit strides are asked for even where there is one element, because of `negated`.
bool contiguous_vector(const dlpack::Tensor& t, std::int64_t size) {
  return t.ndim == 1 && t.shape[0] == size && t.strides[0] == 1;
}

void ignore_error(void*, const char*, const char*) {}

// By DLPack, which costs less than a call of torch's. What comes of it is no block of the allocator's to torch but
// memory with an owner of its own.
PyObject* new_by_dlpack(const Rows& like, std::int64_t* shape) {
  dlpack::Tensor prototype = like.tensor;
  prototype.shape = shape;
  prototype.strides = nullptr;
  prototype.byte_offset = 0;
  dlpack::ManagedTensor* made = nullptr;
  void* object = nullptr;
  if (state.api->allocate(&prototype, &made, nullptr, ignore_error) != 0 ||
      state.api->object_from_managed(made, &object) != 0)
    return nullptr;
  return static_cast<PyObject*>(object);
}

// By torch: a GPU's allocator must know the block for its own, or `record_stream` on the result would do nothing and
// the block go to the next allocation while another stream still reads it.
PyObject* new_by_torch(const Rows& like, const std::int64_t* shape) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty");
  PyObject* const sizes = PyTuple_New(like.tensor.ndim);
  if (sizes == nullptr) return nullptr;
  for (int d = 0; d < like.tensor.ndim; ++d) {
    PyObject* const size = PyLong_FromLongLong(shape[d]);
    if (size == nullptr) {
      Py_DECREF(sizes);
      return nullptr;
    }
    PyTuple_SET_ITEM(sizes, d, size);
  }
  PyObject* const made = PyObject_CallMethodOneArg(like.object, name, sizes);
  Py_DECREF(sizes);
  return made;
}

}  // namespace

// The leading dimensions as one, and its stride; false where they are not evenly spaced.
bool rows_of(Rows& out) {
  const dlpack::Tensor& t = out.tensor;
  if (t.ndim < 1 || !dtype_of(t.dtype, out.dtype)) return false;
  const int last = t.ndim - 1;
  out.width = t.shape[last];
  if (out.width < 1 || t.strides[last] != 1) return false;
  out.rows = 1;
  out.stride = out.width;
  bool first = true;
  for (int d = last - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return false;
    if (t.shape[d] == 1) continue;
    if (first) out.stride = t.strides[d];
    else if (t.strides[d] != out.stride * out.rows) return false;
    first = false;
    out.rows *= t.shape[d];
  }
  return true;
}

// Whether tensors may have tangents, which forward-mode differentiation gives them without asking for a gradient.
bool differentiates_forward() {
  static PyObject* const name = PyUnicode_InternFromString("_current_level");
  PyObject* const level = PyDict_GetItemWithError(state.forward_ad, name);
  const long number = level == nullptr ? 0 : PyLong_AsLong(level);  // from 0 on where there is one
  if (PyErr_Occurred()) PyErr_Clear();
  return number >= 0;
}

bool nothing_in_the_way() {
  if (!state.enabled || differentiates_forward()) return false;
  for (PyObject* guard : state.guards) {
    PyObject* const answer = PyObject_CallNoArgs(guard);
    const int busy = answer == nullptr ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (busy < 0) PyErr_Clear();
    if (busy != 0) return false;
  }
  return true;
}

bool matrix_of(const dlpack::Tensor& t, const Rows& like, Matrix& out) {
  if (t.ndim != 2 || !alike(t, like.tensor)) return false;
  out = {t.data, t.strides[0], t.shape[0], t.shape[1]};
  return out.rows > 0 && out.columns > 0 && t.strides[1] == 1;
}

bool vector_of(const dlpack::Tensor& t, const Rows& like, std::int64_t size) {
  return alike(t, like.tensor) && contiguous_vector(t, size);
}

bool index_of(const dlpack::Tensor& t, const Rows& like, std::int64_t size, bool& is_long) {
  is_long = t.dtype.bits == 64;
  return t.dtype.code == dlpack::kInt && (is_long || t.dtype.bits == 32) && contiguous_vector(t, size) &&
         same_device(t, like.tensor);
}

bool same_leading(const Rows& a, const Rows& b) {
  if (!alike(a.tensor, b.tensor) || a.tensor.ndim != b.tensor.ndim) return false;
  for (int d = 0; d + 1 < a.tensor.ndim; ++d)
    if (a.tensor.shape[d] != b.tensor.shape[d]) return false;
  return true;
}

bool within_limits(Op op, const Rows& x, std::int64_t rank) {
  for (const Limit& limit : state.limits[op][static_cast<int>(x.dtype)]) {
    if (rank < limit.rank) continue;
    if (x.rows <= limit.rows) return true;
    if (limit.each >= kAny) return false;
    const int threads = x.object != nullptr ? thread_count() : state.threads_of_handles();
    if (threads < 0) PyErr_Clear();  // the ordinary way will meet it again
    return threads > 0 && x.rows >= limit.each * threads;
  }
  return false;
}

bool shape_like(const Rows& like, std::int64_t width, std::int64_t (&shape)[kDimensions]) {
  const int last = like.tensor.ndim - 1;
  if (last >= kDimensions) return false;
  for (int d = 0; d < last; ++d) shape[d] = like.tensor.shape[d];
  shape[last] = width;
  return true;
}

PyObject* new_rows(const Rows& like, std::int64_t width, void*& data) {
  std::int64_t shape[kDimensions];
  if (!shape_like(like, width, shape)) return nullptr;
  PyObject* const result = on_gpu(like) ? new_by_torch(like, shape) : new_by_dlpack(like, shape);
  dlpack::Tensor t;
  if (result == nullptr || !read(result, t)) {
    Py_XDECREF(result);
    PyErr_Clear();
    return nullptr;
  }
  data = t.data;
  return result;
}

PyObject* new_results(const Rows& like, LowRankMap* maps, int count) {
  PyObject* const results = PyList_New(count);
  for (int i = 0; results != nullptr && i < count; ++i) {
    PyObject* const y = new_rows(like, maps[i].out, maps[i].y);
    if (y == nullptr) {
      Py_DECREF(results);
      return nullptr;
    }
    PyList_SET_ITEM(results, i, y);
  }
  if (results == nullptr) PyErr_Clear();
  return results;
}

int thread_count() {
  PyObject* const answer = PyObject_CallNoArgs(state.threads);
  if (answer == nullptr) return -1;
  const long count = PyLong_AsLong(answer);
  Py_DECREF(answer);
  return count < 1 ? (PyErr_Occurred() ? -1 : 1) : static_cast<int>(count);
}

}  // namespace taco::direct
