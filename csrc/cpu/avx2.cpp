// AVX2 + FMA + F16C: every x86-64 server and desktop since 2013 (Haswell) and 2017 (Zen).
#include <immintrin.h>

#include <cstdint>

#include "isa.h"

namespace taco {
namespace {

#include "scalar.inl"

struct Arch {
  static constexpr int kWidth = 8;
  static constexpr int kMaxRows = 2;  // 8 sums + 4 of x + 2 of weights = 14 of 16 registers
  // Zen 3's own prefetchers follow the four streams: asking beside them cost a tenth of the bandwidth in fp32
  static constexpr bool kAsksAhead = false;
  using Vec = __m256;
  struct Pair {
    Vec a, b;
  };
  static inline Vec zero() { return _mm256_setzero_ps(); }
  static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }

  static inline Pair load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static inline Pair load(const F16* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  static inline Pair load(const BF16* p) {
    // Two bf16 share a 32-bit lane; a bf16 is the upper half of an fp32. So one shift and one mask widen them, even
    // elements into a, odd ones into b, without a shuffle. position() lays t out to match.
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  // The halves of load(), for few_rows_float.inl. The mask lies in memory, as far as the compiler knows: kept in a register it
  // would push a sum out of there.
  struct Odd {
    const __m256i* mask;
    Odd() {
      alignas(32) static const std::uint32_t masks[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                         0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
      mask = reinterpret_cast<const __m256i*>(masks);
      __asm__("" : "+r"(mask));
    }
  };
  static inline Vec first(const float* p) { return _mm256_loadu_ps(p); }
  static inline Vec second(const float* p, Odd) { return _mm256_loadu_ps(p + 8); }
  static inline Vec first(const F16* p) { return load8(p); }
  static inline Vec second(const F16* p, Odd) { return load8(p + 8); }
  static inline Vec first(const BF16* p) { return load(p).a; }
  static inline Vec second(const BF16* p, const Odd& odd) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_load_si256(odd.mask)));
  }
  static inline Vec widen_int8(__m128i eight) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)); }
  static inline Pair load(const std::int8_t* p) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {widen_int8(both), widen_int8(_mm_unpackhi_epi64(both, both))};
  }
  template <class T>
  static inline Pair load_tail(const T* p, std::int64_t n) {
    T padded[2 * kWidth] = {};
    for (std::int64_t i = 0; i < n; ++i) padded[i] = p[i];
    return load(padded);
  }
  static inline Pair load_pair(const float* p) { return load(p); }

  static inline std::int64_t position(const float*, std::int64_t j) { return j; }
  static inline std::int64_t position(const F16*, std::int64_t j) { return j; }
  static inline std::int64_t position(const BF16*, std::int64_t j) {
    return (j & ~std::int64_t{15}) + ((j & 1) << 3) + ((j & 15) >> 1);
  }

#include "quad.inl"

  static inline Quad reduce4(Vec a, Vec b, Vec c, Vec d) { return reduce4_256(a, b, c, d); }

  // For many_rows_float.inl: eight elements in their order
  static inline Vec all(float a) { return _mm256_set1_ps(a); }
  static inline Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static inline Vec load8(const float* p) { return _mm256_loadu_ps(p); }
  static inline Vec load8(const F16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Vec load8(const BF16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static inline void store(F16* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline void store(BF16* p, Vec a) {  // as quad_store
    quad_store(p, _mm256_castps256_ps128(a));
    quad_store(p + 4, _mm256_extractf128_ps(a, 1));
  }
  // rows become columns, by pairs, fours and eights
  static inline void transpose(Vec (&a)[8]) {
    Vec b[8], c[8];
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    // c[4 i + j] holds column j of each 128-bit lane, of rows 4 i to 4 i + 3
    for (int i = 0; i < 8; i += 4) {
      c[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      c[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      c[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      c[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      a[j] = _mm256_permute2f128_ps(c[j], c[j + 4], 0x20);
      a[j + 4] = _mm256_permute2f128_ps(c[j], c[j + 4], 0x31);
    }
  }
  static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

#include "panel.inl"
#include "gating.inl"
#include "attribution.inl"
#include "int8.inl"
#include "many_rows_float.inl"
#include "few_rows_float.inl"

}  // namespace

const CpuKernels kAvx2Kernels = {
    "avx2",
    {{first_product<Converted<float>, float>, second_product<float>, sum_of_squares<float>, gating<float>,
      attribution<float>, kInt8<float>, false, 0, &kRowsFloat<float>},
     {first_product<Converted<F16>, F16>, second_product<F16>, sum_of_squares<F16>, gating<F16>,
      attribution<F16>, kInt8<F16>, false, 0, &kRowsFloat<F16>},
     {first_product<Converted<BF16>, BF16>, second_product<BF16>, sum_of_squares<BF16>, gating<BF16>,
      attribution<BF16>, kInt8<BF16>, false, 0, &kRowsFloat<BF16>}}};

}  // namespace taco
