// Both products for a few rows of x, at most 16, on AVX-512: batch rows are the lanes of a vector (Layout::kPlaces in isa.h)
// and weights are broadcast to them from where they lie. Included after panel.inl, tile.inl and places.inl.
//
// A dot product along the columns ends in additions across a vector, which at rank 64 cost more than its products; its
// vectors serve four weight rows only, and x goes through the first cache again for each four. Here a tile of 16 outputs is
// a tile of 16 sums, one vector each, whose lanes are the rows, and a vector in places serves eight weight rows.
//
// Of eight rows and fewer a vector holds twice as many columns of each (kFold = 2), and a broadcast is of twice as many
// weights: half as many instructions for as many weights. Sums come in two parts, side by side, which are added at the end.

struct BroadcastF32 {
  using T = float;
  using Rows = __m512;
  static constexpr int kColumns = 1;  // of a lane
  // kColumns * kFold neighbours from p on, in all lanes
  template <int kFold>
  static inline __m512 weights(const float* p) {
    if constexpr (kFold == 1) return _mm512_set1_ps(*p);
    double two;
    __builtin_memcpy(&two, p, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(two));
  }
  static inline Rows rows(const void* t) { return _mm512_loadu_ps(t); }
  static inline __m512 mac(__m512 sum, Rows rows, __m512 weights) { return _mm512_fmadd_ps(rows, weights, sum); }
};

constexpr int kFewOutputs = 16, kFewHalf = 8;  // twice as many sums as kFewHalf hide the latency of a product

// Weights are asked for so many bytes ahead, in whole rows of them; or, where eight rows are so long that they and a vector
// in places would not fit a second cache of 1 MiB, further along the same rows. Two Zen 4 cores, 16 rows: without, a quarter
// slower at 4096 columns; whole rows of 28672 columns instead of along them, a third slower.
constexpr std::int64_t kFewAheadBytes = 16 * 1024, kFewMostBytes = 192 * 1024, kFewAlongBytes = 2048;

// How many elements ahead that is, for rows `stride` elements apart
template <class T>
inline std::int64_t few_ahead(std::int64_t stride) {
  constexpr std::int64_t kSize = static_cast<std::int64_t>(sizeof(T));
  const std::int64_t half_tile = kFewHalf * stride, bytes = half_tile * kSize;
  if (bytes <= 0) return 0;
  if (bytes > kFewMostBytes) return kFewAlongBytes / kSize;
  return (kFewAheadBytes + bytes - 1) / bytes * half_tile;
}

// sums[i] = products with weight row i of a vector in places. Weights `ahead` elements further on are asked for.
template <class Ops, int kFold>
inline void few_products(const typename Ops::T* t, const typename Ops::T* const (&w)[kFewHalf], std::int64_t columns,
                         std::int64_t ahead, typename Arch::Vec* sums) {
  using T = typename Ops::T;
  constexpr std::int64_t kAcross = Ops::kColumns * kFold;                    // columns of a vector of t
  constexpr std::int64_t kVector = 64 / static_cast<std::int64_t>(sizeof(T));  // its elements, and those of a line
  Arch::Vec even[kFewHalf], odd[kFewHalf];
#pragma GCC unroll 8
  for (int i = 0; i < kFewHalf; ++i) even[i] = odd[i] = Arch::zero();
  std::int64_t j = 0;
  const auto step = [&] {
    const typename Ops::Rows first = Ops::rows(t), second = Ops::rows(t + kVector);
#pragma GCC unroll 8
    for (int i = 0; i < kFewHalf; ++i) {
      even[i] = Ops::mac(even[i], first, Ops::template weights<kFold>(w[i] + j));
      odd[i] = Ops::mac(odd[i], second, Ops::template weights<kFold>(w[i] + j + kAcross));
    }
    j += 2 * kAcross, t += 2 * kVector;
  };
  // A line of each weight row at a time. Meanwhile those of the next rows are asked for, a few at every step: all at once
  // would wait for the few places that a core has for lines on their way.
  constexpr int kSteps = kVector / (2 * kAcross), kAsked = kFewHalf / kSteps;
  static_assert(kSteps * kAsked == kFewHalf, "a line of each row for a line of each row");
  while (j + kVector <= columns) {
    const std::int64_t next = j + ahead;
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 2
      for (int i = 0; i < kAsked; ++i) Arch::prefetch(w[s * kAsked + i] + next);
      step();
    }
  }
  while (j + 2 * kAcross <= columns) step();
  for (; j < columns; j += kAcross, t += kVector) {
    const typename Ops::Rows rows = Ops::rows(t);
#pragma GCC unroll 8
    for (int i = 0; i < kFewHalf; ++i) {
      T last[kAcross] = {};  // in t what is not there is zero; here it could be anything
      for (std::int64_t k = 0; k < kAcross && j + k < columns; ++k) last[k] = w[i][j + k];
      even[i] = Ops::mac(even[i], rows, Ops::template weights<kFold>(last));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kFewHalf; ++i) sums[i] = Arch::add(even[i], odd[i]);
}

