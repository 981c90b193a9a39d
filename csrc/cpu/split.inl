// Split in isa.h on AVX-512: 16 columns at a time are compressed, once by their mask and once by its opposite. (Words could
// be compressed 32 at a time, but not on every CPU that has the rest; this waits for memory already.)
// Included after avx512.inl.

inline __m512i load_columns(const std::uint16_t* x, __mmask16 there) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x));
}
inline __m512i load_columns(const std::uint32_t* x, __mmask16 there) { return _mm512_maskz_loadu_epi32(there, x); }

inline void store_columns(std::uint16_t* to, __mmask16 there, __m512i columns) {
  _mm256_mask_storeu_epi16(to, there, _mm512_cvtepi32_epi16(columns));
}
inline void store_columns(std::uint32_t* to, __mmask16 there, __m512i columns) {
  _mm512_mask_storeu_epi32(to, there, columns);
}

// All columns that there is room for are written; those that were not meant are written again by who comes next.
template <class Element>
inline void put_columns(Element* row, std::int64_t at, std::int64_t width, __m512i columns) {
  const std::int64_t room = width - at;
  store_columns(row + at, room >= 16 ? 0xffff : static_cast<__mmask16>((1u << room) - 1), columns);
}

template <class Element>
void split_rows(const Split& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const Element* const x = static_cast<const Element*>(p.x) + r * p.x_stride;
    Element* const first = static_cast<Element*>(p.first) + r * p.first_stride;
    Element* const rest = static_cast<Element*>(p.rest) + r * p.rest_stride;
    std::int64_t of_first = 0, of_rest = 0;
    for (std::int64_t j = 0; j < p.width; j += 16) {
      const std::int64_t left = p.width - j;
      const unsigned there = left >= 16 ? 0xffffu : (1u << left) - 1;
      const unsigned mask = p.masks[j / 16];
      const __m512i columns = load_columns(x + j, static_cast<__mmask16>(there));
      put_columns(first, of_first, p.rank, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), columns));
      put_columns(rest, of_rest, p.width - p.rank,
                  _mm512_maskz_compress_epi32(static_cast<__mmask16>(there & ~mask), columns));
      of_first += __builtin_popcount(mask);
      of_rest += __builtin_popcount(there & ~mask);
    }
  }
}
