// The two products for 3 to a dozen rows of x in fp32 arithmetic, for weights of any dtype. Included by avx2.cpp after
// many_rows_float.inl, and used where many_rows() in isa.h finds them.
//
// Dot products along the columns, as in panel.inl for one row and two, with the same sums, bit for bit; but x is widened once for
// all weight rows, and 3 weight rows by 4 rows of x make a tile: 12 sums, which hide the latency of an FMA, where weights are
// widened for four rows of x at a time. The weight rows are a third of the range apart, for the prefetchers' sake, as there.
// (Neighbouring ones, with prefetches by hand, were up to a quarter slower. Zen 2, rank 1024 of 4096 x 4096, against panel.inl:
// bf16 and fp16 x1.2 at 4 and 8 rows, x1.15 to x1.25 at 12, level at 3, 5 and 6; fp32 level up to 6, x1.1 at 8, x1.2 at 12.)
//
// Packed rows lie one behind the other, their columns in the order of Arch::position.

constexpr int kDotWeights = 3, kDotRows = 4;
constexpr std::int64_t kDotMostRows = 12;
// Columns of a tile's weights that stay in the first cache until all rows of x have met them
constexpr std::int64_t kDotColumns = 1024;
constexpr std::int64_t kBesideRow = 16;  // so that rows of x do not fall into one set of the cache

inline std::int64_t dot_stride(std::int64_t columns) { return in_steps(columns) + kBesideRow; }

// What was loaded is loaded anew behind this: to keep it would take registers that are not there.
inline void forget_loads() { __asm__ volatile("" ::: "memory"); }

template <class T>
struct DotWeights {
  const T* rows[kDotWeights];
};

// sum += products of 16 columns. (A function and no lambda: what a lambda refers to would lie in memory, with forget_loads().)
template <class T>
__attribute__((always_inline)) inline void dot_step(const T* w0, const T* w1, const T* w2, const float* x0, const float* x1,
                                                    const float* x2, const float* x3, const Arch::Odd& odd,
                                                    Arch::Vec (&sum)[kDotWeights][kDotRows]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const Arch::Vec w[kDotWeights] = {half ? Arch::second(w0, odd) : Arch::first(w0),
                                      half ? Arch::second(w1, odd) : Arch::first(w1),
                                      half ? Arch::second(w2, odd) : Arch::first(w2)};
    const float* const xs[kDotRows] = {x0, x1, x2, x3};
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) {
      const Arch::Vec row = Arch::load8(xs[r] + 8 * half);
#pragma GCC unroll 3
      for (int m = 0; m < kDotWeights; ++m) sum[m][r] = Arch::fma(w[m], row, sum[m][r]);
    }
    forget_loads();
  }
}

// to[m * apart + r * kTile]: the sum of sums[m][r], a vector
template <class Sums>
inline void dot_reduce(Sums sums, float* to, std::int64_t apart) {
#pragma GCC unroll 3
  for (int m = 0; m < kDotWeights; ++m) {
    float four[kDotRows];
    Arch::quad_store(four, Arch::reduce4(sums(m, 0), sums(m, 1), sums(m, 2), sums(m, 3)));
    for (int r = 0; r < kDotRows; ++r) to[m * apart + r * kTile] = four[r];
  }
}

// Products of weight rows with rows of x, over `columns`, whole steps: `to` [kDotWeights, kDotRows] of vectors += them; or, where
// these are all (kAll), reduced to where dot_reduce puts them.
template <class T, bool kAll>
__attribute__((noinline)) void dot_tile(const DotWeights<T>& weights, const float* x, std::int64_t x_stride,
                                        std::int64_t columns, float* to, std::int64_t apart) {
  Arch::Vec sum[kDotWeights][kDotRows];
#pragma GCC unroll 3
  for (int m = 0; m < kDotWeights; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) sum[m][r] = kAll ? Arch::zero() : Arch::load8(to + (m * kDotRows + r) * 8);
  const float *x0 = x, *x1 = x + x_stride, *x2 = x + 2 * x_stride, *x3 = x + 3 * x_stride;
  const T *w0 = weights.rows[0], *w1 = weights.rows[1], *w2 = weights.rows[2];
  const Arch::Odd odd;
  for (std::int64_t j = 0; j < columns; j += kStepColumns)
    dot_step(w0 + j, w1 + j, w2 + j, x0 + j, x1 + j, x2 + j, x3 + j, odd, sum);
  if constexpr (kAll) {
    dot_reduce([&](int m, int r) { return sum[m][r]; }, to, apart);
    return;
  }
#pragma GCC unroll 3
  for (int m = 0; m < kDotWeights; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) Arch::store(to + (m * kDotRows + r) * 8, sum[m][r]);
}

