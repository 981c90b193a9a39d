// The two products, written once over a small set of vector operations ("Arch") that each instruction set's file
// supplies before it includes this one inside its anonymous namespace (so that every copy is local to its file).
//
// Both products are sweeps of dot products: weight rows w[m] against vectors x[r], all along contiguous memory.
// A sweep keeps 4 x R sums in registers while it goes along the columns of four weight rows:
//   - each weight is loaded once from memory, and serves R vectors;
//   - each x load serves four weight rows;
//   - four sums leave together, so that the horizontal additions are shared.
// The four weight rows are a quarter of the range apart, not neighbours: each of the four streams then runs through
// memory without a gap from one row to the next, which hardware prefetchers follow (neighbouring rows would be four
// short streams that end with every row). Measured: 92% of the read bandwidth instead of 80%.
//
// Arch provides: kWidth (floats in a vector), kMaxRows (R's limit: 4R sums + 2R vectors + 2 weights must fit the
// registers), kAsksAhead (whether a sweep prefetches), Vec, Pair (two vectors), Quad (four floats), zero(), add(),
// fma(a, b, c) = a * b + c, load(const T*), load_tail(const T*, n), load_pair(const float*), reduce4(), quad operations,
// prefetch(), and finish16() where kWidth is 16; for attribution.inl mul(), abs() and store(float*, v) as well.

template <class T>
struct Converted {  // weights and x of storage type T, both widened to fp32
  using W = typename Arch::Pair;
  using X = typename Arch::Pair;
  using Source = T;
  static inline W load_w(const T* p) { return Arch::load(p); }
  static inline W load_w_tail(const T* p, std::int64_t n) { return Arch::load_tail(p, n); }
  static inline X load_x(const T* p) { return Arch::load(p); }
  static inline X load_x_tail(const T* p, std::int64_t n) { return Arch::load_tail(p, n); }
  static inline typename Arch::Vec mac(typename Arch::Vec sum, const W& w, const X& x) {
    return Arch::fma(w.b, x.b, Arch::fma(w.a, x.a, sum));
  }
};

template <class T>
struct AgainstF32 : Converted<T> {  // weights of type T against an fp32 vector that is padded with zeros
  using X = typename Arch::Pair;
  using Source = float;
  static inline X load_x(const float* p) { return Arch::load_pair(p); }
  static inline X load_x_tail(const float* p, std::int64_t) { return Arch::load_pair(p); }
};

constexpr std::int64_t kStep = 2 * Arch::kWidth;
static_assert(kStepMultiple % kStep == 0, "t's padding must cover a whole step");

// Bytes ahead of its stream that a sweep asks for: enough to hide memory's latency.
constexpr std::int64_t kAheadBytes = 2048;

// Every loop over sums is unrolled by hand, that of the tail included: where one is not, the sums lie in memory.
template <class Ops, int R, bool kPrefetch, class T>
inline void panel(const T* const (&w)[4], const typename Ops::Source* x, std::int64_t x_stride, std::int64_t k,
                  typename Arch::Vec (&sum)[R][4]) {
  constexpr std::int64_t ahead = kAheadBytes / static_cast<std::int64_t>(sizeof(T));
  typename Ops::X xs[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) sum[r][m] = Arch::zero();
  std::int64_t j = 0;
  for (; j + kStep <= k; j += kStep) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) xs[r] = Ops::load_x(x + r * x_stride + j);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      if (kPrefetch && Arch::kAsksAhead) {
        Arch::prefetch(w[m] + ahead + j);
        if (kStep * sizeof(T) > 64) Arch::prefetch(w[m] + ahead + j + kStep / 2);
      }
      const typename Ops::W weight = Ops::load_w(w[m] + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][m] = Ops::mac(sum[r][m], weight, xs[r]);
    }
  }
  if (j < k) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) xs[r] = Ops::load_x_tail(x + r * x_stride + j, k - j);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const typename Ops::W weight = Ops::load_w_tail(w[m] + j, k - j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][m] = Ops::mac(sum[r][m], weight, xs[r]);
    }
  }
}

