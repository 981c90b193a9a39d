// The two products for more rows than a few (ManyRows in isa.h) in fp32 arithmetic, for weights of any dtype. Included by
// avx2.cpp after panel.inl.
//
// Batch rows are the lanes of vectors. A panel is 16 rows of x, widened to fp32, [columns, 16]. A tile is kTileRows weight rows
// by a panel: a load broadcasts a weight, which serves two FMAs.
//
// 16-bit weights of one piece, kDepth columns, are widened into a buffer while the piece before is multiplied: shifts and
// stores take ports that FMAs and their loads leave free. No library product reads 16-bit weights on such a CPU at more than
// a tenth of its FMA rate. Nothing is rounded between the two products.
//
// Columns of a panel are in the order of Arch::position, in which widening neighbours takes no shuffle.

// More weight rows would meet in one set of the first cache, which has 8 ways, where rows are a power of two apart. 12 sums
// hide the latency of an FMA (10 would do), and take 12 of 16 registers.
constexpr int kTileRows = 6;
// What is widened at a time: of kTileRows rows, a first cache of 32 KiB has place for two pieces and a panel's part.
constexpr std::int64_t kStepColumns = 16, kDepth = 128;
// From one widened row to the next, so that rows do not fall into one set of the cache
constexpr std::int64_t kWidenedRow = kDepth + 16;
// Weight rows whose sums leave together: whole tiles, and whole lines of the cache in each row of y
constexpr int kRun = 96;
// How many pieces ahead of the one that is widened next memory is asked for
constexpr std::int64_t kAsked = 2;
// Columns that go through all weight rows together, of kRowBlock rows and of one group: they take half of a second cache of
// 512 KiB.
constexpr std::int64_t kFloatColumns = 1024, kFloatColumnsOfGroup = 4096;

// Columns, up to whole steps
inline std::int64_t in_steps(std::int64_t columns) { return (columns + kStepColumns - 1) / kStepColumns * kStepColumns; }

inline void store_step(const Arch::Pair& step, float* to) {
  Arch::store(to, step.a);
  Arch::store(to + 8, step.b);
}

// The piece that comes next: its weights, rows `stride` apart, and where they are to be widened
template <class T>
struct NextPiece {
  const T* from;
  std::int64_t stride;
  float* to;
};

// sums [kTileRows, 16] += products of a panel with weight rows, `columns` of them, in whole steps. Meanwhile, as many columns of
// `next` are widened (kWidens), and of the rows that begin at `ask` as many are asked for.
template <class T, bool kInPlace, bool kWidens>
__attribute__((noinline)) void tile_products(const float* panel, const float* w, std::int64_t w_stride, std::int64_t columns,
                                             NextPiece<T> next, const T* ask, std::int64_t ask_stride, float* sums) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  const std::int64_t stride = kInPlace ? w_stride : kWidenedRow;
  Arch::Vec sum[kTileRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) sum[i][k] = Arch::load8(sums + kGroup * i + 8 * k);
  const float* w3 = w + 3 * stride;  // two pointers and a stride reach six rows
  for (std::int64_t j = 0; j < columns; j += kStepColumns) {
    if constexpr (kWidens) {
      const T* from = next.from;
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i, from += next.stride) store_step(Arch::load(from), next.to + i * kWidenedRow);
      next.from += kStepColumns, next.to += kStepColumns;
    }
    if ((kWidens || kInPlace) && j % kLine == 0) {
      const T* line = ask + j;
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i, line += ask_stride) Arch::prefetch(line);
    }
#pragma GCC unroll 16
    for (int q = 0; q < kStepColumns; ++q) {
      const Arch::Vec first = Arch::load8(panel), second = Arch::load8(panel + 8);
      panel += kGroup;
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
        const Arch::Vec weights = Arch::broadcast((i < 3 ? w : w3) + i % 3 * stride + q);
        sum[i][0] = Arch::fma(weights, first, sum[i][0]);
        sum[i][1] = Arch::fma(weights, second, sum[i][1]);
      }
    }
    w += kStepColumns, w3 += kStepColumns;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) Arch::store(sums + kGroup * i + 8 * k, sum[i][k]);
}

// A piece that is not widened beside another: the first one, one of fewer rows than a tile's, one whose columns are no whole
// steps, and the one behind that. What is not there is zero.
template <class T>
inline void widen_piece(const T* w, std::int64_t stride, int rows, std::int64_t columns, float* to) {
  for (int i = 0; i < kTileRows; ++i, w += stride, to += kWidenedRow) {
    std::int64_t j = 0;
    if (i < rows) {
      for (; j + kStepColumns <= columns; j += kStepColumns) store_step(Arch::load(w + j), to + j);
      if (j < columns) store_step(Arch::load_tail(w + j, columns - j), to + j), j += kStepColumns;
    }
    for (; j < columns; j += kStepColumns) store_step({Arch::zero(), Arch::zero()}, to + j);
  }
}

inline std::int64_t panel_floats(std::int64_t columns) { return in_steps(columns) * kGroup; }

