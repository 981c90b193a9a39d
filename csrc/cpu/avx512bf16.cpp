// AVX-512 with bf16 dot products (Cooper Lake, Sapphire Rapids, Zen 4 and later).
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
#define TACO_CONVERTS_BF16 1
#include "int8.inl"
#include "many_rows.inl"

// bf16 weights against bf16 vectors: one instruction multiplies 32 pairs and adds them to 16 fp32 sums, nothing to
// widen. Up to four rows, which wait for memory either way, only for the first product: the second one's vector stays
// fp32. More rows wait for arithmetic; their vectors are rounded, as between two library products.
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

struct BroadcastBf16 {  // see BroadcastF32
  using T = BF16;
  using Rows = __m512bh;
  static constexpr int kColumns = 2;
  template <int kFold>
  static inline __m512bh weights(const BF16* p) {
    if constexpr (kFold == 1) {
      int two;
      __builtin_memcpy(&two, p, 4);
      return reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
    }
    long long four;
    __builtin_memcpy(&four, p, 8);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi64(four));
  }
  static inline Rows rows(const void* t) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(t)); }
  static inline __m512 mac(__m512 sum, Rows rows, __m512bh weights) { return _mm512_dpbf16_ps(sum, rows, weights); }
};

}  // namespace

const CpuKernels kAvx512Bf16Kernels = {
    "avx512bf16",
    {{first_product_any<float, Converted<float>, BroadcastF32>, second_product_any<float, BroadcastF32>,
      sum_of_squares<float>, gating<float>, attribution<float>, kInt8<float>, true, 5, nullptr, pack_places<float>},
     {first_product<Converted<F16>, F16>, second_product_any<F16>, sum_of_squares<F16>, gating<F16>,
      attribution<F16>, kInt8<F16>, true},
     {first_product_any<BF16, DotBf16, BroadcastBf16>, second_product_any<BF16, BroadcastBf16>,
      sum_of_squares<BF16>, gating<BF16>, attribution<BF16>, kInt8<BF16>, true, 5, &kManyRowsBf16, pack_places<BF16>}},
    split_rows<std::uint16_t>,
    split_rows<std::uint32_t>};

}  // namespace taco
