// Factors of 8-bit integers against fp32 vectors: half the bytes of 16-bit factors, which is what a few rows wait for. A
// weight is widened to fp32 on its way into the sums, so that products are exact but for fp32's own rounding; the scale of
// a direction is applied once, to the intermediate. Included after panel.inl.

// In its own order, filled up with zeros to a whole step
template <class T, class A = Arch>
void widen_row(const void* row, float* out, std::int64_t n) {
  const T* const x = static_cast<const T*>(row);
  std::int64_t j = 0;
  if constexpr (A::kWidth == 16) {
    for (; j + 16 <= n; j += 16) A::store16(out + j, A::load16(x + j));
  }
  for (; j < n; ++j) out[j] = to_float(x[j]);
  for (; j % kStepMultiple; ++j) out[j] = 0.0f;
}

template <class T>
void first_int8(const FirstInt8& p, std::int64_t begin, std::int64_t end) {
  sweep<AgainstF32<std::int8_t>>(
      p.v, p.v_stride, begin, end, p.x, p.x_stride, p.rows, p.in,
      [&](std::int64_t r, std::int64_t m, const float* values, int count) {
        float* const t = p.t + r * p.t_stride + m;
        const T* const direct = p.direct ? static_cast<const T*>(p.direct) + r * p.direct_stride + m : nullptr;
        for (int i = 0; i < count; ++i) {
          const float behind = values[i] * p.v_scale[m + i];
          t[i] = (direct ? behind + to_float(direct[i]) : behind) * p.u_scale[m + i];
        }
      });
}

// p.u holds 8-bit integers, whose scales are in t; everything else is of type T.
template <class T>
void second_int8(const SecondProduct& p, std::int64_t begin, std::int64_t end) {
  sweep<AgainstF32<std::int8_t>>(static_cast<const std::int8_t*>(p.u), p.u_stride, begin, end, p.t, p.layout.stride, p.rows,
                                 p.rank, [&](std::int64_t r, std::int64_t m, const float* values, int count) {
                                   finish<T>(p, r, m, values, count);
                                 });
}

// As store16, but subnormal numbers may become zero. An instruction set with an instruction for it has its own.
template <class T>
struct StoresQuickly {
  template <class A>
  static inline void store32(T* p, typename A::Vec a, typename A::Vec b) {
    A::store16(p, a);
    A::store16(p + 16, b);
  }
};
#ifdef TACO_CONVERTS_BF16
template <>
struct StoresQuickly<BF16> {
  template <class A>
  static inline void store32(BF16* p, typename A::Vec a, typename A::Vec b) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }
};
#endif

template <class T, class A = Arch>
void unpack_rows(const Int8Rows& p, std::int64_t begin, std::int64_t end) {
  if (p.columns == 0) return;  // then there may be no scale to read, and no addresses at all
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int8_t* const row = p.integers + r * p.stride;
    T* const out = static_cast<T*>(p.out) + r * p.out_stride;
    std::int64_t j = 0;
    if constexpr (A::kWidth == 16) {
      const typename A::Vec of_row = A::broadcast(p.scale + (p.scale_of_rows ? r : 0));
      for (; j + 32 <= p.columns; j += 32) {
        const typename A::Pair both = A::load(row + j);
        const typename A::Vec first = p.scale_of_rows ? of_row : A::load16(p.scale + j);
        const typename A::Vec second = p.scale_of_rows ? of_row : A::load16(p.scale + j + 16);
        StoresQuickly<T>::template store32<A>(out + j, A::mul(both.a, first), A::mul(both.b, second));
      }
    }
    for (; j + 4 <= p.columns; j += 4) {
      float four[4];
      for (int i = 0; i < 4; ++i) four[i] = static_cast<float>(row[j + i]) * p.scale[p.scale_of_rows ? r : j + i];
      A::quad_store(out + j, A::quad_load(four));
    }
    if (j < p.columns) {  // fewer than four are left: through a copy
      float four[4] = {};
      T rounded[4];
      for (std::int64_t i = j; i < p.columns; ++i)
        four[i - j] = static_cast<float>(row[i]) * p.scale[p.scale_of_rows ? r : i];
      A::quad_store(rounded, A::quad_load(four));
      for (std::int64_t i = j; i < p.columns; ++i) out[i] = rounded[i - j];
    }
  }
}

template <class T>
constexpr Int8Kernels kInt8 = {unpack_rows<T>, widen_row<T>, first_int8<T>, second_int8<T>};
