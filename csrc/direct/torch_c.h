// The part of torch's stable C interface (since 2.10) that kernels are registered and tensors are read and made through,
// found by name in the library that the process has loaded: no torch headers, and no torch needed to build.
#pragma once

#include <cstddef>
#include <cstdint>

namespace taco::torch_c {

using Value = std::uint64_t;  // an argument or result: a number's bytes, a handle, or the address of another Value
struct TensorOf;
struct ListOf;
struct LibraryOf;
using Tensor = TensorOf*;
using List = ListOf*;
using Library = LibraryOf*;
using Kernel = void (*)(Value* stack, std::uint64_t inputs, std::uint64_t outputs);
using Error = std::int32_t;  // 0: none

// Which version's conventions our values follow: 2.10.
constexpr std::uint64_t kVersion = (std::uint64_t{2} << 56) | (std::uint64_t{10} << 48);

struct Functions {
  Error (*library)(const char* ns, const char* key, const char* file, std::uint32_t line, Library* out);
  Error (*implement)(Library library, const char* name, Kernel kernel, std::uint64_t version);
  Error (*call)(const char* op, const char* overload, Value* stack, std::uint64_t version);  // takes the values over
  Error (*data)(Tensor, void** out);
  Error (*dimensions)(Tensor, std::int64_t* out);
  Error (*sizes)(Tensor, std::int64_t** out);  // borrowed, as are strides
  Error (*strides)(Tensor, std::int64_t** out);
  Error (*dtype)(Tensor, std::int32_t* out);
  Error (*empty)(std::int64_t dimensions, const std::int64_t* sizes, const std::int64_t* strides, std::int32_t dtype,
                 std::int32_t device, std::int32_t index, Tensor* out);
  Error (*release)(Tensor);
  Error (*new_list)(std::size_t size, List* out);
  Error (*list_size)(List, std::size_t* out);
  Error (*list_get)(List, std::size_t index, Value* out);
  Error (*list_add)(List, Value);
  Error (*release_list)(List);
  Error (*threads)(std::uint32_t* out);
  std::int32_t (*cpu)();
  std::int32_t (*float32)();
  std::int32_t (*float16)();
  std::int32_t (*bfloat16)();
  std::int32_t (*int32)();
  std::int32_t (*int64)();
};

// False where this torch, or this system, does not have all of them.
bool find(Functions& out);

}  // namespace taco::torch_c
