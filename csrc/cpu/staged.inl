// The second product for more rows of x than a few, on AVX-512: batch rows are the lanes of a vector (Layout in isa.h).
// Included by avx512.cpp and avx512bf16.cpp after panel.inl.
//
// A dot product of `rank` terms ends in additions across a vector; at rank 64 these cost as much as the products. Here
// a tile of 16 outputs is a tile of 16 sums, one vector each, whose lanes are the rows: no additions across. A weight
// is needed in all lanes at once, in fp32, so a panel of 16 weight rows is first widened into a buffer in the first
// cache, once for all rows; FMAs broadcast from there for nothing.
//
// Nothing is saved by bf16 dot instructions here: t would have to be split into two bf16 parts, so that it keeps 16
// bits, and two dot instructions for 32 weights take as long as the two FMAs (both start twice a cycle on Zen 5).

// Columns that are widened at a time: 16 rows of them and t's part fit a first cache of 32 KiB with room to spare.
constexpr std::int64_t kStage = 128;
// Beside each row of the buffer, so that its rows do not fall into one set of the cache.
constexpr std::int64_t kStagePad = 16;
constexpr int kStageRows = 16;

// Widens `columns` columns of 16 weight rows into the buffer.
template <class T>
inline void stage(const T* weights, std::int64_t stride, int count, std::int64_t columns, float* buffer) {
  for (int i = 0; i < kStageRows; ++i) {
    // rows that are not there: the last one again
    const T* row = weights + (i < count ? i : count - 1) * stride;
    float* out = buffer + i * (kStage + kStagePad);
    for (std::int64_t j = 0; j < columns; j += kStep) {
      const typename Arch::Pair pair =
          j + kStep <= columns ? Arch::load(row + j) : Arch::load_tail(row + j, columns - j);
      Arch::store16(out + j, pair.a);
      Arch::store16(out + j + Arch::kWidth, pair.b);
    }
  }
}

// sums += t * buffer over `places` places. The next panel, `next`, is asked for a little at every step: all of it at
// once would wait for the few places that a core has for lines on their way.
template <class T>
inline void multiply(const float* t, const float* buffer, std::int64_t places, const T* next,
                     typename Arch::Vec (&sums)[kStageRows]) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  // Copies of its own, which stay in registers: of sums that lie in an array of the caller's, compilers write every one
  // back at every step.
  typename Arch::Vec own[kStageRows];
  for (int i = 0; i < kStageRows; ++i) own[i] = sums[i];
  for (std::int64_t j = 0; j < places; ++j) {
    const typename Arch::Vec rows = Arch::load16(t + j * Layout::kLanes);
    if (next && j * kStageRows % kLine == 0) Arch::prefetch(next + j * kStageRows);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 16
#endif
    for (int i = 0; i < kStageRows; ++i)
      own[i] = Arch::fma(rows, Arch::broadcast(buffer + i * (kStage + kStagePad) + j), own[i]);
  }
  for (int i = 0; i < kStageRows; ++i) sums[i] = own[i];
}

template <class T>
void staged_product(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  using Vec = typename Arch::Vec;
  constexpr int kGroups = static_cast<int>(kRowBlock / Layout::kLanes);
  alignas(64) float buffer[kStageRows * (kStage + kStagePad)];
  const int groups = static_cast<int>((p.rows + Layout::kLanes - 1) / Layout::kLanes);
  const T* const u = static_cast<const T*>(p.u);
  const std::int64_t group_stride = p.layout.stride * Layout::kLanes;

  for (std::int64_t m = begin; m < end; m += kStageRows) {
    const int count = static_cast<int>(end - m < kStageRows ? end - m : kStageRows);
    const T* const panel = u + m * p.u_stride;
    const T* const next = panel + kStageRows * p.u_stride;
    Vec sums[kGroups][kStageRows];
    for (int g = 0; g < groups; ++g)
      for (int i = 0; i < kStageRows; ++i) sums[g][i] = Arch::zero();
    for (std::int64_t start = 0; start < p.rank; start += kStage) {
      const std::int64_t columns = p.rank - start < kStage ? p.rank - start : kStage;
      stage(panel + start, p.u_stride, count, columns, buffer);
      for (int g = 0; g < groups; ++g)
        multiply(p.t + g * group_stride + start * Layout::kLanes, buffer, (columns + kStep - 1) / kStep * kStep,
                 g == 0 ? next + start * kStageRows : nullptr, sums[g]);
    }
    for (int g = 0; g < groups; ++g) store_tile<T, 1>(p, g * Layout::kLanes, m, count, sums[g]);
  }
}
