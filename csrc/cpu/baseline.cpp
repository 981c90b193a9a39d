// The instruction set every CPU has: plain C++, vectorised by the compiler as far as the target allows.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace taco {
namespace {

#include "scalar.inl"

inline void from_float(float f, float& out) { out = f; }
inline void from_float(float f, BF16& out) {
  const std::uint32_t bits = as_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    out.bits = static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // a nan stays a nan, whatever its low bits were
  else
    out.bits = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
}
inline void from_float(float f, F16& out) {
  const std::uint32_t bits = as_bits(f), sign = (bits >> 16) & 0x8000u;
  std::uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    rest = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
    rest = 0x7c00u;
  } else if (rest < 0x38800000u) {
    // Below fp16's smallest normal number: adding 0.5 lets the fp32 adder round at fp16's last place, 2^-24.
    rest = as_bits(as_float(rest) + 0.5f) - 0x3f000000u;
  } else {
    rest = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<std::uint16_t>(sign | rest);
}

struct Arch {
  static constexpr int kWidth = 8;
  static constexpr int kMaxRows = 2;
  static constexpr bool kAsksAhead = true;
  struct Vec {
    float v[kWidth];
  };
  struct Pair {
    Vec a, b;
  };
  struct Quad {
    float v[4];
  };
  static inline Vec zero() { return Vec{}; }
  static inline Vec add(const Vec& a, const Vec& b) {
    Vec c;
    for (int i = 0; i < kWidth; ++i) c.v[i] = a.v[i] + b.v[i];
    return c;
  }
  static inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    Vec d;
    for (int i = 0; i < kWidth; ++i) d.v[i] = a.v[i] * b.v[i] + c.v[i];
    return d;
  }
  static inline Vec mul(const Vec& a, const Vec& b) {
    Vec c;
    for (int i = 0; i < kWidth; ++i) c.v[i] = a.v[i] * b.v[i];
    return c;
  }
  static inline Vec abs(const Vec& a) {
    Vec c;
    for (int i = 0; i < kWidth; ++i) c.v[i] = as_float(as_bits(a.v[i]) & 0x7fffffffu);
    return c;
  }
  static inline void store(float* p, const Vec& a) { std::memcpy(p, a.v, sizeof(a.v)); }
  template <class T>
  static inline Pair load(const T* p) {
    Pair out;
    for (int i = 0; i < kWidth; ++i) out.a.v[i] = to_float(p[i]);
    for (int i = 0; i < kWidth; ++i) out.b.v[i] = to_float(p[kWidth + i]);
    return out;
  }
  template <class T>
  static inline Pair load_tail(const T* p, std::int64_t n) {
    T padded[2 * kWidth] = {};
    for (std::int64_t i = 0; i < n; ++i) padded[i] = p[i];
    return load(padded);
  }
  static inline Pair load_pair(const float* p) { return load(p); }
  template <class T>
  static inline std::int64_t position(const T*, std::int64_t j) {
    return j;
  }
  static inline float sum(const Vec& a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
  }
  static inline Quad reduce4(const Vec& a, const Vec& b, const Vec& c, const Vec& d) {
    return Quad{{sum(a), sum(b), sum(c), sum(d)}};
  }
  static inline Quad quad_scale(const Quad& q, float s) {
    return Quad{{q.v[0] * s, q.v[1] * s, q.v[2] * s, q.v[3] * s}};
  }
  static inline Quad quad_add(const Quad& p, const Quad& q) {
    return Quad{{p.v[0] + q.v[0], p.v[1] + q.v[1], p.v[2] + q.v[2], p.v[3] + q.v[3]}};
  }
  template <class T>
  static inline Quad quad_load(const T* p) {
    return Quad{{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <class T>
  static inline void quad_store(T* p, const Quad& q) {
    for (int i = 0; i < 4; ++i) from_float(q.v[i], p[i]);
  }
  static inline void prefetch(const void*) {}  // left to the hardware where nothing is known about it
};

#include "panel.inl"
#include "gating.inl"
#include "attribution.inl"
#include "int8.inl"

}  // namespace

const CpuKernels kBaselineKernels = {
    "baseline",
    {{first_product<Converted<float>, float>, second_product<float>, sum_of_squares<float>, gating<float>,
      attribution<float>, kInt8<float>},
     {first_product<Converted<F16>, F16>, second_product<F16>, sum_of_squares<F16>, gating<F16>,
      attribution<F16>, kInt8<F16>},
     {first_product<Converted<BF16>, BF16>, second_product<BF16>, sum_of_squares<BF16>, gating<BF16>,
      attribution<BF16>, kInt8<BF16>}}};

}  // namespace taco
