// The driver: which instruction set, how many threads, who computes what. Compiled for every CPU.
#include "taco_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define TACO_X86 1
#endif

namespace taco {
namespace {

#ifdef TACO_X86
struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512bf16 = false;

  CpuFeatures() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c & (1u << 12), osxsave = c & (1u << 27), avx = c & (1u << 28), f16c = c & (1u << 29);
    if (!osxsave || !avx) return;
    // The operating system must save the wider registers, or using them is an illegal instruction.
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool saves_ymm = (low & 0x6u) == 0x6u, saves_zmm = (low & 0xe6u) == 0xe6u;
    if (!saves_ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned subleaves = a;
    avx2 = fma && f16c && (b & (1u << 5));
    const bool f = b & (1u << 16), dq = b & (1u << 17), bw = b & (1u << 30), vl = b & (1u << 31);
    avx512 = avx2 && saves_zmm && f && dq && bw && vl;
    if (avx512 && subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512bf16 = a & (1u << 5);
  }
};
#endif

std::vector<const CpuKernels*> usable() {
  std::vector<const CpuKernels*> found;
#ifdef TACO_X86
  const CpuFeatures cpu;
#ifdef TACO_HAVE_AVX512BF16
  if (cpu.avx512bf16) found.push_back(&kAvx512Bf16Kernels);
#endif
#ifdef TACO_HAVE_AVX512
  if (cpu.avx512) found.push_back(&kAvx512Kernels);
#endif
#ifdef TACO_HAVE_AVX2
  if (cpu.avx2) found.push_back(&kAvx2Kernels);
#endif
#endif
  found.push_back(&kBaselineKernels);
  return found;
}

const std::vector<const CpuKernels*>& usable_once() {
  static const std::vector<const CpuKernels*> kernels = usable();
  return kernels;
}

std::atomic<const CpuKernels*>& active() {
  static std::atomic<const CpuKernels*> kernels{usable_once().front()};
  return kernels;
}

// Scratch memory of the calling thread, kept from call to call: a decode step must not pay for the allocator.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* get(std::size_t floats) {
    if (floats > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      void* p = nullptr;
      if (posix_memalign(&p, 64, floats * sizeof(float)) != 0) throw std::bad_alloc();
      data_ = static_cast<float*>(p);
      size_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  std::size_t size_ = 0;
};
thread_local Scratch scratch;

// Rows that go through both products before the next ones: bounds t, and keeps x in the cache of one core.
constexpr std::int64_t kRowBlock = 64;
// Bytes of weights (times the work the rows add) that make one more thread worth waking.
constexpr std::int64_t kBytesPerThread = 96 * 1024;

struct Range {
  std::int64_t begin, end;
};

// Thread `index`'s share of `n` rows, in whole panels.
Range share(std::int64_t n, int index, int threads) {
  const std::int64_t panels = (n + kPanel - 1) / kPanel;
  return {std::min(n, panels * index / threads * kPanel), std::min(n, panels * (index + 1) / threads * kPanel)};
}

int threads_for(const LowRankArgs& a, int threads) {
  const std::int64_t size = a.dtype == Dtype::kF32 ? 4 : 2;
  const std::int64_t work = a.rank * (a.in + a.out) * size * (1 + std::min(a.rows, kRowBlock) / 4);
  const std::int64_t panels = (std::max(a.rank, a.out) + kPanel - 1) / kPanel;
  return static_cast<int>(std::max<std::int64_t>(1, std::min({std::int64_t{threads}, work / kBytesPerThread, panels})));
}

const void* offset(const void* p, std::int64_t elements, std::int64_t size) {
  return p ? static_cast<const char*>(p) + elements * size : nullptr;
}

struct Block {
  FirstProduct first;
  SecondProduct second;
  float* scale;  // null without normalisation
  const DtypeKernels* kernels;
  std::int64_t element, rank, out;
  float eps;

