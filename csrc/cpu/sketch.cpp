// Philox4x32-10 (Salmon et al., SC 2011), thirty-two calls at a time: the loops over `lane` are what the compiler
// vectorises, and integers need no instruction beyond the baseline's, so one compilation serves every CPU.
#include "sketch.h"

#include <algorithm>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace taco {
namespace {

constexpr int kLanes = static_cast<int>(kSketchRun);
constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// words[w][lane]: output word w of the call with counter (first + lane, vector, 0, 0).
void philox(std::uint64_t seed, std::uint32_t first, std::uint32_t vector, std::uint32_t words[4][kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    words[0][lane] = first + static_cast<std::uint32_t>(lane);
    words[1][lane] = vector;
    words[2][lane] = 0;
    words[3][lane] = 0;
  }
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += kWeyl0, key1 += kWeyl1)
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint64_t p0 = std::uint64_t{kMultiplier0} * words[0][lane];
      const std::uint64_t p1 = std::uint64_t{kMultiplier1} * words[2][lane];
      const std::uint32_t w1 = words[1][lane], w3 = words[3][lane];
      words[0][lane] = static_cast<std::uint32_t>(p1 >> 32) ^ w1 ^ key0;
      words[1][lane] = static_cast<std::uint32_t>(p1);
      words[2][lane] = static_cast<std::uint32_t>(p0 >> 32) ^ w3 ^ key1;
      words[3][lane] = static_cast<std::uint32_t>(p0);
    }
}

inline void store(float value, float& out) { out = value; }
inline void store(float value, std::uint16_t& out) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out = static_cast<std::uint16_t>(bits >> 16);  // the lower half is zero: nothing is rounded
}

template <class T>
void fill_row(const SketchArgs& a, std::int64_t row, T* out) {
  std::uint32_t words[4][kLanes];
  for (std::int64_t start = 0; start < a.columns; start += kSketchBlock) {
    const std::int64_t block = (a.first_column + start) / kSketchBlock;
    philox(a.seed, static_cast<std::uint32_t>(block * kSketchRun), static_cast<std::uint32_t>(a.first_row + row), words);
    for (int byte = 0; byte < 16; ++byte) {
      const std::int64_t begin = start + byte * kSketchRun;
      if (begin >= a.columns) break;
      T run[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int value = static_cast<int>((words[byte / 4][lane] >> (8 * (byte % 4))) & 0xffu);
        store(static_cast<float>(2 * value - 255) * 0.0078125f, run[lane]);
      }
      std::memcpy(out + begin, run, sizeof(T) * static_cast<std::size_t>(std::min(kSketchRun, a.columns - begin)));
    }
  }
}

}  // namespace

void sketch(const SketchArgs& a, int threads) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && a.rows * a.columns > 65536)
#else
  (void)threads;
#endif
  for (std::int64_t row = 0; row < a.rows; ++row) {
    if (a.bf16)
      fill_row(a, row, static_cast<std::uint16_t*>(a.out) + row * a.out_stride);
    else
      fill_row(a, row, static_cast<float*>(a.out) + row * a.out_stride);
  }
}

}  // namespace taco
