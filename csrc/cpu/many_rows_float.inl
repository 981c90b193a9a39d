// The two products for many rows (ManyRows in isa.h) in fp32 arithmetic, for weights of any dtype. Included by avx2.cpp
// after panel.inl.
//
// Batch rows are the lanes of a vector, as in many_rows.inl, but x and the intermediate are widened to fp32: 16 rows and
// all columns make a panel, [columns, 16]. Weights are widened as well, kRun rows and kDepth columns at a time, into a
// buffer from which FMAs broadcast them for nothing: no library product reads 16-bit weights on such a CPU at more than
// a tenth of its FMA rate. Nothing is rounded between the two products.
//
// A tile is up to kTileOutputs weight rows by one panel. Its sums stay in registers over kDepth columns and in the first
// cache (`sums`) over the columns that the second cache holds of x.

// 6 x 2 sums, 2 vectors of x, 1 weight: 15 of 16 registers, and enough sums to hide the latency of an FMA (8 at least).
constexpr int kTileOutputs = 6;
// Weight rows whose sums leave together: two lines of the cache in each row of y of 16-bit elements
constexpr int kRun = 32;
// Columns that are widened at a time. A panel's part (16 KiB) and a tile's weights (6 KiB) share a first cache of 32 KiB.
constexpr std::int64_t kDepth = 256;
// Beside each widened row, so that rows do not fall into one set of the cache
constexpr std::int64_t kDepthPad = 16;
constexpr std::int64_t kWidenedRow = kDepth + kDepthPad;
// Columns that go through all weight rows together: of kRowBlock rows they take half of a second cache of 512 KiB.
constexpr std::int64_t kFloatColumns = 1024;

