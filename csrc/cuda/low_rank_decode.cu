// Launches the decode kernels: picks the plan and the instantiation, raises the shared-memory limit once per device.
#include "decode_mma.cuh"
#include "decode_plain.cuh"

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

namespace taco::cuda {
namespace {

// Blocks per multiprocessor in the launch bound: a cooperative launch has one, which may have every register. Of a
// dependent launch both kernels' blocks must fit on a multiprocessor together.
constexpr int bound(Part part) { return part == Part::kBoth ? 1 : 2; }

template <class T, int Groups, Part part>
__global__ void __launch_bounds__(kThreads, bound(part)) decode_mma_kernel(const __grid_constant__ DecodeArgs args) {
  decode_mma<T, Groups, part>(args);
}
template <class T, int Vector, int Rows, Part part>
__global__ void __launch_bounds__(kThreads, bound(part)) decode_plain_kernel(const __grid_constant__ DecodeArgs args) {
  decode_plain<T, Vector, Rows, part>(args);
}

using Kernel = void (*)(DecodeArgs);

constexpr int kKinds = 4 + 4 * 3;
constexpr int kKernels = 3 * kKinds;

// Slot of a kernel in the per-device record, and the kernel.
struct Choice {
  int slot;
  Kernel kernel;
};

template <class T, int Vector, Part part>
Choice choose_plain(int slot, int rows_padded) {
  switch (rows_padded) {
    case 1: return {slot, decode_plain_kernel<T, Vector, 1, part>};
    case 4: return {slot + 1, decode_plain_kernel<T, Vector, 4, part>};
    default: return {slot + 2, decode_plain_kernel<T, Vector, 16, part>};
  }
}

template <class T, Part part>
Choice choose_mma(int slot, int rows_padded) {
  if (rows_padded == 8) return {slot, decode_mma_kernel<T, 1, part>};
  return {slot + 1, decode_mma_kernel<T, 2, part>};
}

template <Part part>
Choice choose(const DecodePlan& plan, int dtype) {
  constexpr int base = int(part) * kKinds;
  if (plan.matrix_unit) {
    if (dtype == 1) return choose_mma<Half, part>(base, plan.rows_padded);
    return choose_mma<Bfloat, part>(base + 2, plan.rows_padded);
  }
  if (dtype == 1) return choose_plain<Half, 1, part>(base + 4, plan.rows_padded);
  if (dtype == 2) return choose_plain<Bfloat, 1, part>(base + 7, plan.rows_padded);
  if (plan.vector == 4) return choose_plain<float, 4, part>(base + 10, plan.rows_padded);
  return choose_plain<float, 1, part>(base + 13, plan.rows_padded);
}

struct Device {
  std::once_flag asked;
  cudaError_t error = cudaSuccess;
  int processors = 0;
  int shared_limit = 0;
  std::atomic<bool> cooperative{false};  // until such a launch is refused
  bool dependent = false;
  std::atomic<int> compiled_for[kKernels] = {};  // of kernels that are prepared: the __CUDA_ARCH__ of their code, / 10
};

// The first CUDA, of driver and runtime, whose graphs know dependent launches (its release notes). With an older one the
// second kernel never starts early: what a capture makes of such a launch there is not told anywhere.
constexpr int kGraphsDependFrom = 12030;

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
    device.cooperative = cooperative != 0;
    int driver = 0;
    const cudaError_t failed = cudaDriverGetVersion(&driver);
    if (failed != cudaSuccess) device.error = failed;
    device.dependent = std::min(driver, CUDART_VERSION) >= kGraphsDependFrom;
  });
  *found = &device;
  return device.error;
}

bool sizes_are_sane(const LowRankCall& call) {
  constexpr std::int64_t kMost = std::int64_t(1) << 28;  // four members' sizes still add up to an int
  constexpr std::int64_t kMostRank = kMost / kMaxDecodeRows;  // and so do the partial sums of all rows
  std::int64_t chunks = 0;  // of the first product: terabytes of weights are as many
  bool sane = call.rows >= 1 && call.rows <= kMaxDecodeRows && call.in >= 1 && call.in < kMost && call.dtype >= 0 &&
              call.dtype <= 2 && call.count >= 1 && call.count <= kMaxMembers && call.gate >= kNoGate &&
              call.gate <= kRelu;
  for (int i = 0; sane && i < call.count; ++i) {
    const Factors& member = call.members[i];
    sane = member.rank >= 1 && member.rank < kMostRank && member.out >= 1 && member.out < kMost;
    chunks += ceil_div(member.rank, kTile) * ceil_div(call.in, kChunk);
    if (sane && member.pivot != nullptr) sane = member.rank < call.in && !call.norm;
  }
  if (sane && call.gate != kNoGate) {
    sane = call.count == 2 && call.members[0].out == call.members[1].out && call.residual == nullptr;
  }
  return sane && chunks < std::int64_t(1) << 30 && (call.residual == nullptr || call.count == 1);
}

bool is_aligned(const void* pointer, std::int64_t stride_bytes, std::int64_t row_bytes) {
  return (reinterpret_cast<std::uintptr_t>(pointer) | std::uintptr_t(stride_bytes) | std::uintptr_t(row_bytes)) % 16 ==
         0;
}

// The first __CUDA_ARCH__ (/ 10) whose code holds the instructions of a dependent launch. What counts is the code, not
// the device: one that runs PTX of an earlier architecture would let the second kernel start early without waiting.
constexpr int kDependsFrom = 90;

