// act(gate) * up in fp32, rounded to T: plain loops that the compiler vectorises for each instruction set.
// Included after panel.inl.

// a b + c, fused where the instruction set has that: contraction by the compiler is off (setup.py), so it is said here.
inline float fused(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x. Relative error below 2^-22 between the clamps, which stay clear of subnormal numbers; infinite above, or an
// activation's argument of 1e38 would not be damped to nothing.
inline float exponential(float exponent) {
  const float x = exponent < -87.0f ? -87.0f : exponent > 88.0f ? 88.0f : exponent;
  // x = n ln 2 + f, |f| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer in the low bits without a conversion.
  const float shifted = fused(x, 1.44269504f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts: n times the first one is exact.
  const float f = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
  // Taylor's series to f^7: the first term left out is below 2^-27
  float p = 1.0f / 5040.0f;
  p = fused(p, f, 1.0f / 720.0f);
  p = fused(p, f, 1.0f / 120.0f);
  p = fused(p, f, 1.0f / 24.0f);
  p = fused(p, f, 1.0f / 6.0f);
  p = fused(p, f, 0.5f);
  p = fused(p, f, 1.0f);
  p = fused(p, f, 1.0f);
  std::int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  // n, in the low bits, moves into the exponent's place; the constant's own bits leave at the top
  bits = static_cast<std::int32_t>((static_cast<std::uint32_t>(bits) + 127u) << 23);
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return exponent > 88.0f ? __builtin_inff() : p * power;
}

template <int kActivation>
inline float activated(float x) {
  if (kActivation == 0) return x / (1.0f + exponential(-x));  // silu
  if (kActivation == 1) {
    // gelu_tanh: (1 + tanh z) / 2 = 1 / (1 + e^(-2 z))
    const float z = 0.797884561f * fused(0.044715f * x * x, x, x);
    return x / (1.0f + exponential(-2.0f * z));
  }
  if (kActivation == 2) return 0.5f * x * __builtin_erfcf(-0.707106781f * x);  // gelu
  return x > 0.0f ? x : x == x ? 0.0f : x;                                // relu; a nan stays one
}

template <class T, int kActivation>
inline void gating_rows(const Gating& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = 0; r < p.rows; ++r) {
    const float* gate = p.gate + r * p.stride;
    const float* up = p.up + r * p.stride;
    T* hidden = static_cast<T*>(p.hidden) + r * p.hidden_stride;
    for (std::int64_t m = begin; m < end; m += kTile) {
      const int count = static_cast<int>(end - m < kTile ? end - m : kTile);
      float values[kTile];
      if (count == kTile) {
        for (int i = 0; i < static_cast<int>(kTile); ++i) values[i] = activated<kActivation>(gate[m + i]) * up[m + i];
      } else {
        for (int i = 0; i < count; ++i) values[i] = activated<kActivation>(gate[m + i]) * up[m + i];
      }
      finish_run<T, T>(hidden + m, values, count, 1.0f, nullptr, nullptr);
    }
  }
}

template <class T>
void gating(const Gating& p, std::int64_t begin, std::int64_t end) {
  switch (p.activation) {
    case 0: gating_rows<T, 0>(p, begin, end); break;
    case 1: gating_rows<T, 1>(p, begin, end); break;
    case 2: gating_rows<T, 2>(p, begin, end); break;
    default: gating_rows<T, 3>(p, begin, end); break;
  }
}
