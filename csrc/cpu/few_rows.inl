// The second product for up to 16 rows of x, on AVX-512: batch rows are the lanes of a vector (Layout::kPlaces in isa.h) and
// weights are broadcast to them from where they lie. Included after tile.inl and staged.inl.
//
// A dot product along the columns ends in additions across a vector, which at rank 64 cost more than its products, and its
// vectors of t serve four weight rows only. Here a tile of 16 outputs is a tile of 16 sums, one vector each, whose lanes are
// the rows, and t stays in the first cache. (Of the first product's x 16 rows do not: there dot products are faster.)
//
// Of eight rows and fewer a vector holds twice as many columns of each (kFold = 2), and a broadcast is of twice as many
// weights: half as many instructions for as many weights. Sums come in two parts, side by side, which are added at the end.

struct BroadcastF32 {
  using T = float;
  using Rows = __m512;
  static constexpr int kColumns = 1;  // of a lane
  // Broadcasts of two weights gain nothing here: those of one are part of the FMA.
  static constexpr bool kFolds = false;
  // kColumns * kFold neighbours from p on, in all lanes
  template <int kFold>
  static inline __m512 weights(const float* p) { return _mm512_set1_ps(*p); }
  static inline Rows rows(const void* t) { return _mm512_loadu_ps(t); }
  static inline __m512 mac(__m512 sum, Rows rows, __m512 weights) { return _mm512_fmadd_ps(rows, weights, sum); }
};

constexpr int kFewOutputs = 16, kFewHalf = 8;  // twice as many sums as kFewHalf hide the latency of a product

// Bytes ahead of the rows that are multiplied, which lie one behind the other, that are asked for
constexpr std::int64_t kFewAheadBytes = 16384;

// sums[i] = products of t with weight row i
template <class Ops, int kFold>
inline void few_products(const typename Ops::T* t, const typename Ops::T* const (&w)[kFewHalf], std::int64_t columns,
                         typename Arch::Vec* sums) {
  using T = typename Ops::T;
  constexpr std::int64_t kAcross = Ops::kColumns * kFold;                    // columns of a vector of t
  constexpr std::int64_t kVector = 64 / static_cast<std::int64_t>(sizeof(T));  // its elements, and those of a line
  const T* const ahead = w[0] + kFewAheadBytes / static_cast<std::int64_t>(sizeof(T));
  Arch::Vec even[kFewHalf], odd[kFewHalf];
#pragma GCC unroll 8
  for (int i = 0; i < kFewHalf; ++i) even[i] = odd[i] = Arch::zero();
  std::int64_t j = 0;
  for (; j + 2 * kAcross <= columns; j += 2 * kAcross, t += 2 * kVector) {
#pragma GCC unroll 2
    for (std::int64_t line = 0; line < 2 * kAcross * kFewHalf; line += kVector)
      Arch::prefetch(ahead + j * kFewHalf + line);
    const typename Ops::Rows first = Ops::rows(t), second = Ops::rows(t + kVector);
#pragma GCC unroll 8
    for (int i = 0; i < kFewHalf; ++i) {
      even[i] = Ops::mac(even[i], first, Ops::template weights<kFold>(w[i] + j));
      odd[i] = Ops::mac(odd[i], second, Ops::template weights<kFold>(w[i] + j + kAcross));
    }
  }
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

template <class Ops, int kFold>
inline void few_rows_product(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  using T = typename Ops::T;
  const T* const u = static_cast<const T*>(p.u);
  const T* const t = reinterpret_cast<const T*>(p.t);
  for (std::int64_t m = begin; m < end; m += kFewOutputs) {
    const int count = static_cast<int>(end - m < kFewOutputs ? end - m : kFewOutputs);
    Arch::Vec sums[kFewOutputs];
    for (int half = 0; half < kFewOutputs; half += kFewHalf) {
      const T* w[kFewHalf];
      for (int i = 0; i < kFewHalf; ++i)  // rows that are not there: the last one again
        w[i] = u + (m + (half + i < count ? half + i : count - 1)) * p.u_stride;
      few_products<Ops, kFold>(t, w, p.rank, sums + half);
    }
    store_tile<T, kFold>(p, 0, m, count, sums);
  }
}

template <class Ops>
inline void few_rows(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  if constexpr (Ops::kFolds)
    if (p.layout.lanes == Layout::kHalfLanes) return few_rows_product<Ops, 2>(p, begin, end);
  few_rows_product<Ops, 1>(p, begin, end);
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
    if (p.layout.kind == Layout::kPlaces) return few_rows<Ops>(p, begin, end);
  if (p.layout.kind == Layout::kGroups)
    staged_product<T>(p, begin, end);
  else
    second_product<T>(p, begin, end);
}