// emit(r, m, values, count): products of packed row r with weight rows m to m + count
template <class T, class Emit>
void dot_sweep(const void* weights, std::int64_t stride, std::int64_t begin, std::int64_t end, const float* x, std::int64_t lanes,
               std::int64_t columns, Emit emit) {
  alignas(64) float out[kDotWeights][kDotMostRows][kTile];
  const std::int64_t x_stride = dot_stride(columns), whole = columns / kStepColumns * kStepColumns;
  constexpr std::int64_t kApart = kDotMostRows * kTile;
  const auto tile = [&](const DotWeights<T>& w, int j) {
    if (columns == whole && columns <= kDotColumns) {
      for (std::int64_t r = 0; r < lanes; r += kDotRows)
        dot_tile<T, true>(w, x + r * x_stride, x_stride, columns, &out[0][r][j], kApart);
      return;
    }
    alignas(64) float sums[kDotMostRows / kDotRows][kDotWeights * kDotRows * 8];
    __builtin_memset(sums, 0, sizeof(float) * static_cast<std::size_t>(lanes * kDotWeights * 8));
    const auto all_rows = [&](const DotWeights<T>& some, std::int64_t from, std::int64_t count) {
      for (std::int64_t r = 0; r < lanes; r += kDotRows)
        dot_tile<T, false>(some, x + r * x_stride + from, x_stride, count, sums[r / kDotRows], 0);
    };
    for (std::int64_t from = 0; from < whole; from += kDotColumns)
      all_rows({{w.rows[0] + from, w.rows[1] + from, w.rows[2] + from}}, from, whole - from < kDotColumns ? whole - from : kDotColumns);
    if (whole < columns) {
      T last[kDotWeights][kStepColumns] = {};
      for (int m = 0; m < kDotWeights; ++m)
        for (std::int64_t k = whole; k < columns; ++k) last[m][k - whole] = w.rows[m][k];
      all_rows({{last[0], last[1], last[2]}}, whole, kStepColumns);
    }
    for (std::int64_t r = 0; r < lanes; r += kDotRows) {
      const float* const of = sums[r / kDotRows];
      dot_reduce([&](int m, int k) { return Arch::load8(of + (m * kDotRows + k) * 8); }, &out[0][r][j], kApart);
    }
  };
  const std::int64_t third = (end - begin) / kDotWeights;
  for (std::int64_t i = 0; i < third; i += kTile) {
    const int count = static_cast<int>(third - i < kTile ? third - i : kTile);
    for (int j = 0; j < count; ++j) {
      const T* const first = static_cast<const T*>(weights) + (begin + i + j) * stride;
      tile({{first, first + third * stride, first + 2 * third * stride}}, j);
    }
    for (std::int64_t r = 0; r < lanes; ++r)
      for (int m = 0; m < kDotWeights; ++m) emit(r, begin + m * third + i, out[m][r], count);
  }
  const std::int64_t left = begin + kDotWeights * third;
  if (left < end) {  // the last one again in place of those that are not there
    const T* const first = static_cast<const T*>(weights) + left * stride;
    const T* const second = first + (left + 1 < end ? stride : 0);
    tile({{first, second, second}}, 0);
    for (std::int64_t r = 0; r < lanes; ++r)
      for (int m = 0; left + m < end; ++m) emit(r, left + m, out[m][r], 1);
  }
}

// Places [begin, end) of all rows, begin a multiple of kStepColumns
template <class T>
void dot_pack(const Packing& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = 0; r < p.lanes; ++r) {
    float* const to = reinterpret_cast<float*>(p.places) + r * dot_stride(p.columns);
    for (std::int64_t j = begin; j < end; j += kStepColumns) store_step(step_of<T>(p, r, j), to + j);
  }
}

template <class T>
void dot_first(const ManyFirst& p, std::int64_t begin, std::int64_t end) {
  float* const t = reinterpret_cast<float*>(p.t);
  const auto at = [&](std::int64_t r, std::int64_t m) -> float& {
    return t[r * dot_stride(p.rank) + Arch::position(static_cast<const T*>(nullptr), m)];
  };
  dot_sweep<T>(p.v, p.v_stride, begin, end, reinterpret_cast<const float*>(p.x), p.lanes, p.in,
               [&](std::int64_t r, std::int64_t m, const float* values, int count) {
    for (int i = 0; i < count; ++i) at(r, m + i) = p.onto ? at(r, m + i) + values[i] : values[i];
  });
  if (end != p.rank || p.onto) return;
  for (std::int64_t m = p.rank; m % kStepColumns; ++m)  // these meet weights of zero, and must be numbers
    for (std::int64_t r = 0; r < p.lanes; ++r) at(r, m) = 0.0f;
}

template <class T>
void dot_second(const ManySecond& p, std::int64_t begin, std::int64_t end) {
  const SecondProduct& to = p.product;
  dot_sweep<T>(to.u, to.u_stride, begin, end, reinterpret_cast<const float*>(p.t), p.lanes, to.rank,
               [&](std::int64_t r, std::int64_t m, const float* values, int count) {
    if (r < to.rows) finish<T>(to, r, m, values, count);
  });
}

// With fewer directions packing x, one more meeting of the threads and short rows of u cost more than they save (two Zen 2 cores:
// a sixth at rank 64, level at 256).
constexpr std::int64_t kDotLeastRank = 192;

template <class T>
constexpr ManyRows kFewRowsFloat = {1,        std::int64_t{1} << 62, 2,       dot_pack<T>, dot_first<T>, dot_second<T>, 0,
                                    kDotRows, kBesideRow,            nullptr, kDotLeastRank};

// A panel of 16 rows costs as much whether they are there or not, which dot products, four rows at a time, do not.
template <class T>
constexpr ManyRows kRowsFloat = {1, kFloatColumns, kDotMostRows, pack_float<T>, first_float<T>, second_float<T>,
                                 kFloatColumnsOfGroup, kGroup, 0, &kFewRowsFloat<T>};