// emit(m, count, sums): of weight rows m to m + count, their products with vectors in places
template <class Ops, int kFold, class Emit>
inline void few_sweep(const void* weights, std::int64_t stride, std::int64_t begin, std::int64_t end, const void* places,
                      std::int64_t columns, Emit emit) {
  using T = typename Ops::T;
  const std::int64_t ahead = few_ahead<T>(stride);
  for (std::int64_t m = begin; m < end; m += kFewOutputs) {
    const int count = static_cast<int>(end - m < kFewOutputs ? end - m : kFewOutputs);
    Arch::Vec sums[kFewOutputs];
    for (int half = 0; half < kFewOutputs; half += kFewHalf) {
      const T* w[kFewHalf];
      for (int i = 0; i < kFewHalf; ++i)  // rows that are not there: the last one again
        w[i] = static_cast<const T*>(weights) + (m + (half + i < count ? half + i : count - 1)) * stride;
      few_products<Ops, kFold>(static_cast<const T*>(places), w, columns, ahead, sums + half);
    }
    emit(m, count, sums);
  }
}

template <class Ops, int kFold>
inline void few_first(const FirstProduct& p, std::int64_t begin, std::int64_t end) {
  using T = typename Ops::T;
  few_sweep<Ops, kFold>(p.v, p.v_stride, begin, end, p.x, p.in, [&](std::int64_t m, int count, auto& sums) {
    each_row<kFold>(sums, p.rows, [&](int r, Arch::Vec row) {
      alignas(64) float values[kFewOutputs];
      Arch::store16(values, row);
      keep<T>(p, r, m, values, count);
    });
  });
}

template <class Ops, int kFold>
inline void few_second(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  few_sweep<Ops, kFold>(p.u, p.u_stride, begin, end, p.t, p.rank, [&](std::int64_t m, int count, auto& sums) {
    store_tile<typename Ops::T, kFold>(p, 0, m, count, sums);
  });
}

struct NoPlaces {};
template <class Ops>
constexpr bool kHasPlaces = true;
template <>
constexpr bool kHasPlaces<NoPlaces> = false;

// Ops: how t in places is multiplied, where the driver chooses that for T
template <class T, class Ops = NoPlaces>
void second_product_any(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  if constexpr (kHasPlaces<Ops>)
    if (p.layout.kind == Layout::kPlaces)
      return p.layout.lanes == Layout::kHalfLanes ? few_second<Ops, 2>(p, begin, end) : few_second<Ops, 1>(p, begin, end);
  if (p.layout.kind == Layout::kGroups)
    staged_product<T>(p, begin, end);
  else
    second_product<T>(p, begin, end);
}

// The same of the first product, for x in places. FewOps multiplies them, Ops x in rows.
template <class T, class Ops, class FewOps>
void first_product_any(const FirstProduct& p, std::int64_t begin, std::int64_t end) {
  if (p.x_lanes == Layout::kHalfLanes)
    few_first<FewOps, 2>(p, begin, end);
  else if (p.x_lanes == Layout::kLanes)
    few_first<FewOps, 1>(p, begin, end);
  else
    first_product<Ops, T>(p, begin, end);
}
