// Rows of x side by side, packed into places of 32 bits (Packing in isa.h), on AVX-512. Included after avx512.inl.

// 8 rows of 8 doubles become columns
inline void transpose_8(__m512d (&a)[8]) {
  __m512d b[8], c[8];
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_pd(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_pd(a[i], a[i + 1]);
  }
  // b[2 i + j]: column j of each 128-bit lane, of rows 2 i and 2 i + 1
  for (int j = 0; j < 2; ++j) {
    c[j] = _mm512_shuffle_f64x2(b[j], b[j + 2], 0x88);
    c[j + 2] = _mm512_shuffle_f64x2(b[j], b[j + 2], 0xdd);
    c[j + 4] = _mm512_shuffle_f64x2(b[j + 4], b[j + 6], 0x88);
    c[j + 6] = _mm512_shuffle_f64x2(b[j + 4], b[j + 6], 0xdd);
  }
  for (int j = 0; j < 2; ++j) {
    a[j] = _mm512_shuffle_f64x2(c[j], c[j + 4], 0x88);
    a[j + 4] = _mm512_shuffle_f64x2(c[j], c[j + 4], 0xdd);
    a[j + 2] = _mm512_shuffle_f64x2(c[j + 2], c[j + 6], 0x88);
    a[j + 6] = _mm512_shuffle_f64x2(c[j + 2], c[j + 6], 0xdd);
  }
}

// Columns from `at` on of a row of which `columns` are left, as a vector; zeros behind the last one.
inline Arch::Vec vector_of(const BF16* at, std::int64_t columns) {
  const __mmask32 there = columns >= 32 ? ~__mmask32{0} : Arch::first_of_32(columns);
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, at));
}
inline Arch::Vec vector_of(const float* at, std::int64_t columns) {
  const __mmask32 there = columns >= 16 ? ~__mmask32{0} : Arch::first_of_32(columns);
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), at);
}

// Places [begin, end), begin a multiple of kGroup
template <class T>
inline void pack_places(const Packing& p, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kWidth = 4 / static_cast<std::int64_t>(sizeof(T));  // columns of a place
  const T* const x = static_cast<const T*>(p.x);
  const auto row = [&](std::int64_t r, std::int64_t place) {
    if (r >= p.rows) return Arch::zero();
    const T* const at = x + r * p.x_stride + kWidth * place;
    Arch::prefetch(at + 2 * kWidth * kGroup);
    return vector_of(at, p.columns - kWidth * place);
  };
  for (std::int64_t j = begin; j < end; j += kGroup) {
    const int places = static_cast<int>(end - j < kGroup ? end - j : kGroup);
    if (p.lanes == kHalfGroup) {
      __m512d tile[8];
      for (int i = 0; i < 8; ++i) tile[i] = _mm512_castps_pd(row(i, j));
      transpose_8(tile);
      for (int i = 0; 2 * i < places; ++i)
        _mm512_storeu_pd(reinterpret_cast<double*>(p.places + (j + 2 * i) * kHalfGroup), tile[i]);
      continue;
    }
    for (std::int64_t g = 0; g < p.lanes; g += kGroup) {
      Arch::Vec tile[kGroup];
      for (int i = 0; i < kGroup; ++i) tile[i] = row(g + i, j);
      Arch::transpose(tile);
      for (int i = 0; i < places; ++i) _mm512_storeu_ps(reinterpret_cast<float*>(p.places + (j + i) * p.lanes + g), tile[i]);
    }
  }
}
