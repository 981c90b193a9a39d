// The reduction behind singular_attribution, over the same vector operations as panel.inl (included after it, inside
// each instruction set's anonymous namespace).
//
// One sweep over the two products a and b: p = a b, and four sums of it per column. A column's sums stay in registers
// for kFlush rows, then go to doubles: fp32 chains stay short, and what is added per column costs one pass over the
// rows instead of the eight that separate library calls make.

constexpr std::int64_t kFlush = 64;

template <class T>
void attribution(const AttributionBlock& p, std::int64_t begin, std::int64_t end) {
  const T* const a = static_cast<const T*>(p.a);
  const T* const b = static_cast<const T*>(p.b);
  for (std::int64_t j = begin; j < end; j += kStep) {
    const std::int64_t width = end - j < kStep ? end - j : kStep;
    std::int64_t position = p.position;  // rows of the current sequence that have gone by
    std::int64_t row = 0;
    while (row < p.rows) {
      const std::int64_t left = p.rows - row, sequence = p.tokens - position;
      const std::int64_t most = sequence < kFlush ? sequence : kFlush;
      const std::int64_t stop = row + (left < most ? left : most);
      typename Arch::Vec sum[2] = {Arch::zero(), Arch::zero()}, sizes[2] = {Arch::zero(), Arch::zero()},
                         squares[2] = {Arch::zero(), Arch::zero()};
      position += stop - row;
      for (; row < stop; ++row) {
        const T* const x = a + row * p.a_stride + j;
        const T* const y = b + row * p.b_stride + j;
        const bool whole = width == kStep;
        const typename Arch::Pair xs = whole ? Arch::load(x) : Arch::load_tail(x, width);
        const typename Arch::Pair ys = whole ? Arch::load(y) : Arch::load_tail(y, width);
        const typename Arch::Vec first = Arch::mul(xs.a, ys.a), second = Arch::mul(xs.b, ys.b);
        sum[0] = Arch::add(sum[0], first);
        sum[1] = Arch::add(sum[1], second);
        sizes[0] = Arch::add(sizes[0], Arch::abs(first));
        sizes[1] = Arch::add(sizes[1], Arch::abs(second));
        squares[0] = Arch::fma(first, first, squares[0]);
        squares[1] = Arch::fma(second, second, squares[1]);
      }
      float sums[3][kStep];
      Arch::store(sums[0], sum[0]);
      Arch::store(sums[0] + Arch::kWidth, sum[1]);
      Arch::store(sums[1], sizes[0]);
      Arch::store(sums[1] + Arch::kWidth, sizes[1]);
      Arch::store(sums[2], squares[0]);
      Arch::store(sums[2] + Arch::kWidth, squares[1]);
      const bool ends = position == p.tokens;
      if (ends) position = 0;
      for (std::int64_t i = 0; i < width; ++i) {
        // Half types are widened in an order of their own (see Arch::position).
        const std::int64_t at = Arch::position(static_cast<const T*>(nullptr), i);
        p.absolute[j + i] += sums[1][at];
        p.token_squares[j + i] += sums[2][at];
        const double total = p.open[j + i] + sums[0][at];
        if (ends) {
          p.signed_sum[j + i] += total;
          p.squares[j + i] += total * total;
        }
        p.open[j + i] = ends ? 0.0 : total;
      }
    }
  }
}