cudaError_t prepare(Device& device, const Choice& choice) {
  std::atomic<int>& compiled_for = device.compiled_for[choice.slot];
  if (compiled_for.load(std::memory_order_acquire) != 0) return cudaSuccess;
  // Two threads may both do this; it is idempotent.
  const void* kernel = reinterpret_cast<const void*>(choice.kernel);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_limit);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes = {};
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  if (choice.slot / kKinds == int(Part::kFirst) && device.dependent && attributes.ptxVersion >= kDependsFrom) {
    // By default a multiprocessor is set up with the little shared memory that this kernel's blocks need, the rest as
    // L1; a block of the second kernel, which needs much, would have to wait until all of them have left.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  compiled_for.store(attributes.ptxVersion, std::memory_order_release);
  return cudaSuccess;
}

bool can_depend(const Device& device, const Choice& choice) {
  return device.dependent && device.compiled_for[choice.slot].load(std::memory_order_acquire) >= kDependsFrom;
}

cudaError_t start(const Choice& choice, DecodeArgs& args, std::int64_t shared_bytes, cudaLaunchAttributeID attribute,
                  cudaStream_t stream) {
  cudaLaunchAttribute how[1] = {};
  how[0].id = attribute;
  if (attribute == cudaLaunchAttributeCooperative) how[0].val.cooperative = 1;
  if (attribute == cudaLaunchAttributeProgrammaticStreamSerialization) {
    how[0].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(args.plan.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = std::size_t(shared_bytes);
  config.stream = stream;
  config.attrs = how;
  config.numAttrs = attribute == cudaLaunchAttributeIgnore ? 0 : 1;
  void* parameters[] = {&args};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(choice.kernel), parameters);
}

// Whether every row that the kernels read 16 bytes at a time begins and ends on a multiple of 16 bytes. x is not read so
// where it is gathered.
bool rows_are_aligned(const LowRankCall& call) {
  const std::int64_t size = call.dtype == 0 ? 4 : 2;
  bool aligned = true;
  for (int i = 0; i < call.count; ++i) {
    const Factors& member = call.members[i];
    const bool gathers = member.pivot != nullptr;
    const std::int64_t columns = call.in - (gathers ? member.rank : 0);
    aligned = aligned && (gathers || is_aligned(call.x, call.x_stride * size, call.in * size)) &&
              is_aligned(member.v, member.v_stride * size, columns * size) &&
              is_aligned(member.u, member.u_stride * size, member.rank * size);
  }
  return aligned;
}

}  // namespace

std::int64_t low_rank_decode_workspace_bytes(const LowRankCall& call) {
  if (!sizes_are_sane(call)) return -std::int64_t(cudaErrorInvalidValue);
  Device* device = nullptr;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return -std::int64_t(error);
  std::int64_t most = 0;
  for (const bool aligned : {false, true}) {  // shared memory, and with it the launch, does not enter
    most = std::max(most, plan_decode(call, aligned, device->processors, device->shared_limit).workspace_bytes);
  }
  return most;
}

int low_rank_decode(const LowRankCall& call, Launch launch, void* workspace, std::size_t workspace_bytes,
                    void* stream) {
  if (!sizes_are_sane(call)) return cudaErrorInvalidValue;
  Device* device = nullptr;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;

  const bool aligned = rows_are_aligned(call);
  const bool cooperative = launch == kCooperative && device->cooperative;
  const auto plan_with = [&](std::int64_t shared) { return plan_decode(call, aligned, device->processors, shared); };
  const std::int64_t beside = beside_first_kernel(call, device->shared_limit);
  DecodeArgs args{call, plan_with(cooperative ? device->shared_limit : beside), nullptr, nullptr};
  arrange(args, workspace);
  if (workspace_bytes < std::size_t(args.plan.workspace_bytes) ||
      reinterpret_cast<std::uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (cooperative) {
    const Choice both = choose<Part::kBoth>(args.plan, call.dtype);
    error = prepare(*device, both);
    if (error != cudaSuccess) return error;
    error = start(both, args, args.plan.shared_bytes, cudaLaunchAttributeCooperative, on);
    if (error != cudaErrorCooperativeLaunchTooLarge) return error;
    // A process may have a part of the multiprocessors only (MPS, green contexts), which does not hold all blocks at
    // once. Two kernels do without; their plan divides the work space in the same way. Refused once is enough: the next
    // call may be captured, and an error may end a capture.
    cudaGetLastError();
    device->cooperative = false;
    args.plan = plan_with(beside);
  }
  const Choice first = choose<Part::kFirst>(args.plan, call.dtype);
  const Choice second = choose<Part::kSecond>(args.plan, call.dtype);
  for (const Choice& choice : {first, second}) {
    error = prepare(*device, choice);
    if (error != cudaSuccess) return error;
  }
  error = start(first, args, args.plan.first_shared_bytes, cudaLaunchAttributeIgnore, on);
  if (error != cudaSuccess) return error;
  const bool dependent = can_depend(*device, first) && can_depend(*device, second);
  return start(second, args, args.plan.shared_bytes,
               dependent ? cudaLaunchAttributeProgrammaticStreamSerialization : cudaLaunchAttributeIgnore, on);
}

const char* why_unusable() {
  Device* device = nullptr;
  cudaError_t error = current_device(&device);
  if (error == cudaSuccess) {
    // Loads the code: fails where the build has none for this device, or the driver cannot compile the PTX. What is
    // true of one kernel is of all.
    cudaFuncAttributes attributes = {};
    error = cudaFuncGetAttributes(&attributes,
                                  reinterpret_cast<const void*>(decode_plain_kernel<float, 1, 1, Part::kBoth>));
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(error);
}

int current_device_index() {
  int index = 0;
  const cudaError_t error = cudaGetDevice(&index);
  return error == cudaSuccess ? index : -int(error);
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace taco::cuda
