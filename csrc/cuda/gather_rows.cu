// Launches gather_rows.cuh.
#include "gather_rows.cuh"

#include <cuda_runtime.h>

namespace taco::cuda {
namespace {

template <class Element, class Index>
__global__ void __launch_bounds__(kGatherThreads) gather_rows_kernel(const __grid_constant__ GatherCall call) {
  gather_rows<Element, Index>(call);
}

}  // namespace

int gather(const GatherCall& call, void* stream) {
  const std::int64_t blocks = gather_blocks(call);
  if (call.rows < 1 || call.width < 1 || blocks > 0x7fffffff || (call.element != 2 && call.element != 4)) {
    return cudaErrorInvalidValue;
  }
  using Kernel = void (*)(GatherCall);
  const Kernel kernel = call.element == 2 ? (call.long_pivot ? Kernel(gather_rows_kernel<std::uint16_t, std::int64_t>)
                                                             : Kernel(gather_rows_kernel<std::uint16_t, std::int32_t>))
                                          : (call.long_pivot ? Kernel(gather_rows_kernel<std::uint32_t, std::int64_t>)
                                                             : Kernel(gather_rows_kernel<std::uint32_t, std::int32_t>));
  GatherCall argument = call;
  void* parameters[] = {&argument};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(kGatherThreads),
                          parameters, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace taco::cuda