// Results of four weight rows, in tiles of kTile places: that of R rows of x and weight row m goes to
// out[(4 r + m) * kTile].
template <class Ops, int R, bool kPrefetch, class T>
inline void panel_to(const T* const (&w)[4], const typename Ops::Source* x, std::int64_t x_stride, std::int64_t k,
                     float* out) {
  typename Arch::Vec sum[R][4];
  panel<Ops, R, kPrefetch>(w, x, x_stride, k, sum);
  for (int r = 0; r < R; ++r) {
    float four[4];
    Arch::quad_store(four, Arch::reduce4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
    for (int m = 0; m < 4; ++m) out[(r * 4 + m) * kTile] = four[m];
  }
}

// The same for as many rows as fit the registers, into place j of a tile. Where these are 16 sums, the width of a
// vector, they leave as one, and the full tile is turned by turn_tile: less work than storing them one by one.
template <class A>
constexpr bool kTurns = A::kWidth == 16 && A::kMaxRows == 4;

template <class Ops, bool kPrefetch, class T, class A = Arch>
inline void full_panel_to(const T* const (&w)[4], const typename Ops::Source* x, std::int64_t x_stride, std::int64_t k,
                          float* tile, int j) {
  if constexpr (kTurns<A>) {
    typename A::Vec sum[4][4];
    panel<Ops, 4, kPrefetch>(w, x, x_stride, k, sum);
    const typename A::Vec all[16] = {sum[0][0], sum[0][1], sum[0][2], sum[0][3], sum[1][0], sum[1][1],
                                     sum[1][2], sum[1][3], sum[2][0], sum[2][1], sum[2][2], sum[2][3],
                                     sum[3][0], sum[3][1], sum[3][2], sum[3][3]};
    A::store16(tile + j * kTile, A::reduce16(all));
  } else {
    panel_to<Ops, A::kMaxRows, kPrefetch>(w, x, x_stride, k, tile + j);
  }
}

template <class A = Arch>
inline void turn_tile(float* tile) {
  if constexpr (kTurns<A>) {
    typename A::Vec rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = A::load16(tile + i * kTile);
    A::transpose(rows);
    for (int i = 0; i < 16; ++i) A::store16(tile + i * kTile, rows[i]);
  } else {
    (void)tile;
  }
}

// All rows of x against four weight rows. Only the first group of rows prefetches; the others find it done.
template <class Ops, class T>
inline void all_rows(const T* const (&w)[4], const typename Ops::Source* x, std::int64_t x_stride, std::int64_t rows,
                     std::int64_t k, float* out, int j) {
  std::int64_t r = 0;
  if (rows >= Arch::kMaxRows) {
    full_panel_to<Ops, true>(w, x, x_stride, k, out, j);
    for (r = Arch::kMaxRows; r + Arch::kMaxRows <= rows; r += Arch::kMaxRows)
      full_panel_to<Ops, false>(w, x + r * x_stride, x_stride, k, out + r * 4 * kTile, j);
  }
  const typename Ops::Source* rest = x + r * x_stride;
  out += r * 4 * kTile + j;
  switch (rows - r) {
    case 1: panel_to<Ops, 1, true>(w, rest, x_stride, k, out); break;
    case 2: panel_to<Ops, 2, true>(w, rest, x_stride, k, out); break;
    case 3: panel_to<Ops, 3, true>(w, rest, x_stride, k, out); break;
    default: break;
  }
}

// emit(r, m, values, count): dot products of x's row r with weight rows m to m + count, count at most kTile.
// The order of additions is one for any number of rows and any range: so are the bits.
template <class Ops, class T, class Emit>
inline void sweep(const T* weights, std::int64_t stride, std::int64_t begin, std::int64_t end,
                  const typename Ops::Source* x, std::int64_t x_stride, std::int64_t rows, std::int64_t k, Emit emit) {
  // Results are gathered until kTile neighbours can leave together: storing them one by one at addresses that are a
  // row of y apart hits one set of the cache again and again.
  alignas(64) float out[kRowBlock * 4 * kTile];
  const auto turn = [&] {
    for (std::int64_t r = 0; r + Arch::kMaxRows <= rows; r += Arch::kMaxRows) turn_tile(out + r * 4 * kTile);
  };
  const std::int64_t quarter = (end - begin) / 4;
  for (std::int64_t i = 0; i < quarter; i += kTile) {
    const int count = static_cast<int>(quarter - i < kTile ? quarter - i : kTile);
    for (int j = 0; j < count; ++j) {
      const T* const first = weights + (begin + i + j) * stride;
      const T* const w[4] = {first, first + quarter * stride, first + 2 * quarter * stride,
                             first + 3 * quarter * stride};
      all_rows<Ops>(w, x, x_stride, rows, k, out, j);
    }
    turn();
    for (std::int64_t r = 0; r < rows; ++r)
      for (int m = 0; m < 4; ++m) emit(r, begin + m * quarter + i, out + (r * 4 + m) * kTile, count);
  }
  const std::int64_t left = begin + 4 * quarter;
  if (left < end) {
    // Fewer than four are left: the last one again in place of those that are not there.
    const int count = static_cast<int>(end - left);
    const T* const first = weights + left * stride;
    const T* const w[4] = {first, first + (count > 1 ? stride : 0), first + (count - 1) * stride,
                           first + (count - 1) * stride};
    all_rows<Ops>(w, x, x_stride, rows, k, out, 0);
    turn();
    for (std::int64_t r = 0; r < rows; ++r)
      for (int m = 0; m < count; ++m) emit(r, left + m, out + (r * 4 + m) * kTile, 1);
  }
}

// y = values * scale + bias + residual, `count` of them; nothing beyond them is touched.
template <class T, class Y, class A = Arch>  // a parameter, so that finish16 is looked up only where it exists
inline void finish_run(Y* y, const float* values, int count, float scale, const T* bias, const T* residual) {
  int i = 0;
  if constexpr (A::kWidth == 16) {
    if (count == 16) {
      A::finish16(y, A::load16(values), scale, bias, residual);
      return;
    }
  }
  for (; i + 4 <= count; i += 4) {
    typename Arch::Quad sums = Arch::quad_scale(Arch::quad_load(values + i), scale);
    if (bias) sums = Arch::quad_add(sums, Arch::quad_load(bias + i));
    if (residual) sums = Arch::quad_add(sums, Arch::quad_load(residual + i));
    Arch::quad_store(y + i, sums);
  }
  if (i < count) {
    // Fewer than four are left: through padded copies.
    float four[4] = {};
    T other[4] = {};
    Y rounded[4];
    for (int n = 0; n < count - i; ++n) four[n] = values[i + n];
    typename Arch::Quad sums = Arch::quad_scale(Arch::quad_load(four), scale);
    if (bias) {
      for (int n = 0; n < count - i; ++n) other[n] = bias[i + n];
      sums = Arch::quad_add(sums, Arch::quad_load(other));
    }
    if (residual) {
      for (int n = 0; n < count - i; ++n) other[n] = residual[i + n];
      sums = Arch::quad_add(sums, Arch::quad_load(other));
    }
    Arch::quad_store(rounded, sums);
    for (int n = 0; n < count - i; ++n) y[i + n] = rounded[n];
  }
}

// What a second product does with its sums: scale, bias, residual, one rounding. `values` holds count results of row r,
// of the outputs from m on.
template <class T>
inline void finish(const SecondProduct& p, std::int64_t r, std::int64_t m, const float* values, int count) {
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + m : nullptr;
  if (p.wide) {
    finish_run<T, float>(p.wide + r * p.y_stride + m, values, count, 1.0f, bias, nullptr);
    return;
  }
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + r * p.residual_stride + m : nullptr;
  T* y = static_cast<T*>(p.y) + r * p.y_stride + m;
  finish_run<T, T>(y, values, count, p.scale ? p.scale[r] : 1.0f, bias, residual);
}

// Columns m to m + count of row r of t go to their places, by whole neighbourhoods where m begins one.
template <int kAcross, class T>
inline void put(const FirstProduct& p, std::int64_t r, std::int64_t m, const T* values, int count) {
  T* const t = reinterpret_cast<T*>(p.t);
  int i = 0;
  if (m % kAcross == 0)
    for (; i + kAcross <= count; i += kAcross)
      __builtin_memcpy(t + p.layout.place<kAcross>(r, m + i), values + i, kAcross * sizeof(T));
  for (; i < count; ++i) t[p.layout.place<kAcross>(r, m + i)] = values[i];
}

// What a first product does with its sums, of columns m to m + count of row r of t
template <class T>
inline void keep(const FirstProduct& p, std::int64_t r, std::int64_t m, const float* values, int count) {
  const T* const direct = p.direct ? static_cast<const T*>(p.direct) + r * p.direct_stride + m : nullptr;
  if (p.layout.kind == Layout::kPlaces) {
    T rounded[kTile];
    finish_run<T, T>(rounded, values, count, 1.0f, direct, nullptr);
    constexpr int kAcross = static_cast<int>(64 / sizeof(T) / Layout::kLanes);
    if (p.layout.lanes == Layout::kLanes)
      put<kAcross>(p, r, m, rounded, count);
    else
      put<2 * kAcross>(p, r, m, rounded, count);
    return;
  }
  float* const t = p.t + p.layout.start(r);
  if (p.layout.kind == Layout::kInOrder) {
    for (int i = 0; i < count; ++i) t[m + i] = values[i];  // there is no `direct`
    return;
  }
  const std::int64_t step = p.layout.step();
  for (int i = 0; i < count; ++i)
    t[Arch::position(static_cast<const T*>(nullptr), m + i) * step] = direct ? values[i] + to_float(direct[i]) : values[i];
}

template <class Ops, class T>
void first_product(const FirstProduct& p, std::int64_t begin, std::int64_t end) {
  sweep<Ops>(static_cast<const T*>(p.v), p.v_stride, begin, end, static_cast<const T*>(p.x), p.x_stride, p.rows, p.in,
             [&](std::int64_t r, std::int64_t m, const float* values, int count) { keep<T>(p, r, m, values, count); });
}

template <class T>
void second_product(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  sweep<AgainstF32<T>>(static_cast<const T*>(p.u), p.u_stride, begin, end, p.t, p.layout.stride, p.rows, p.rank,
                       [&](std::int64_t r, std::int64_t m, const float* values, int count) {
                         finish<T>(p, r, m, values, count);
                       });
}

template <class T>
float sum_of_squares(const void* data, std::int64_t n) {
  const T* x = static_cast<const T*>(data);
  typename Arch::Vec a = Arch::zero(), b = Arch::zero();
  std::int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    const typename Arch::Pair p = Arch::load(x + j);
    a = Arch::fma(p.a, p.a, a);
    b = Arch::fma(p.b, p.b, b);
  }
  if (j < n) {
    const typename Arch::Pair p = Arch::load_tail(x + j, n - j);
    a = Arch::fma(p.a, p.a, a);
    b = Arch::fma(p.b, p.b, b);
  }
  float four[4];
  Arch::quad_store(four, Arch::reduce4(Arch::add(a, b), Arch::zero(), Arch::zero(), Arch::zero()));
  return four[0];
}
