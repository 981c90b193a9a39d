// What low_rank_decode.cu asks of the CUDA runtime, for a CPU: a device whose answers a test decides, and launches that
// run in the emulation and are told. Found as <cuda_runtime.h> by launcher.cpp's build only.
#pragma once

#include <cstddef>
#include <cstdio>
#include <map>

#include "cuda/decode_common.cuh"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrCooperativeLaunch,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeProgrammaticStreamSerialization,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative, programmaticStreamSerializationAllowed;
  } val;
};
struct dim3 {
  unsigned x;
  dim3(unsigned count = 1) : x(count) {}
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// The device; a test sets it.
struct FakeDevice {
  int processors = 3, shared_limit = 232448;
  int driver = 13000;       // the CUDA that it knows
  int code = 90;            // the virtual architecture that the kernels' code was compiled for
  int cooperative = 1;      // whether it has such launches
  int most_blocks = 1000;   // of a cooperative launch
  int driver_error = 0;     // what every question gets
  int code_error = 0;       // what a question about a kernel gets
  int last_error = 0;
  std::map<const void*, int> shared_most, carveout;
};
inline FakeDevice g_fake;

inline cudaError_t fail(int error) {
  if (error != 0) g_fake.last_error = error;
  return cudaError_t(error);
}
inline cudaError_t cudaGetLastError() {
  const int error = g_fake.last_error;
  g_fake.last_error = 0;
  return cudaError_t(error);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    default: return "another error";
  }
}
inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return fail(g_fake.driver_error);
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = g_fake.driver;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrMultiProcessorCount: *value = g_fake.processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = g_fake.shared_limit; break;
    case cudaDevAttrCooperativeLaunch: *value = g_fake.cooperative; break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute what, int value) {
  if (g_fake.code_error != 0) return fail(g_fake.code_error);
  (what == cudaFuncAttributePreferredSharedMemoryCarveout ? g_fake.carveout : g_fake.shared_most)[kernel] = value;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  found->ptxVersion = found->binaryVersion = g_fake.code;
  return fail(g_fake.code_error);
}

inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** parameters) {
  const auto how = config->numAttrs > 0 ? config->attrs[0].id : cudaLaunchAttributeIgnore;
  const bool cooperative = how == cudaLaunchAttributeCooperative && config->attrs[0].val.cooperative == 1;
  const bool dependent = how == cudaLaunchAttributeProgrammaticStreamSerialization &&
                         config->attrs[0].val.programmaticStreamSerializationAllowed == 1;
  const char* name = cooperative ? "cooperative" : dependent ? "dependent" : "plain";
  if (cooperative && (g_fake.cooperative == 0 || config->gridDim.x > unsigned(g_fake.most_blocks))) {
    std::printf("%s refused\n", name);
    return fail(g_fake.cooperative == 0 ? cudaErrorNotSupported : cudaErrorCooperativeLaunchTooLarge);
  }
  if (config->dynamicSmemBytes > std::size_t(g_fake.shared_most[kernel])) return fail(cudaErrorInvalidValue);
  std::printf("%s%s\n", name, g_fake.carveout.count(kernel) == 0 ? "" : " carveout");
  using taco::cuda::DecodeArgs;
  const DecodeArgs args = *static_cast<DecodeArgs*>(parameters[0]);
  const auto body = reinterpret_cast<void (*)(DecodeArgs)>(reinterpret_cast<std::uintptr_t>(kernel));
  const bool done = taco::cuda::run(int(config->gridDim.x), int(config->blockDim.x), int64_t(config->dynamicSmemBytes),
                                    [&] { body(args); });
  return done ? cudaSuccess : cudaErrorInvalidValue;
}
