// Launches the decode kernels: picks the plan and the instantiation, raises the shared-memory limit once per device.
#include "low_rank_decode.cuh"

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

namespace taco::cuda {
namespace {

// The launch bound's 1 lets the compiler use every register: one block per multiprocessor is all the plan asks for.
template <class T, int Groups>
__global__ void __launch_bounds__(kThreads, 1) decode_mma_kernel(const __grid_constant__ DecodeArgs args) {
  decode_mma<T, Groups>(args);
}
template <class T, int Vector, int Rows>
__global__ void __launch_bounds__(kThreads, 1) decode_plain_kernel(const __grid_constant__ DecodeArgs args) {
  decode_plain<T, Vector, Rows>(args);
}

using Kernel = void (*)(DecodeArgs);

constexpr int kKernels = 4 + 4 * 3;

// Slot of a kernel in the per-device record, and the kernel.
struct Choice {
  int slot;
  Kernel kernel;
};

template <class T, int Vector>
Choice choose_plain(int slot, int rows_padded) {
  switch (rows_padded) {
    case 1: return {slot, decode_plain_kernel<T, Vector, 1>};
    case 4: return {slot + 1, decode_plain_kernel<T, Vector, 4>};
    default: return {slot + 2, decode_plain_kernel<T, Vector, 16>};
  }
}

Choice choose(const DecodePlan& plan, int dtype) {
  if (plan.matrix_unit) {
    const bool small = plan.rows_padded == 8;
    if (dtype == 1) return {small ? 0 : 1, small ? decode_mma_kernel<Half, 1> : decode_mma_kernel<Half, 2>};
    return {small ? 2 : 3, small ? decode_mma_kernel<Bfloat, 1> : decode_mma_kernel<Bfloat, 2>};
  }
  if (dtype == 1) return choose_plain<Half, 1>(4, plan.rows_padded);
  if (dtype == 2) return choose_plain<Bfloat, 1>(7, plan.rows_padded);
  return plan.vector == 4 ? choose_plain<float, 4>(10, plan.rows_padded) : choose_plain<float, 1>(13, plan.rows_padded);
}

struct Device {
  std::once_flag asked;
  cudaError_t error = cudaSuccess;
  int processors = 0;
  int shared_limit = 0;
  bool cooperative = false;
  std::atomic<bool> prepared[kKernels] = {};  // kernels whose shared-memory limit has been raised
};

constexpr int kMaxDevices = 64;
Device g_devices[kMaxDevices];

cudaError_t current_device(Device** found) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index < 0 || index >= kMaxDevices) return cudaErrorInvalidDevice;
  Device& device = g_devices[index];
  std::call_once(device.asked, [&] {
    int cooperative = 0;
    const struct {
      int* to;
      cudaDeviceAttr what;
    } questions[] = {{&device.processors, cudaDevAttrMultiProcessorCount},
                     {&device.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                     {&cooperative, cudaDevAttrCooperativeLaunch}};
    for (const auto& question : questions) {
      const cudaError_t failed = cudaDeviceGetAttribute(question.to, question.what, index);
      if (failed != cudaSuccess) device.error = failed;
    }
    if (device.error == cudaSuccess && cooperative == 0) device.error = cudaErrorNotSupported;
  });
  *found = &device;
  return device.error;
}

bool sizes_are_sane(std::int64_t rows, std::int64_t in, std::int64_t rank, std::int64_t out, int dtype) {
  constexpr std::int64_t kMost = std::int64_t(1) << 30;
  return rows >= 1 && rows <= kMaxDecodeRows && in >= 1 && in < kMost && rank >= 1 && rank < kMost && out >= 1 &&
         out < kMost && dtype >= 0 && dtype <= 2;
}

bool is_aligned(const void* pointer, std::int64_t stride_bytes, std::int64_t row_bytes) {
  return (reinterpret_cast<std::uintptr_t>(pointer) | std::uintptr_t(stride_bytes) | std::uintptr_t(row_bytes)) % 16 ==
         0;
}

}  // namespace

std::int64_t low_rank_decode_workspace_bytes(std::int64_t rows, std::int64_t in, std::int64_t rank, std::int64_t out,
                                             int dtype) {
  if (!sizes_are_sane(rows, in, rank, out, dtype)) return -std::int64_t(cudaErrorInvalidValue);
  Device* device = nullptr;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return -std::int64_t(error);
  std::int64_t most = 0;
  for (const bool aligned : {false, true}) {
    const DecodePlan plan =
        plan_decode(rows, in, rank, out, dtype, aligned, device->processors, device->shared_limit);
    most = std::max(most, plan.workspace_bytes);
  }
  return most;
}

int low_rank_decode(const LowRankCall& call, void* workspace, std::size_t workspace_bytes, void* stream) {
  if (!sizes_are_sane(call.rows, call.in, call.rank, call.out, call.dtype)) return cudaErrorInvalidValue;
  Device* device = nullptr;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;

  const std::int64_t size = call.dtype == 0 ? 4 : 2;
  const bool aligned = is_aligned(call.x, call.x_stride * size, call.in * size) &&
                       is_aligned(call.v, call.v_stride * size, call.in * size) &&
                       is_aligned(call.u, call.u_stride * size, call.rank * size);
  DecodeArgs args{call,
                  plan_decode(call.rows, call.in, call.rank, call.out, call.dtype, aligned, device->processors,
                              device->shared_limit),
                  static_cast<float*>(workspace), nullptr};
  args.squares = args.partial + std::int64_t(args.plan.splits) * call.rows * args.plan.rank_padded;
  if (workspace_bytes < std::size_t(args.plan.workspace_bytes) ||
      reinterpret_cast<std::uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorInvalidValue;
  }

  const Choice choice = choose(args.plan, call.dtype);
  if (!device->prepared[choice.slot].load(std::memory_order_acquire)) {
    // Two threads may both do this; it is idempotent.
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(choice.kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, device->shared_limit);
    if (error != cudaSuccess) return error;
    device->prepared[choice.slot].store(true, std::memory_order_release);
  }
  void* parameters[] = {&args};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(choice.kernel), dim3(unsigned(args.plan.blocks)),
                                     dim3(kThreads), parameters, std::size_t(args.plan.shared_bytes),
                                     static_cast<cudaStream_t>(stream));
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace taco::cuda
