// The two products, written once over a small set of vector operations ("Arch") that each instruction set's file
// supplies before it includes this one inside its anonymous namespace (so that every copy is local to its file).
//
// Both products are sweeps of dot products: weight rows w[m] against vectors x[r], all along contiguous memory.
// A sweep walks the weight rows in panels of four, and keeps 4 x R sums in registers while it goes along the columns:
//   - each weight is loaded once from memory, and serves R vectors;
//   - each x load serves four weight rows;
//   - four sums leave together, so that the horizontal additions are shared.
// One chain of additions per sum, whatever R is: a row's bits do not depend on its neighbours in the batch. Four
// chains of two dependent FMAs still take in 32 bytes of weights a cycle, more than any memory gives.
//
// Arch provides: kWidth (floats in a vector), kMaxRows (R's limit: 4R sums + 2R vectors + 2 weights must fit the
// registers), Vec, Pair (two vectors), Quad (four floats), zero(), fma(a, b, c) = a * b + c, add(), load(const T*),
// load_tail(const T*, n), load_pair(const float*), reduce4(), quad operations, prefetch().

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

template <class Ops, int R, bool kPrefetch, class T>
inline void panel(const T* const (&w)[4], std::int64_t ahead, const typename Ops::Source* x, std::int64_t x_stride,
                  std::int64_t k, typename Arch::Quad (&out)[R]) {
  typename Arch::Vec sum[R][4];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < 4; ++m) sum[r][m] = Arch::zero();
  std::int64_t j = 0;
  for (; j + kStep <= k; j += kStep) {
    typename Ops::X xs[R];
    for (int r = 0; r < R; ++r) xs[r] = Ops::load_x(x + r * x_stride + j);
    for (int m = 0; m < 4; ++m) {
      if (kPrefetch) Arch::prefetch(w[m] + ahead + j);
      const typename Ops::W weight = Ops::load_w(w[m] + j);
      for (int r = 0; r < R; ++r) sum[r][m] = Ops::mac(sum[r][m], weight, xs[r]);
    }
  }
  if (j < k) {
    typename Ops::X xs[R];
    for (int r = 0; r < R; ++r) xs[r] = Ops::load_x_tail(x + r * x_stride + j, k - j);
    for (int m = 0; m < 4; ++m) {
      const typename Ops::W weight = Ops::load_w_tail(w[m] + j, k - j);
      for (int r = 0; r < R; ++r) sum[r][m] = Ops::mac(sum[r][m], weight, xs[r]);
    }
  }
  for (int r = 0; r < R; ++r) out[r] = Arch::reduce4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

// emit(r, m, four sums, how many of them exist) for every row r and every panel of [begin, end)
template <class Ops, class T, class Emit>
inline void sweep(const T* weights, std::int64_t stride, std::int64_t begin, std::int64_t end,
                  const typename Ops::Source* x, std::int64_t x_stride, std::int64_t rows, std::int64_t k, Emit emit) {
  for (std::int64_t m = begin; m < end; m += 4) {
    const int count = static_cast<int>(end - m < 4 ? end - m : 4);
    // A panel that is not full repeats its last row: the same instructions, hence the same bits, for every row.
    const T* const first = weights + m * stride;
    const T* const w[4] = {first, first + (count > 1 ? 1 : 0) * stride, first + (count > 2 ? 2 : count - 1) * stride,
                           first + (count - 1) * stride};
    // The next panel is asked for while this one is computed: hardware prefetchers lose each of the four streams at
    // every page, and start anew at every row. Only the first group of rows does it; the others find it done.
    const std::int64_t ahead = 4 * stride;
    std::int64_t r = 0;
    if (rows >= Arch::kMaxRows) {
      typename Arch::Quad out[Arch::kMaxRows];
      panel<Ops, Arch::kMaxRows, true>(w, ahead, x, x_stride, k, out);
      for (int i = 0; i < Arch::kMaxRows; ++i) emit(r + i, m, out[i], count);
      for (r = Arch::kMaxRows; r + Arch::kMaxRows <= rows; r += Arch::kMaxRows) {
        panel<Ops, Arch::kMaxRows, false>(w, ahead, x + r * x_stride, x_stride, k, out);
        for (int i = 0; i < Arch::kMaxRows; ++i) emit(r + i, m, out[i], count);
      }
    }
    if (Arch::kMaxRows > 2 && r + 2 <= rows) {
      typename Arch::Quad out[2];
      panel<Ops, 2, true>(w, ahead, x + r * x_stride, x_stride, k, out);
      for (int i = 0; i < 2; ++i) emit(r + i, m, out[i], count);
      r += 2;
    }
    for (; r < rows; ++r) {
      typename Arch::Quad out[1];
      panel<Ops, 1, true>(w, ahead, x + r * x_stride, x_stride, k, out);
      emit(r, m, out[0], count);
    }
  }
}

template <class Ops, class T>
void first_product(const FirstProduct& p, std::int64_t begin, std::int64_t end) {
  sweep<Ops>(static_cast<const T*>(p.v), p.v_stride, begin, end, static_cast<const T*>(p.x), p.x_stride, p.rows, p.in,
             [&](std::int64_t r, std::int64_t m, typename Arch::Quad sums, int count) {
               float four[4];
               Arch::quad_store(four, sums);
               float* t = p.t + r * p.t_stride;
               for (int i = 0; i < count; ++i) t[Arch::position(static_cast<const T*>(nullptr), m + i)] = four[i];
             });
}

template <class T>
void second_product(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  const T* bias = static_cast<const T*>(p.bias);
  sweep<AgainstF32<T>>(
      static_cast<const T*>(p.u), p.u_stride, begin, end, p.t, p.t_stride, p.rows, p.rank,
      [&](std::int64_t r, std::int64_t m, typename Arch::Quad sums, int count) {
        T* y = static_cast<T*>(p.y) + r * p.y_stride + m;
        const T* residual = p.residual ? static_cast<const T*>(p.residual) + r * p.residual_stride + m : nullptr;
        if (p.scale) sums = Arch::quad_scale(sums, p.scale[r]);
        if (count == 4) {
          if (bias) sums = Arch::quad_add(sums, Arch::quad_load(bias + m));
          if (residual) sums = Arch::quad_add(sums, Arch::quad_load(residual));
          Arch::quad_store(y, sums);
        } else {
          // Fewer than four outputs are left: through a padded copy, so that nothing beyond them is touched.
          T four[4] = {};
          if (bias) {
            for (int i = 0; i < count; ++i) four[i] = bias[m + i];
            sums = Arch::quad_add(sums, Arch::quad_load(four));
          }
          if (residual) {
            for (int i = 0; i < count; ++i) four[i] = residual[i];
            sums = Arch::quad_add(sums, Arch::quad_load(four));
          }
          Arch::quad_store(four, sums);
          for (int i = 0; i < count; ++i) y[i] = four[i];
        }
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
