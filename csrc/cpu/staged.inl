// The second product for five rows of x and more, on AVX-512: batch rows are the lanes of a vector (Layout in isa.h).
// Included by avx512.cpp and avx512bf16.cpp after panel.inl.
//
// A dot product of `rank` terms ends in additions across a vector; at rank 64 these cost as much as the products. Here
// a tile of 16 outputs is a tile of 16 sums, one vector each, whose lanes are the rows: no additions across. A weight
// is needed in all lanes at once, in fp32, so a panel of 16 weight rows is first widened into a buffer in the first
// cache, once for all rows; FMAs broadcast from there for nothing.
//
// bf16 dot instructions (t split into two bf16 parts, so that it keeps 16 bits) were measured here, too: one of them
// takes as long as two FMAs on Zen 5, and two are needed. They lose by half.

// Columns that are widened at a time: 16 rows of them and t's part fit a first cache of 32 KiB with room to spare.
constexpr std::int64_t kStage = 128;
// Beside each row of the buffer, so that its rows do not fall into one set of the cache.
constexpr std::int64_t kStagePad = 16;
constexpr int kStageRows = 16;

template <class T, int kFold>
void staged_product(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  using Vec = typename Arch::Vec;
  constexpr int kLanes = Arch::kWidth, kGroupRows = kLanes / kFold;
  constexpr int kGroups = static_cast<int>(kRowBlock) / kGroupRows;
  alignas(64) float buffer[kStageRows * (kStage + kStagePad)];
  Vec sums[kGroups][kStageRows];
  const int groups = static_cast<int>((p.rows + kGroupRows - 1) / kGroupRows);
  const T* const u = static_cast<const T*>(p.u);

  for (std::int64_t m = begin; m < end; m += kStageRows) {
    const int count = static_cast<int>(end - m < kStageRows ? end - m : kStageRows);
    for (int g = 0; g < groups; ++g)
      for (int i = 0; i < kStageRows; ++i) sums[g][i] = Arch::zero();
    for (std::int64_t start = 0; start < p.rank; start += kStage) {
      const std::int64_t columns = p.rank - start < kStage ? p.rank - start : kStage;
      for (int i = 0; i < kStageRows; ++i) {
        // rows that are not there: the last one again
        const T* row = u + (m + (i < count ? i : count - 1)) * p.u_stride + start;
        float* out = buffer + i * (kStage + kStagePad);
        std::int64_t j = 0;
        for (; j + kStep <= columns; j += kStep) {
          const typename Arch::Pair pair = Arch::load(row + j);
          Arch::store16(out + j, pair.a);
          Arch::store16(out + j + kLanes, pair.b);
        }
        if (j < columns) {
          const typename Arch::Pair pair = Arch::load_tail(row + j, columns - j);
          Arch::store16(out + j, pair.a);
          Arch::store16(out + j + kLanes, pair.b);
        }
      }
      const std::int64_t places = (columns + kStep - 1) / kStep * kStep;
      // The next panel is asked for a little at every step, while this one is computed: all of it at once would wait
      // for the few places that a core has for lines on their way.
      const T* const next = u + (m + kStageRows) * p.u_stride + start * kStageRows;
      for (int g = 0; g < groups; ++g) {
        const float* t = p.t + g * p.layout.stride * kGroupRows + start * kGroupRows;
        Vec acc[kStageRows];
        for (int i = 0; i < kStageRows; ++i) acc[i] = sums[g][i];
        for (std::int64_t j = 0; j < places; j += kFold) {
          const Vec rows = Arch::load16(t + j * kGroupRows);
          if (g == 0 && (j * kStageRows * static_cast<std::int64_t>(sizeof(T))) % 64 == 0)
            Arch::prefetch(next + j * kStageRows);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 16
#endif
          for (int i = 0; i < kStageRows; ++i)
            acc[i] = Arch::fma(rows, Arch::template broadcast<kFold>(buffer + i * (kStage + kStagePad) + j), acc[i]);
        }
        for (int i = 0; i < kStageRows; ++i) sums[g][i] = acc[i];
      }
    }
    for (int g = 0; g < groups; ++g) {
      Arch::transpose(sums[g]);
      for (int i = 0; i < kGroupRows && g * kGroupRows + i < p.rows; ++i) {
        alignas(64) float values[kStageRows];
        Vec row = sums[g][i * kFold];
        if constexpr (kFold == 2) row = Arch::add(row, sums[g][i * kFold + 1]);
        Arch::store16(values, row);
        finish<T>(p, g * kGroupRows + i, m, values, count);
      }
    }
  }
}

template <class T>
void second_product_either(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  if (p.layout.lanes == 0)
    second_product<T>(p, begin, end);
  else if (p.layout.fold == 2)
    staged_product<T, 2>(p, begin, end);
  else
    staged_product<T, 1>(p, begin, end);
}
