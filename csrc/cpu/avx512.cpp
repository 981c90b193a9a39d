// AVX-512 without bf16 instructions (Skylake-X to Ice Lake).
#include <immintrin.h>

#include <cstdint>

#include "isa.h"

namespace taco {
namespace {

#include "scalar.inl"

#include "avx512.inl"
#include "split.inl"
#include "panel.inl"
#include "tile.inl"
#include "staged.inl"
#include "places.inl"
#include "few_rows.inl"
#include "gating.inl"
#include "attribution.inl"
#include "int8.inl"

}  // namespace

const CpuKernels kAvx512Kernels = {
    "avx512",
    {{first_product_any<float, Converted<float>, BroadcastF32>, second_product_any<float, BroadcastF32>,
      sum_of_squares<float>, gating<float>, attribution<float>, kInt8<float>, true, 5, nullptr, pack_places<float>},
     {first_product<Converted<F16>, F16>, second_product_any<F16>, sum_of_squares<F16>, gating<F16>,
      attribution<F16>, kInt8<F16>, true},
     {first_product<Converted<BF16>, BF16>, second_product_any<BF16>, sum_of_squares<BF16>, gating<BF16>,
      attribution<BF16>, kInt8<BF16>, true}},
    split_rows<std::uint16_t>,
    split_rows<std::uint32_t>};

}  // namespace taco