  void before_barrier(int index, int threads) const {
    if (scale)
      for (std::int64_t r = index; r < first.rows; r += threads) {
        const float squares = kernels->sum_of_squares(offset(first.x, r * first.x_stride, element), first.in);
        scale[r] = 1.0f / std::sqrt(squares / static_cast<float>(first.in) + eps);
      }
    const Range mine = share(rank, index, threads);
    kernels->first(first, mine.begin, mine.end);
  }
  void after_barrier(int index, int threads) const {
    const Range mine = share(out, index, threads);
    kernels->second(second, mine.begin, mine.end);
  }
};

}  // namespace

void low_rank(const LowRankArgs& a, int threads) {
  if (a.rows <= 0 || a.out <= 0) return;
  const CpuKernels* isa = active().load(std::memory_order_relaxed);
  const std::int64_t t_stride = (a.rank + kStepMultiple - 1) / kStepMultiple * kStepMultiple;
  const std::int64_t block_rows = std::min(a.rows, kRowBlock);
  float* t = scratch.get(static_cast<std::size_t>(block_rows * t_stride + block_rows));
  float* scale = a.normalise && a.in > 0 ? t + block_rows * t_stride : nullptr;
  // Padding must be zero. Positions are permuted only within a step, so the last step of each row holds all of it.
  if (t_stride > a.rank)
    for (std::int64_t r = 0; r < block_rows; ++r)
      std::memset(t + (r + 1) * t_stride - kStepMultiple, 0, kStepMultiple * sizeof(float));

  const int team = threads_for(a, threads);
  for (std::int64_t start = 0; start < a.rows; start += kRowBlock) {
    Block block;
    block.kernels = &isa->by_dtype[static_cast<int>(a.dtype)];
    block.element = a.dtype == Dtype::kF32 ? 4 : 2;
    block.rank = a.rank;
    block.out = a.out;
    block.eps = a.eps;
    block.scale = scale;
    const std::int64_t rows = std::min(kRowBlock, a.rows - start);
    block.first = {offset(a.x, start * a.x_stride, block.element), a.x_stride, a.v, a.v_stride, t, t_stride, rows, a.in};
    block.second = {t, t_stride, a.u, a.u_stride, scale, a.bias,
                    offset(a.residual, start * a.residual_stride, block.element), a.residual_stride,
                    const_cast<void*>(offset(a.y, start * a.out, block.element)), a.out, rows, a.rank};
#ifdef _OPENMP
    if (team > 1) {
      // One region for both products; the barrier is the only meeting point of the threads.
#pragma omp parallel num_threads(team)
      {
        const int index = omp_get_thread_num(), count = omp_get_num_threads();
        block.before_barrier(index, count);
#pragma omp barrier
        block.after_barrier(index, count);
      }
      continue;
    }
#endif
    block.before_barrier(0, 1);
    block.after_barrier(0, 1);
  }
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : usable_once()) names.emplace_back(kernels->name);
  return names;
}

std::vector<std::string> compiled_cpu_isas() {
  std::vector<std::string> names;
#ifdef TACO_HAVE_AVX512BF16
  names.emplace_back("avx512bf16");
#endif
#ifdef TACO_HAVE_AVX512
  names.emplace_back("avx512");
#endif
#ifdef TACO_HAVE_AVX2
  names.emplace_back("avx2");
#endif
  names.emplace_back("baseline");
  return names;
}

std::string cpu_isa() { return active().load()->name; }

bool set_cpu_isa(const std::string& name) {
  if (name == "auto") {
    active().store(usable_once().front());
    return true;
  }
  for (const CpuKernels* kernels : usable_once())
    if (name == kernels->name) {
      active().store(kernels);
      return true;
    }
  return false;
}

int omp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

std::uint64_t read_memory(const void* data, std::int64_t bytes, int threads) {
  const std::uint64_t* words = static_cast<const std::uint64_t*>(data);
  const std::int64_t lines = bytes / 64;
  std::uint64_t total = 0;
#ifndef _OPENMP
  (void)threads;
#else
#pragma omp parallel num_threads(threads) reduction(+ : total)
#endif
  {
#ifdef _OPENMP
    const std::int64_t index = omp_get_thread_num(), count = omp_get_num_threads();
#else
    const std::int64_t index = 0, count = 1;
#endif
    const std::int64_t begin = lines * index / count, end = lines * (index + 1) / count;
    // Four streams and a prefetch some lines ahead, like the kernels' own way through the weights: one stream alone
    // leaves bandwidth unused, and a yardstick that the measured thing can beat is none.
    const std::int64_t stream = (end - begin + 3) / 4;
    for (std::int64_t i = 0; i < stream; ++i)
      for (std::int64_t s = 0; s < 4; ++s) {
        const std::int64_t line = begin + s * stream + i;
        if (line >= end) continue;
        const std::uint64_t* p = words + 8 * line;
#if defined(__GNUC__)
        __builtin_prefetch(p + 8 * 16);
#endif
        total += (p[0] + p[1]) + (p[2] + p[3]) + ((p[4] + p[5]) + (p[6] + p[7]));
      }
  }
  return total;
}

}  // namespace taco
