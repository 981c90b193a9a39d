// AVX-512 (F, BW, VL, DQ): the vector operations shared by avx512.cpp and avx512bf16.cpp.

struct Arch {
  static constexpr int kWidth = 16;
  static constexpr int kMaxRows = 4;  // 16 sums + 8 of x + 2 of weights = 26 of 32 registers
  using Vec = __m512;
  struct Pair {
    Vec a, b;
  };
  static inline Vec zero() { return _mm512_setzero_ps(); }
  static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  static inline __mmask32 first_of_32(std::int64_t n) { return static_cast<__mmask32>((std::uint64_t{1} << n) - 1); }

  static inline Pair load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
  static inline Pair load_tail(const float* p, std::int64_t n) {
    const __mmask32 mask = first_of_32(n);
    // The second pointer may lie beyond the row: a masked load touches only what its mask names.
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p),
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16)};
  }
  static inline Pair widen_f16(__m512i both) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
  }
  static inline Pair load(const F16* p) { return widen_f16(_mm512_loadu_si512(p)); }
  static inline Pair load_tail(const F16* p, std::int64_t n) {
    return widen_f16(_mm512_maskz_loadu_epi16(first_of_32(n), p));
  }
  static inline Pair widen_bf16(__m512i both) {
    // Two bf16 share a 32-bit lane; a bf16 is the upper half of an fp32. So one shift and one mask widen them, even
    // elements into a, odd ones into b, without a shuffle. position() lays t out to match.
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static inline Pair load(const BF16* p) { return widen_bf16(_mm512_loadu_si512(p)); }
  static inline Pair load_tail(const BF16* p, std::int64_t n) {
    return widen_bf16(_mm512_maskz_loadu_epi16(first_of_32(n), p));
  }
  static inline Pair load_pair(const float* p) { return load(p); }

  static inline std::int64_t position(const float*, std::int64_t j) { return j; }
  static inline std::int64_t position(const F16*, std::int64_t j) { return j; }
  static inline std::int64_t position(const BF16*, std::int64_t j) {
    return (j & ~std::int64_t{31}) + ((j & 1) << 4) + ((j & 31) >> 1);
  }

#include "quad.inl"

  static inline __m256 fold(Vec a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  }
  static inline Quad reduce4(Vec a, Vec b, Vec c, Vec d) { return reduce4_256(fold(a), fold(b), fold(c), fold(d)); }
  static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};
