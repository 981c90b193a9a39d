// Results of a second product whose batch rows are the lanes of a vector. Included after panel.inl.

// emit(i, sums of 16 outputs) for the first `rows` rows of 16 sums whose lanes are rows. Each row has kFold lanes, whose parts
// of a sum are added.
template <int kFold, class Emit>
inline void each_row(typename Arch::Vec (&sums)[16], std::int64_t rows, Emit emit) {
  Arch::transpose(sums);
  for (int i = 0; i < Layout::kLanes / kFold && i < rows; ++i) {
    typename Arch::Vec row = sums[i * kFold];
    if constexpr (kFold == 2) row = Arch::add(row, sums[i * kFold + 1]);
    emit(i, row);
  }
}

// 16 sums of as many outputs leave.
template <class T, int kFold>
inline void store_tile(const SecondProduct& p, std::int64_t first_row, std::int64_t m, int count,
                       typename Arch::Vec (&sums)[16]) {
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + m : nullptr;
  each_row<kFold>(sums, p.rows - first_row, [&](int i, typename Arch::Vec row) {
    const std::int64_t r = first_row + i;
    if (count == 16 && !p.wide) {
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + r * p.residual_stride + m : nullptr;
      Arch::finish16(static_cast<T*>(p.y) + r * p.y_stride + m, row, p.scale ? p.scale[r] : 1.0f, bias, residual);
    } else {
      alignas(64) float values[16];
      Arch::store16(values, row);
      finish<T>(p, r, m, values, count);
    }
  });
}
