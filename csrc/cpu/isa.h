// What one instruction set offers to the driver: plain function pointers, so that nothing compiled with wider
// instructions can be inlined or merged (one definition rule) into code that every CPU runs.
#pragma once

#include <cstdint>

namespace taco {

struct BF16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

// t = x v^T for rows [begin, end) of v. t is fp32, rows t_stride apart, laid out as the second product reads it.
struct FirstProduct {
  const void* x;
  std::int64_t x_stride;
  const void* v;
  std::int64_t v_stride;
  float* t;
  std::int64_t t_stride;
  std::int64_t rows, in;
};

// y = t u^T * scale + bias + residual for rows [begin, end) of u.
struct SecondProduct {
  const float* t;
  std::int64_t t_stride;  // t's rows are zero from `rank` up to t_stride
  const void* u;
  std::int64_t u_stride;
  const float* scale;  // [rows] or null
  const void* bias;
  const void* residual;
  std::int64_t residual_stride;
  void* y;
  std::int64_t y_stride;
  std::int64_t rows, rank;
};

struct DtypeKernels {
  void (*first)(const FirstProduct&, std::int64_t begin, std::int64_t end);
  void (*second)(const SecondProduct&, std::int64_t begin, std::int64_t end);
  float (*sum_of_squares)(const void* x, std::int64_t n);
};

// t_stride must be a multiple of this on every instruction set: two of the widest vectors.
constexpr std::int64_t kStepMultiple = 32;
// Weight rows that are computed together; ranges given to threads are multiples of it.
constexpr std::int64_t kPanel = 4;

struct CpuKernels {
  const char* name;
  DtypeKernels by_dtype[3];  // indexed by Dtype
};

extern const CpuKernels kBaselineKernels;
#ifdef TACO_HAVE_AVX2
extern const CpuKernels kAvx2Kernels;
#endif
#ifdef TACO_HAVE_AVX512
extern const CpuKernels kAvx512Kernels;
#endif
#ifdef TACO_HAVE_AVX512BF16
extern const CpuKernels kAvx512Bf16Kernels;
#endif

}  // namespace taco
