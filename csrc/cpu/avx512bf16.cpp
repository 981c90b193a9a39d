// AVX-512 with bf16 dot products (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#include <immintrin.h>

#include <cstdint>

#include "isa.h"

namespace taco {
namespace {

#include "scalar.inl"

#include "avx512.inl"
#include "panel.inl"
#include "staged.inl"
#include "gating.inl"
#include "attribution.inl"
#include "many_rows.inl"

// bf16 weights against bf16 vectors: one instruction multiplies 32 pairs and adds them to 16 fp32 sums, nothing to
// widen. For few rows only for the first product: the second one's vector stays fp32, since rounding it would cost
// accuracy, and splitting it into two bf16 parts as many instructions as FMAs need (staged.inl).
struct DotBf16 {
  using W = __m512bh;
  using X = __m512bh;
  using Source = BF16;
  static inline W load_w(const BF16* p) { return reinterpret_cast<W>(_mm512_loadu_si512(p)); }
  static inline W load_w_tail(const BF16* p, std::int64_t n) {
    return reinterpret_cast<W>(_mm512_maskz_loadu_epi16(Arch::first_of_32(n), p));
  }
  static inline X load_x(const BF16* p) { return load_w(p); }
  static inline X load_x_tail(const BF16* p, std::int64_t n) { return load_w_tail(p, n); }
  static inline __m512 mac(__m512 sum, W w, X x) { return _mm512_dpbf16_ps(sum, w, x); }
};

}  // namespace

const CpuKernels kAvx512Bf16Kernels = {
    "avx512bf16",
    16,
    {{first_product<Converted<float>, float>, second_product_either<float>, sum_of_squares<float>, gating<float>,
      attribution<float>},
     {first_product<Converted<F16>, F16>, second_product_either<F16>, sum_of_squares<F16>, gating<F16>,
      attribution<F16>},
     {first_product<DotBf16, BF16>, second_product_either<BF16>, sum_of_squares<BF16>, gating<BF16>,
      attribution<BF16>, &kManyRowsBf16}}};

}  // namespace taco
