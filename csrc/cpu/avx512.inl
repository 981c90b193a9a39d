// AVX-512 (F, BW, VL, DQ): the vector operations shared by avx512.cpp and avx512bf16.cpp.

struct Arch {
  static constexpr int kWidth = 16;
  static constexpr int kMaxRows = 4;  // 16 sums + 8 of x + 2 of weights = 26 of 32 registers
  static constexpr bool kAsksAhead = true;
  using Vec = __m512;
  struct Pair {
    Vec a, b;
  };
  static inline Vec zero() { return _mm512_setzero_ps(); }
  static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static inline Vec abs(Vec a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
  static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }

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
  static inline Vec widen_int8(__m128i sixteen) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen)); }
  static inline Pair load(const std::int8_t* p) {
    const __m128i* const q = reinterpret_cast<const __m128i*>(p);
    return {widen_int8(_mm_loadu_si128(q)), widen_int8(_mm_loadu_si128(q + 1))};
  }
  static inline Pair load_tail(const std::int8_t* p, std::int64_t n) {
    const __m256i both = _mm256_maskz_loadu_epi8(first_of_32(n), p);
    return {widen_int8(_mm256_castsi256_si128(both)), widen_int8(_mm256_extracti128_si256(both, 1))};
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

  static inline Vec load16(const float* p) { return _mm512_loadu_ps(p); }
  static inline Vec load16(const F16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline Vec load16(const BF16* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static inline void store16(float* p, Vec a) { _mm512_storeu_ps(p, a); }
  static inline void store16(F16* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // a as bf16 in the lower half of each lane. As quad_store does it: on the integer side, because the conversion
  // instruction drops subnormal numbers.
  static inline __m512i rounded_bf16(Vec a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
  }
  static inline void store16(BF16* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded_bf16(a)));
  }
  template <class Y, class T>
  static inline void finish16(Y* y, Vec sums, float scale, const T* bias, const T* residual) {
    Vec a = _mm512_mul_ps(sums, _mm512_set1_ps(scale));
    if (bias) a = add(a, load16(bias));
    if (residual) a = add(a, load16(residual));
    store16(y, a);
  }

  // Sums across each of 16 vectors, in their order. Every step folds two vectors into one; additions come in the order
  // of reduce4, hence with its bits, but there is half a shuffle less for each sum.
  static inline Vec reduce16(const Vec (&s)[16]) {
    Vec a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) {
      // which sum must come in where, so that they come out in order: places 0 4 2 6 within a 128-bit lane
      const int from = (i & 1) * 8 + (i >> 2 & 1) + (i & 2), to = from + 4;
      a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[from], s[to], 0x44), _mm512_shuffle_f32x4(s[from], s[to], 0xee));
    }
    for (int i = 0; i < 4; ++i)
      b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[i], a[i + 4], 0x88), _mm512_shuffle_ps(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 2; ++i)
      c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[i], b[i + 2], 0x88), _mm512_shuffle_ps(b[i], b[i + 2], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  }

  // rows become columns, by pairs, fours, eights and sixteens
  static inline void transpose(Vec (&a)[16]) {
    __m512d b[16];
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_castps_pd(_mm512_unpacklo_ps(a[i], a[i + 1]));
      b[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(a[i], a[i + 1]));
    }
    // after the next step c[4 i + j] holds column j of each 128-bit lane, of rows 4 i to 4 i + 3
    Vec c[16];
    for (int i = 0; i < 16; i += 4) {
      c[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(b[i], b[i + 2]));
      c[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(b[i], b[i + 2]));
      c[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b[i + 1], b[i + 3]));
      c[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b[i + 1], b[i + 3]));
    }
    for (int j = 0; j < 4; ++j) {
      const Vec even_low = _mm512_shuffle_f32x4(c[j], c[j + 4], 0x88);
      const Vec odd_low = _mm512_shuffle_f32x4(c[j], c[j + 4], 0xdd);
      const Vec even_high = _mm512_shuffle_f32x4(c[j + 8], c[j + 12], 0x88);
      const Vec odd_high = _mm512_shuffle_f32x4(c[j + 8], c[j + 12], 0xdd);
      a[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      a[j + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      a[j + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      a[j + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
  }
  static inline Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  // Into the second cache: the first one has places for fewer lines on their way. Two Zen 4 cores read 1.05 to 1.3 times as
  // fast as with the first cache asked, 1.0 to 1.15 times as fast as without.
  static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};