// Panels of x side by side, `apart` floats from one to the next
struct PanelsOfX {
  const float* first;
  std::int64_t apart;
  int count;
};

// Products of weight rows with `columns` of panels, piece by piece.
template <class T>
class FloatRun {
 public:
  FloatRun(std::int64_t stride, std::int64_t columns, PanelsOfX panels) : stride_(stride), columns_(columns), panels_(panels) {
    const std::int64_t pieces = (columns + kDepth - 1) / kDepth;
    // as equal as can be: a piece is widened beside another only where both are as long
    if (pieces) depth_ = in_steps((columns + pieces - 1) / pieces);
  }

  // sums [panels, kRun, 16] += products with `rows` weight rows, at most kRun, behind which there are `more`
  void multiply(const T* w, int rows, std::int64_t more, float* sums) {
    for (int i = 0; i < rows; i += kTileRows, w += kTileRows * stride_, sums += kGroup * kTileRows) {
      const int here = rows - i < kTileRows ? rows - i : kTileRows;
      const bool next_whole = rows - i + more >= 2 * kTileRows;
      for (std::int64_t j = 0; j < columns_; j += depth_) piece(w, here, next_whole, j, sums);
    }
  }

 private:
  std::int64_t width(std::int64_t j) const { return columns_ - j < depth_ ? columns_ - j : depth_; }

  void piece(const T* w, int rows, bool next_whole, std::int64_t j, float* sums) {
    const std::int64_t columns = width(j), behind = kTileRows * stride_, asked = j + (kAsked + 1) * depth_;
    const T* const ask = asked < columns_ ? w + asked : w + behind + (asked - columns_);
    const float* panel = panels_.first + j * kGroup;
    const bool whole = rows == kTileRows && columns % kStepColumns == 0;
    if constexpr (sizeof(T) == 4) {
      if (whole && panels_.count == 1) {
        tile_products<T, true, false>(panel, w + j, stride_, columns, {}, ask, stride_, sums);
        return;
      }
    }
    if (!ready_) widen_piece(w + j, stride_, rows, columns, widened_[at_]);
    const std::int64_t next = j + depth_ < columns_ ? j + depth_ : 0;
    ready_ = (next ? whole : next_whole) && width(next) == columns && columns % kStepColumns == 0;
    const float* const widened = widened_[at_];
    at_ = 1 - at_;
    for (int g = 0; g < panels_.count; ++g, panel += panels_.apart, sums += kGroup * kRun) {
      if (ready_ && g == 0)
        tile_products<T, false, true>(panel, widened, 0, columns, {w + (next ? next : behind), stride_, widened_[at_]},
                                      ask, stride_, sums);
      else
        tile_products<T, false, false>(panel, widened, 0, columns, {}, ask, stride_, sums);
    }
  }

  std::int64_t stride_, columns_, depth_ = kStepColumns;
  PanelsOfX panels_;
  bool ready_ = false;  // whether widened_[at_] holds the piece that comes next
  int at_ = 0;
  alignas(64) float widened_[2][kTileRows * kWidenedRow];
};

// emit(m, count, sums [panels, kRun, 16]) of weight rows m to m + count, count at most kRun. Where there are more columns than go
// through together, sums wait in `partial`, [weight rows, panels, 16], while the next columns come in; they are there from
// before where the sweep `resumes`, and stay there where it `waits` for a further one.
template <class T, class Emit>
void float_sweep(const void* weights, std::int64_t stride, std::int64_t begin, std::int64_t end, const float* x,
                 std::int64_t lanes, std::int64_t columns, float* partial, bool resumes, bool waits, Emit emit) {
  const int panels = static_cast<int>(lanes / kGroup);
  const std::int64_t together = panels == 1 ? kFloatColumnsOfGroup : kFloatColumns;
  alignas(64) float sums[kRowBlock * kRun];
  const auto each = [&](std::int64_t m, int count, const auto& body) {
    for (int i = 0; i < count; ++i)
      for (int g = 0; g < panels; ++g) body(partial + ((m + i) * panels + g) * kGroup, sums + (g * kRun + i) * kGroup);
  };
  std::int64_t start = 0;
  do {  // sums of nothing are results, too
    const std::int64_t stop = columns - start > together ? start + together : columns;
    FloatRun<T> run(stride, stop - start, {x + start * kGroup, panel_floats(columns), panels});
    for (std::int64_t m = begin; m < end; m += kRun) {
      const int count = static_cast<int>(end - m < kRun ? end - m : kRun);
      __builtin_memset(sums, 0, sizeof(float) * static_cast<std::size_t>(panels * kRun * kGroup));
      if (start || resumes) each(m, count, [](const float* waiting, float* sum) { __builtin_memcpy(sum, waiting, 64); });
      run.multiply(static_cast<const T*>(weights) + m * stride + start, count, end - m - count, sums);
      if (stop == columns && !waits)
        emit(m, count, sums);
      else
        each(m, count, [](float* waiting, const float* sum) { __builtin_memcpy(waiting, sum, 64); });
    }
    start = stop;
  } while (start < columns);
}

