// The two products for many rows (ManyRows in isa.h), on AVX-512 with bf16 dot products. Included by avx512bf16.cpp after
// panel.inl.
//
// Batch rows are the lanes of a vector, a pair of neighbouring columns in each (Packing in isa.h). A weight row lies in
// memory as pairs of columns already, so each pair is broadcast from where it is to all rows: weights are neither copied
// nor rearranged, which a library's product does at every call. A tile is kOutputs weight rows by kGroups groups of 16
// batch rows, all of whose sums stay in registers over all columns. The intermediate leaves the first product rounded and
// packed, as the second one reads it.

// Columns of packed vectors that go through all weight rows together: of kRowBlock rows they take 3/4 of a second cache of
// 1 MiB.
constexpr std::int64_t kManyColumns = 6144;

// sums += w x for the pair j of columns, whose rows are `rows`
template <int kOutputs, int kGroups>
inline void many_dot(const __m512bh (&rows)[kGroups], const BF16* const (&w)[kOutputs], std::int64_t j,
                     __m512 (&sums)[kOutputs][kGroups]) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 8
#endif
  for (int i = 0; i < kOutputs; ++i) {
    int pair;
    __builtin_memcpy(&pair, w[i] + 2 * j, 4);
    const __m512bh weight = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
    for (int g = 0; g < kGroups; ++g) sums[i][g] = _mm512_dpbf16_ps(sums[i][g], rows[g], weight);
  }
}

// sums[i][g] += dot products of weight row i with the rows of group g. The weights `ahead` elements further on, those of the
// next tile, are asked for into the second cache meanwhile: a line of each row for 16 pairs.
template <int kOutputs, int kGroups>
inline void many_dots(const std::uint32_t* x, std::int64_t lanes, const BF16* const (&w)[kOutputs], std::int64_t columns,
                      std::int64_t ahead, __m512 (&sums)[kOutputs][kGroups]) {
  const std::int64_t pairs = columns / 2;
  const auto ask = [&](std::int64_t j) {
    if (j % 16 == 0)
      for (int i = 0; i < kOutputs; ++i) _mm_prefetch(reinterpret_cast<const char*>(w[i] + 2 * j + ahead), _MM_HINT_T1);
  };
  const auto load = [&](std::int64_t j, __m512bh(&rows)[kGroups]) {
    for (int g = 0; g < kGroups; ++g)
      rows[g] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + j * lanes + g * kGroup));
  };
  std::int64_t j = 0;
  __m512bh rows[kGroups];
  if constexpr (kGroups == 1) {  // too few sums to hide a dot product's latency: every second pair has its own
    __m512 others[kOutputs][1];
    for (int i = 0; i < kOutputs; ++i) others[i][0] = Arch::zero();
    for (; j + 2 <= pairs; j += 2) {
      ask(j);
      __m512bh next[1];
      load(j, rows);
      load(j + 1, next);
      many_dot(rows, w, j, sums);
      many_dot(next, w, j + 1, others);
    }
    for (int i = 0; i < kOutputs; ++i) sums[i][0] = Arch::add(sums[i][0], others[i][0]);
  }
  for (; j < pairs; ++j) {
    ask(j);
    load(j, rows);
    many_dot(rows, w, j, sums);
  }
  if (columns % 2) {  // a pair whose second half is not there: in x it is zero
    load(pairs, rows);
    for (int i = 0; i < kOutputs; ++i) {
      const __m512bh weight = reinterpret_cast<__m512bh>(_mm512_set1_epi32(w[i][2 * pairs].bits));
      for (int g = 0; g < kGroups; ++g) sums[i][g] = _mm512_dpbf16_ps(sums[i][g], rows[g], weight);
    }
  }
}

// Weight rows of a tile: 16 to 24 sums, which hide the latency of a dot product and leave registers for the rest.
constexpr int outputs_for(int groups) { return groups == 4 ? 4 : 8; }

