// The few things the kernels need from the machine: vector loads, the matrix unit, sums over a warp, barriers, and
// copies into shared memory that run beside the computation. With TACO_EMULATE the same names come from
// emulation/emulation.h, which runs a whole launch on the CPU; the kernels themselves are then tested as they are.
#pragma once

#include <cstdint>

#ifdef TACO_EMULATE
#include "emulation/emulation.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define TACO_DEVICE __device__ __forceinline__

namespace taco::cuda {

using Half = __half;
using Bfloat = __nv_bfloat16;

TACO_DEVICE int thread_index() { return int(threadIdx.x); }
TACO_DEVICE int block_index() { return int(blockIdx.x); }
TACO_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

TACO_DEVICE float to_float(float x) { return x; }
TACO_DEVICE float to_float(Half x) { return __half2float(x); }
TACO_DEVICE float to_float(Bfloat x) { return __bfloat162float(x); }
template <class T>
TACO_DEVICE T from_float(float x);
template <>
TACO_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
TACO_DEVICE Half from_float<Half>(float x) {
  return __float2half_rn(x);
}
template <>
TACO_DEVICE Bfloat from_float<Bfloat>(float x) {
  return __float2bfloat16_rn(x);
}

TACO_DEVICE float inverse_sqrt(float x) { return rsqrtf(x); }
// The build contracts no products and sums by itself, so that every instantiation rounds alike; here it is meant.
TACO_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// 16 bytes of weights: read once, so they need not displace anything from L1.
TACO_DEVICE uint4 load_weights(const void* address) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(address));
  return r;
}
// 16 bytes of activations, which the block's warps read again and again.
TACO_DEVICE uint4 load_activations(const void* address) { return __ldg(static_cast<const uint4*>(address)); }
// One element that no kernel of the call writes: an input, an index.
template <class T>
TACO_DEVICE T load_input(const T* address) {
  return __ldg(address);
}
TACO_DEVICE int64_t load_input(const int64_t* address) {
  return __ldg(reinterpret_cast<const long long*>(address));
}
// Has what lies there brought to L2, for a read later on.
TACO_DEVICE void prefetch_to_cache(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}
// Values that other blocks of this launch have written: from L2, never from this multiprocessor's L1.
TACO_DEVICE float4 load_written4(const float* address) { return __ldcg(reinterpret_cast<const float4*>(address)); }
TACO_DEVICE float load_written(const float* address) { return __ldcg(address); }

// Sum over the lanes that differ in the bits of `Width - 1`; every lane gets it.
template <int Width>
TACO_DEVICE float lane_sum(float x) {
#pragma unroll
  for (int bit = Width / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

// c[16 x 8] += a[16 x 16] b[16 x 8] over a warp, float32 accumulation (PTX ISA, mma.m16n8k16). Lane l = 4 g + q holds
// of a the rows g (a0, a2) and g + 8 (a1, a3), of b the column g, of c the columns 2 q and 2 q + 1 of rows g and g + 8.
template <class T>
TACO_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
template <>
TACO_DEVICE void mma<Half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
TACO_DEVICE void mma<Bfloat>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

TACO_DEVICE void block_barrier() { __syncthreads(); }
// Every block of the launch; what was written before it is visible after it. Needs a cooperative launch. The driver
// keeps its counter, so there is no work space to initialise and nothing to reset between replays of a graph.
TACO_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

// Programmatic dependent launch (PTX ISA, griddepcontrol): lets the next kernel of the stream start when every block of
// this one has come here; and waits until the kernel before is complete and its writes are visible. Without a dependent
// launch neither does anything.
TACO_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
TACO_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Rows from global into shared memory, beside the computation. Protocol, called by every thread of the block:
// copy_begin; copy_rows with the same arguments in every thread, once; copy_wait before the first read.
// Hopper's copy engine (cp.async.bulk) takes whole rows from a few threads; Ampere's cp.async 16 bytes per thread.
// Lengths and addresses are multiples of 16.
TACO_DEVICE void copy_begin(void* barrier) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // makes it known to the copy engine
  }
  __syncthreads();
#else
  (void)barrier;
#endif
}

// Where a row to be copied lies, and how long it is.
struct Row {
  const void* from;
  int bytes;
};

// Row i of `count` goes from source(i) to target + i * pitch, and is no longer than that; rows with a null source are left
// out.
template <class Source>
TACO_DEVICE void copy_rows(void* barrier, char* target, int pitch, int count, Source source) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x >= 32) return;
  const uint32_t address = uint32_t(__cvta_generic_to_shared(barrier));
  int mine = 0;
  for (int i = int(threadIdx.x); i < count; i += 32) {
    const Row row = source(i);
    mine += row.from != nullptr ? row.bytes : 0;
  }
  const int bytes = __reduce_add_sync(0xffffffffu, mine);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
                 : "memory");
  }
  __syncwarp();
  for (int i = int(threadIdx.x); i < count; i += 32) {
    const Row row = source(i);
    if (row.from == nullptr) continue;
    const uint32_t to = uint32_t(__cvta_generic_to_shared(target + int64_t(i) * pitch));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(__cvta_generic_to_global(row.from)), "r"(row.bytes), "r"(address)
        : "memory");
  }
#else
  (void)barrier;
  for (int i = int(threadIdx.x) / 32; i < count; i += int(blockDim.x) / 32) {  // a warp a row
    const Row row = source(i);
    if (row.from == nullptr) continue;
    const char* from = static_cast<const char*>(row.from);
    const uint32_t to = uint32_t(__cvta_generic_to_shared(target + int64_t(i) * pitch));
    for (int offset = int(threadIdx.x) % 32 * 16; offset < row.bytes; offset += 32 * 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + uint32_t(offset)),
                   "l"(__cvta_generic_to_global(from + offset))
                   : "memory");
    }
  }
#endif
}

TACO_DEVICE void copy_wait(void* barrier) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = uint32_t(__cvta_generic_to_shared(barrier));
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(address)
        : "memory");
  }
#else
  (void)barrier;
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
#endif
}

}  // namespace taco::cuda
#endif
