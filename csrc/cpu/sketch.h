// The random test matrix of the randomized SVD: integers out of Philox, the same on every backend.
// Raw pointers and sizes only; no torch, no Python.
#pragma once

#include <cstdint>

namespace taco {

// Rows of the test matrix are cut into blocks of kSketchBlock. One Philox call gives sixteen bytes: one for each of the
// sixteen runs of kSketchRun consecutive numbers that make up a block.
constexpr std::int64_t kSketchRun = 32;
constexpr std::int64_t kSketchBlock = 16 * kSketchRun;

// out[j, i] = Omega[first_row + j, first_column + i], where Omega[v, i] is entry i of test vector v.
//   call (32 (i / 512) + i mod 32, v), byte (i / 32) mod 16 = b  ->  (2 b - 255) / 128
// Odd integers below 256 have eight significant bits: exact in bf16, and so equal in every dtype.
struct SketchArgs {
  void* out;                  // [rows, columns], rows out_stride apart
  std::int64_t out_stride;
  std::int64_t first_row, rows;
  std::int64_t first_column;  // a multiple of kSketchBlock
  std::int64_t columns;
  std::uint64_t seed;
  bool bf16;                  // else fp32
};

// The result does not depend on the number of threads.
void sketch(const SketchArgs& args, int threads);

}  // namespace taco