template <class T>
inline Arch::Vec load8_of(const T* p, std::int64_t n) {
  if (n >= 8) return Arch::load8(p);
  T padded[8] = {};
  for (std::int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return Arch::load8(padded);
}

// Columns [begin, end) of x into panels, widened
template <class T>
inline void pack_float(const Packing& p, std::int64_t begin, std::int64_t end) {
  const T* const x = static_cast<const T*>(p.x);
  float* const panels = reinterpret_cast<float*>(p.places);
  for (std::int64_t g = 0; g < p.lanes; g += kGroup) {
    float* const panel = panels + g * p.columns;
    for (std::int64_t j = begin; j < end; j += 8) {
      const int columns = static_cast<int>(end - j < 8 ? end - j : 8);
      for (int half = 0; half < kGroup; half += 8) {
        Arch::Vec tile[8];
        for (int i = 0; i < 8; ++i) {
          const std::int64_t r = g + half + i;
          tile[i] = r < p.rows ? load8_of(x + r * p.x_stride + j, columns) : Arch::zero();
        }
        Arch::transpose(tile);
        for (int i = 0; i < columns; ++i) Arch::store(panel + (j + i) * kGroup + half, tile[i]);
      }
    }
  }
}

// `count` weight rows, `columns` of each, widened. Their next columns, or the next rows' first ones, are asked for.
template <class T>
inline void widen(const T* w, std::int64_t stride, int count, std::int64_t columns, const T* next, float* buffer) {
  for (int i = 0; i < count; ++i) {
    const T* const row = w + i * stride;
    const T* const later = next + i * stride;
    float* const out = buffer + i * kWidenedRow;
    std::int64_t j = 0;
    for (; j + 16 <= columns; j += 16) {
      _mm_prefetch(reinterpret_cast<const char*>(later + j), _MM_HINT_T1);
      Arch::store(out + j, Arch::load8(row + j));
      Arch::store(out + j + 8, Arch::load8(row + j + 8));
    }
    for (; j < columns; j += 8) Arch::store(out + j, load8_of(row + j, columns - j));
  }
}

// sums += products of a panel's `columns` with kOutputs widened weight rows
template <int kOutputs>
inline void tile_products(const float* panel, const float* w, std::int64_t columns, float* sums, std::int64_t lanes) {
  Arch::Vec a[kOutputs], b[kOutputs];  // the two halves of a panel's rows
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) {
    a[i] = Arch::load8(sums + i * lanes);
    b[i] = Arch::load8(sums + i * lanes + 8);
  }
  for (std::int64_t j = 0; j < columns; ++j) {
    const Arch::Vec first = Arch::load8(panel + j * kGroup), second = Arch::load8(panel + j * kGroup + 8);
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
      const Arch::Vec weight = Arch::broadcast(w + i * kWidenedRow + j);
      a[i] = Arch::fma(weight, first, a[i]);
      b[i] = Arch::fma(weight, second, b[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) {
    Arch::store(sums + i * lanes, a[i]);
    Arch::store(sums + i * lanes + 8, b[i]);
  }
}

inline void tile_products(int outputs, const float* panel, const float* w, std::int64_t columns, float* sums,
                          std::int64_t lanes) {
  switch (outputs) {
    case 1: tile_products<1>(panel, w, columns, sums, lanes); break;
    case 2: tile_products<2>(panel, w, columns, sums, lanes); break;
    case 3: tile_products<3>(panel, w, columns, sums, lanes); break;
    case 4: tile_products<4>(panel, w, columns, sums, lanes); break;
    case 5: tile_products<5>(panel, w, columns, sums, lanes); break;
    default: tile_products<6>(panel, w, columns, sums, lanes); break;
  }
}

// emit(m, count, sums): of weight rows m to m + count, count at most kRun, sums is [count, lanes]. Where there are more
// columns than kFloatColumns, sums wait in `partial`, [weight rows, lanes], while the next columns come in; they are there
// from before where the sweep `resumes`, and stay there where it `waits` for a further one.
template <class T, class Emit>
inline void float_sweep(const void* weights, std::int64_t stride, std::int64_t begin, std::int64_t end, const float* x,
                        std::int64_t lanes, std::int64_t columns, float* partial, bool resumes, bool waits,
                        Emit emit) {
  alignas(64) float buffer[kRun * kWidenedRow];
  alignas(64) float sums[kRun * kRowBlock];
  std::int64_t start = 0;
  do {  // sums of nothing are results, too
    const std::int64_t stop = columns - start > kFloatColumns ? start + kFloatColumns : columns;
    for (std::int64_t m = begin; m < end; m += kRun) {
      const int count = static_cast<int>(end - m < kRun ? end - m : kRun);
      const std::size_t bytes = static_cast<std::size_t>(count * lanes) * sizeof(float);
      if (start || resumes)
        __builtin_memcpy(sums, partial + m * lanes, bytes);
      else
        __builtin_memset(sums, 0, bytes);
      const T* const w = static_cast<const T*>(weights) + m * stride;
      for (std::int64_t j = start; j < stop; j += kDepth) {
        const std::int64_t depth = stop - j < kDepth ? stop - j : kDepth;
        const T* const next = j + depth < stop ? w + j + depth : w + kRun * stride + start;
        widen(w + j, stride, count, depth, next, buffer);
        const int tiles = (count + kTileOutputs - 1) / kTileOutputs;
        for (std::int64_t g = 0; g < lanes; g += kGroup)
          for (int t = 0; t < tiles; ++t) {  // as equal as can be: the fewer sums, the more an FMA's latency shows
            const int i = count * t / tiles, outputs = count * (t + 1) / tiles - i;
            tile_products(outputs, x + g * columns + j * kGroup, buffer + i * kWidenedRow, depth, sums + i * lanes + g,
                          lanes);
          }
      }
      if (stop == columns && !waits)
        emit(m, count, sums);
      else
        __builtin_memcpy(partial + m * lanes, sums, bytes);
    }
    start = stop;
  } while (start < columns);
}

template <class T>
inline void many_first_float(const ManyFirst& p, std::int64_t begin, std::int64_t end) {
  float* const t = reinterpret_cast<float*>(p.t);
  float_sweep<T>(p.v, p.v_stride, begin, end, reinterpret_cast<const float*>(p.x), p.lanes, p.in, p.partial,
                 p.resumes, p.waits, [&](std::int64_t m, int count, const float* sums) {
    for (std::int64_t g = 0; g < p.lanes; g += kGroup)
      for (int i = 0; i < count; ++i)
        for (int half = 0; half < kGroup; half += 8) {
          float* const at = t + g * p.rank + (m + i) * kGroup + half;
          const Arch::Vec sum = Arch::load8(sums + i * p.lanes + g + half);
          Arch::store(at, p.onto ? Arch::add(sum, Arch::load8(at)) : sum);
        }
  });
}

// As finish(), for eight rows in lanes and up to eight outputs from m on
template <class T>
inline void leave(const SecondProduct& to, std::int64_t r, std::int64_t m, int count, const float* sums,
                  std::int64_t lanes) {
  const T* const bias = static_cast<const T*>(to.bias);
  const T* const residual = static_cast<const T*>(to.residual);
  Arch::Vec rows[8];
  for (int k = 0; k < 8; ++k) rows[k] = k < count ? Arch::load8(sums + k * lanes) : Arch::zero();
  Arch::transpose(rows);
  for (int k = 0; k < 8 && r + k < to.rows; ++k) {
    if (count < 8 || to.wide) {
      float values[8];
      Arch::store(values, rows[k]);
      finish<T>(to, r + k, m, values, count < 8 ? count : 8);
      continue;
    }
    Arch::Vec row = Arch::mul(rows[k], Arch::all(to.scale ? to.scale[r + k] : 1.0f));
    if (bias) row = Arch::add(row, Arch::load8(bias + m));
    if (residual) row = Arch::add(row, Arch::load8(residual + (r + k) * to.residual_stride + m));
    Arch::store(static_cast<T*>(to.y) + (r + k) * to.y_stride + m, row);
  }
}

template <class T>
inline void many_second_float(const ManySecond& p, std::int64_t begin, std::int64_t end) {
  const SecondProduct& to = p.product;
  float_sweep<T>(to.u, to.u_stride, begin, end, reinterpret_cast<const float*>(p.t), p.lanes, to.rank, p.partial, false,
                 false, [&](std::int64_t m, int count, const float* sums) {
    // all of a row's outputs at once: rows of y often fall into one set of the cache, which would lose half-written lines
    for (std::int64_t r = 0; r < to.rows; r += 8)
      for (int i = 0; i < count; i += 8) leave<T>(to, r, m + i, count - i, sums + i * p.lanes + r, p.lanes);
  });
}

template <class T>
constexpr ManyRows kManyRowsFloat = {1, kFloatColumns, 12, pack_float<T>, many_first_float<T>, many_second_float<T>};
