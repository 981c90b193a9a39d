// Four floats at a time on x86 with AVX2 and F16C: what a panel's sums go through on their way out.
// Included inside the Arch of avx2.cpp and avx512.inl.

using Quad = __m128;
static inline Quad quad_scale(Quad q, float s) { return _mm_mul_ps(q, _mm_set1_ps(s)); }
static inline Quad quad_add(Quad p, Quad q) { return _mm_add_ps(p, q); }

static inline Quad quad_load(const float* p) { return _mm_loadu_ps(p); }
static inline Quad quad_load(const F16* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline Quad quad_load(const BF16* p) {
  const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), four));
}

static inline void quad_store(float* p, Quad q) { _mm_storeu_ps(p, q); }
static inline void quad_store(F16* p, Quad q) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(q, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void quad_store(BF16* p, Quad q) {
  // To nearest, ties to even, on the integer side; a nan keeps its upper half and one quiet bit.
  const __m128i bits = _mm_castps_si128(q);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd), 16);
  const __m128i quiet = _mm_or_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(0x40));
  const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(q, q));
  const __m128i chosen = _mm_blendv_epi8(rounded, quiet, nan);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(chosen, chosen));
}

// 256-bit halves of four vectors, already folded, to four sums
static inline Quad reduce4_256(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}
