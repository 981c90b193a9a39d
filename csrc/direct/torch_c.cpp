#include "direct/torch_c.h"

#include <type_traits>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace taco::torch_c {

bool find(Functions& out) {
#if defined(__linux__)
  // loaded with `import torch`, before this extension; only asked for here
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return false;
  bool all = true;
  const auto take = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(torch, name));
    all = all && function != nullptr;
  };
  take(out.library, "aoti_torch_library_init_impl");
  take(out.implement, "torch_library_impl");
  take(out.call, "torch_call_dispatcher");
  take(out.data, "aoti_torch_get_data_ptr");
  take(out.dimensions, "aoti_torch_get_dim");
  take(out.sizes, "aoti_torch_get_sizes");
  take(out.strides, "aoti_torch_get_strides");
  take(out.dtype, "aoti_torch_get_dtype");
  take(out.empty, "aoti_torch_empty_strided");
  take(out.release, "aoti_torch_delete_tensor_object");
  take(out.new_list, "torch_new_list_reserve_size");
  take(out.list_size, "torch_list_size");
  take(out.list_get, "torch_list_get_item");
  take(out.list_add, "torch_list_push_back");
  take(out.release_list, "torch_delete_list");
  take(out.threads, "torch_get_num_threads");
  take(out.cpu, "aoti_torch_device_type_cpu");
  take(out.float32, "aoti_torch_dtype_float32");
  take(out.float16, "aoti_torch_dtype_float16");
  take(out.bfloat16, "aoti_torch_dtype_bfloat16");
  take(out.int32, "aoti_torch_dtype_int32");
  take(out.int64, "aoti_torch_dtype_int64");
  return all;
#else
  (void)out;
  return false;
#endif
}

}  // namespace taco::torch_c
