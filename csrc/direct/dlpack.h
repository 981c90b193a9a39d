// The part of DLPack's C interface (version 1.3, https://dmlc.github.io/dlpack) that a framework's tensors are read and
// made through without its headers: an interface of plain structs, the same for every version of torch that offers it
// (`torch.Tensor.__dlpack_c_exchange_api__`, since 2.10). Field order and sizes are DLPack's.
#pragma once

#include <cstdint>

namespace taco::dlpack {

constexpr std::uint32_t kMajor = 1;
constexpr std::int32_t kCpu = 1, kCuda = 2;                               // Device::type
constexpr std::uint8_t kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4;  // DataType::code

struct Version {
  std::uint32_t major, minor;
};

struct Device {
  std::int32_t type, id;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

// Borrowed: shape and strides (in elements) belong to the framework's tensor.
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

// Owned by whoever holds it, until it is handed on or its deleter is called.
struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);  // may be null
  std::uint64_t flags;
  Tensor tensor;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* error_context, SetError set_error);
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*object_from_managed)(ManagedTensor* tensor, void** object);  // takes the tensor over
  int (*from_object)(void* object, Tensor* out);                     // may be null
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

}  // namespace taco::dlpack