// emit(m, count, sums): of weight rows m to m + count, count at most outputs_for(kGroups). Where there are more columns
// than the second cache holds of x, sums wait in `partial`, [weight rows, lanes], while the next columns come in; they are
// there from before where the sweep `resumes`, and stay there where it `waits` for a further one.
template <int kGroups, class Emit>
inline void many_sweep(const void* weights, std::int64_t stride, std::int64_t begin, std::int64_t end,
                       const std::uint32_t* x, std::int64_t lanes, std::int64_t columns, float* partial, bool resumes,
                       bool waits, Emit emit) {
  constexpr int kOutputs = outputs_for(kGroups);
  std::int64_t start = 0;
  do {  // sums of nothing are results, too
    const bool last = start + kManyColumns >= columns;
    for (std::int64_t m = begin; m < end; m += kOutputs) {
      const int count = static_cast<int>(end - m < kOutputs ? end - m : kOutputs);
      const BF16* w[kOutputs];
      for (int i = 0; i < kOutputs; ++i)  // rows that are not there: the last one again
        w[i] = static_cast<const BF16*>(weights) + (m + (i < count ? i : count - 1)) * stride + start;
      __m512 sums[kOutputs][kGroups];
      for (int i = 0; i < kOutputs; ++i)
        for (int g = 0; g < kGroups; ++g)
          sums[i][g] = (start || resumes) && i < count ? Arch::load16(partial + (m + i) * lanes + g * kGroup) : Arch::zero();
      many_dots<kOutputs, kGroups>(x + start / 2 * lanes, lanes, w, last ? columns - start : kManyColumns,
                                   kOutputs * stride, sums);
      if (last && !waits) {
        emit(m, count, sums);
      } else {
        for (int i = 0; i < count; ++i)
          for (int g = 0; g < kGroups; ++g) Arch::store16(partial + (m + i) * lanes + g * kGroup, sums[i][g]);
      }
    }
    start += kManyColumns;
  } while (start < columns);
}

// two vectors of sums, rounded, side by side
inline __m512i pair_of(__m512 first, __m512 second) {
  return _mm512_or_si512(Arch::rounded_bf16(first), _mm512_slli_epi32(Arch::rounded_bf16(second), 16));
}

// The same by the instruction for it, for sums of dot products alone: those have no subnormal numbers, which it drops.
inline __m512i pair_of_dots(__m512 first, __m512 second) {
  alignas(64) static constexpr std::uint16_t kSideBySide[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kSideBySide), halves);
}

// A single group adds two sums of dot products (many_dots).
constexpr bool of_dots(int groups) { return groups > 1; }

template <int kGroups>
inline void many_first_of(const ManyFirst& p, std::int64_t begin, std::int64_t end) {
  many_sweep<kGroups>(p.v, p.v_stride, begin, end, p.x, p.lanes, p.in, p.partial, p.resumes, p.waits,
                      [&](std::int64_t m, int count, auto& sums) {
    for (int i = 0; i < count; i += 2) {
      std::uint32_t* const at = p.t + (m + i) / 2 * p.lanes;
      for (int g = 0; g < kGroups; ++g) {
        __m512 first = sums[i][g], second = i + 1 < count ? sums[i + 1][g] : Arch::zero();
        if (of_dots(kGroups) && !p.onto) {
          _mm512_storeu_si512(at + g * kGroup, pair_of_dots(first, second));
          continue;
        }
        if (p.onto) {
          const Arch::Pair there = Arch::widen_bf16(_mm512_loadu_si512(at + g * kGroup));
          first = Arch::add(first, there.a);
          second = Arch::add(second, there.b);
        }
        _mm512_storeu_si512(at + g * kGroup, pair_of(first, second));
      }
    }
  });
}

// A row's results leave by whole lines of the cache.
constexpr int kLeaving = 32;

// y of 32 outputs, as pairs of neighbours with the rows in lanes: [kGroup pairs, lanes]
template <int kGroups>
inline void leave_pairs(const SecondProduct& to, const std::uint32_t (&pairs)[kGroup][kGroups * kGroup],
                        std::int64_t first, int count) {
  const __mmask32 there = count < kLeaving ? Arch::first_of_32(count) : ~__mmask32{0};
  for (int g = 0; g < kGroups && g * kGroup < to.rows; ++g) {
    Arch::Vec rows[kGroup];
    for (int i = 0; i < kGroup; ++i) rows[i] = _mm512_castsi512_ps(_mm512_load_si512(&pairs[i][g * kGroup]));
    Arch::transpose(rows);
    for (int r = 0; r < kGroup && g * kGroup + r < to.rows; ++r) {
      BF16* const y = static_cast<BF16*>(to.y) + (g * kGroup + r) * to.y_stride + first;
      _mm512_mask_storeu_epi16(y, there, _mm512_castps_si512(rows[r]));
    }
  }
}

