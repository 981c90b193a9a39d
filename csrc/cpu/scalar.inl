// One value at a time, where no vector is worth it. Included inside the anonymous namespace of each instruction set's
// file, so that every copy is local to it.

inline float as_float(std::uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline std::uint32_t as_bits(float f) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(float f) { return f; }
inline float to_float(std::int8_t i) { return static_cast<float>(i); }
inline float to_float(BF16 h) { return as_float(static_cast<std::uint32_t>(h.bits) << 16); }
inline float to_float(F16 h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h.bits & 0x8000u) << 16;
  const std::uint32_t rest = h.bits & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest << 13));  // inf, nan
  // Scaling by 2^112 moves the exponent from fp16's bias to fp32's, and is exact for subnormal numbers, too.
  return as_float(sign | as_bits(as_float(rest << 13) * as_float(0x77800000u)));
}