// A panel's sums [8, 16] of eight outputs: emit(row, its eight outputs)
template <class Emit>
inline void rows_of_panel(const float* sums, std::int64_t rows, Emit emit) {
  for (int half = 0; half < kGroup; half += 8) {
    Arch::Vec tile[8];
    for (int i = 0; i < 8; ++i) tile[i] = Arch::load8(sums + kGroup * i + half);
    Arch::transpose(tile);
    for (int i = 0; i < 8 && half + i < rows; ++i) emit(half + i, tile[i]);
  }
}

// 16 columns of row r of x, from j on, widened. Columns and rows that are not there are zero.
template <class T>
inline Arch::Pair step_of(const Packing& p, std::int64_t r, std::int64_t j) {
  if (r >= p.rows) return {Arch::zero(), Arch::zero()};
  const T* const at = static_cast<const T*>(p.x) + r * p.x_stride + j;
  return p.columns - j >= kStepColumns ? Arch::load(at) : Arch::load_tail(at, p.columns - j);
}

// Places [begin, end) of x, begin a multiple of kStepColumns
template <class T>
void pack_float(const Packing& p, std::int64_t begin, std::int64_t end) {
  float* panel = reinterpret_cast<float*>(p.places);
  for (std::int64_t r = 0; r < p.lanes; r += kGroup, panel += panel_floats(p.columns))
    for (std::int64_t j = begin; j < end; j += kStepColumns)
      for (int half = 0; half < kGroup; half += 8) {
        Arch::Vec a[8], b[8];
        for (int i = 0; i < 8; ++i) {
          const Arch::Pair pair = step_of<T>(p, r + half + i, j);
          a[i] = pair.a, b[i] = pair.b;
        }
        Arch::transpose(a);
        Arch::transpose(b);
        for (int i = 0; i < 8; ++i) {
          Arch::store(panel + (j + i) * kGroup + half, a[i]);
          Arch::store(panel + (j + 8 + i) * kGroup + half, b[i]);
        }
      }
}

template <class T>
void first_float(const ManyFirst& p, std::int64_t begin, std::int64_t end) {
  float* const t = reinterpret_cast<float*>(p.t);
  const auto at = [&](std::int64_t r, std::int64_t m) -> float& {
    return t[r / kGroup * panel_floats(p.rank) + Arch::position(static_cast<const T*>(nullptr), m) * kGroup + r % kGroup];
  };
  float_sweep<T>(p.v, p.v_stride, begin, end, reinterpret_cast<const float*>(p.x), p.lanes, p.in, p.partial, p.resumes,
                 p.waits, [&](std::int64_t m, int count, const float* sums) {
    for (std::int64_t g = 0; g < p.lanes; g += kGroup, sums += kGroup * kRun)
      for (int i = 0; i < count; ++i)
        for (int half = 0; half < kGroup; half += 8) {
          float* const to = &at(g + half, m + i);
          const Arch::Vec sum = Arch::load8(sums + kGroup * i + half);
          Arch::store(to, p.onto ? Arch::add(sum, Arch::load8(to)) : sum);
        }
  });
  if (end != p.rank || p.waits || p.onto) return;
  for (std::int64_t m = p.rank; m % kStepColumns; ++m)  // these meet weights of zero, and must be numbers
    for (std::int64_t r = 0; r < p.lanes; ++r) at(r, m) = 0.0f;
}

// As finish(), for up to eight outputs of row r from m on
template <class T>
inline void leave(const SecondProduct& to, std::int64_t r, std::int64_t m, int count, Arch::Vec row) {
  if (count < 8 || to.wide) {
    float values[8];
    Arch::store(values, row);
    finish<T>(to, r, m, values, count < 8 ? count : 8);
    return;
  }
  row = Arch::mul(row, Arch::all(to.scale ? to.scale[r] : 1.0f));
  if (to.bias) row = Arch::add(row, Arch::load8(static_cast<const T*>(to.bias) + m));
  if (to.residual) row = Arch::add(row, Arch::load8(static_cast<const T*>(to.residual) + r * to.residual_stride + m));
  Arch::store(static_cast<T*>(to.y) + r * to.y_stride + m, row);
}

template <class T>
void second_float(const ManySecond& p, std::int64_t begin, std::int64_t end) {
  const SecondProduct& to = p.product;
  float_sweep<T>(to.u, to.u_stride, begin, end, reinterpret_cast<const float*>(p.t), p.lanes, to.rank, p.partial, false,
                 false, [&](std::int64_t m, int count, const float* sums) {
    for (std::int64_t r = 0; r < to.rows; r += kGroup, sums += kGroup * kRun)
      for (int i = 0; i < count; i += 8)
        rows_of_panel(sums + kGroup * i, to.rows - r,
                      [&](std::int64_t k, Arch::Vec row) { leave<T>(to, r + k, m + i, count - i, row); });
  });
}