// As finish(), for sums whose rows are in lanes; a residual is read row by row.
template <int kGroups>
inline void many_second_of(const ManySecond& p, std::int64_t begin, std::int64_t end) {
  const SecondProduct& to = p.product;
  const BF16* const bias = static_cast<const BF16*>(to.bias);
  const BF16* const residual = static_cast<const BF16*>(to.residual);
  alignas(64) std::uint32_t pairs[kGroup][kGroups * kGroup];
  alignas(64) std::uint32_t added[kGroup][kGroups * kGroup];  // the residual's pairs
  Arch::Vec scale[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    const std::int64_t left = to.rows - g * kGroup;
    const __mmask16 rows = left >= kGroup ? 0xffff : static_cast<__mmask16>(Arch::first_of_32(left < 0 ? 0 : left));
    scale[g] = to.scale ? _mm512_maskz_loadu_ps(rows, to.scale + g * kGroup) : _mm512_set1_ps(1.0f);
  }
  const bool plain = of_dots(kGroups) && !to.scale && !bias && !residual;
  many_sweep<kGroups>(to.u, to.u_stride, begin, end, p.t, p.lanes, to.rank, p.partial, false, false,
                      [&](std::int64_t m, int count, auto& sums) {
    const int at = static_cast<int>((m - begin) % kLeaving);
    if (residual && at == 0) {
      const std::int64_t outputs = end - m < kLeaving ? end - m : kLeaving;
      pack_places<BF16>({residual + m, to.residual_stride, to.rows, outputs, &added[0][0], kGroups * kGroup}, 0,
                (outputs + 1) / 2);
    }
    for (int i = 0; i < count; i += 2) {
      const bool both = i + 1 < count;
      if (plain) {
        for (int g = 0; g < kGroups; ++g)
          _mm512_store_si512(&pairs[(at + i) / 2][g * kGroup],
                             pair_of_dots(sums[i][g], both ? sums[i + 1][g] : Arch::zero()));
        continue;
      }
      const Arch::Vec first_bias = _mm512_set1_ps(bias ? to_float(bias[m + i]) : 0.0f);
      const Arch::Vec second_bias = _mm512_set1_ps(bias && both ? to_float(bias[m + i + 1]) : 0.0f);
      for (int g = 0; g < kGroups; ++g) {
        Arch::Vec first = Arch::mul(sums[i][g], scale[g]);
        Arch::Vec second = both ? Arch::mul(sums[i + 1][g], scale[g]) : Arch::zero();
        if (bias) {
          first = Arch::add(first, first_bias);
          second = Arch::add(second, second_bias);
        }
        if (residual) {
          const Arch::Pair there = Arch::widen_bf16(_mm512_load_si512(&added[(at + i) / 2][g * kGroup]));
          first = Arch::add(first, there.a);
          second = Arch::add(second, there.b);
        }
        _mm512_store_si512(&pairs[(at + i) / 2][g * kGroup], pair_of(first, second));
      }
    }
    if (at + count == kLeaving || m + count == end) leave_pairs<kGroups>(to, pairs, m - at, at + count);
  });
}

inline void many_first(const ManyFirst& p, std::int64_t begin, std::int64_t end) {
  switch (p.lanes / kGroup) {
    case 1: many_first_of<1>(p, begin, end); break;
    case 2: many_first_of<2>(p, begin, end); break;
    case 3: many_first_of<3>(p, begin, end); break;
    default: many_first_of<4>(p, begin, end); break;
  }
}

inline void many_second(const ManySecond& p, std::int64_t begin, std::int64_t end) {
  switch (p.lanes / kGroup) {
    case 1: many_second_of<1>(p, begin, end); break;
    case 2: many_second_of<2>(p, begin, end); break;
    case 3: many_second_of<3>(p, begin, end); break;
    default: many_second_of<4>(p, begin, end); break;
  }
}

constexpr ManyRows kManyRowsBf16 = {2, kManyColumns, 16, pack_places<BF16>, many_first, many_second};
