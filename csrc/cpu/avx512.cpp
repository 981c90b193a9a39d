// AVX-512 without bf16 instructions (Skylake-X to Ice Lake).
#include <immintrin.h>

#include <cstdint>

#include "isa.h"

namespace taco {
namespace {

#include "avx512.inl"
#include "panel.inl"

}  // namespace

const CpuKernels kAvx512Kernels = {
    "avx512",
    {{first_product<Converted<float>, float>, second_product<float>, sum_of_squares<float>},
     {first_product<Converted<F16>, F16>, second_product<F16>, sum_of_squares<F16>},
     {first_product<Converted<BF16>, BF16>, second_product<BF16>, sum_of_squares<BF16>}}};

}  // namespace taco
