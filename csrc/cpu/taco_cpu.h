// Low-rank products on the CPU: y = (x v^T) u^T * scale + bias + residual, with its options.
// Raw pointers and sizes only; no torch, no Python. Strides count elements.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace taco {

enum class Dtype : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

// One factorised linear map of an input that it may share with others.
struct LowRankMap {
  const void* v;  // [rank, in], rows v_stride apart, elements contiguous
  std::int64_t v_stride;
  const void* u;  // [out, rank]
  std::int64_t u_stride;
  const void* bias;  // [out] or null
  void* y;           // [rows, out], contiguous; overlaps none of the inputs
  std::int64_t rank, out;
  const void* residual;  // [rows, out] or null
  std::int64_t residual_stride;
  // [rows, rank], added to the intermediate x v^T, or null; for pivoted_low_rank, which sets it where rows are few
  const void* direct = nullptr;
  std::int64_t direct_stride = 0;
  // [rank] each, or both null: then v and u hold 8-bit integers, each direction of which stands for so many times its own
  // numbers, rounded to the dtype
  const float* v_scale = nullptr;
  const float* u_scale = nullptr;
};

struct LowRankInput {
  // Of every tensor of the call; sums are fp32. So is the rank-sized intermediate, but for more than four rows of bf16 on a
  // CPU with dot products of it: there it is rounded, as between two library products (but not within low_rank_mlp).
  Dtype dtype;
  const void* x;  // [rows, in], rows x_stride apart, elements contiguous
  std::int64_t x_stride;
  std::int64_t rows, in;
  bool normalise;  // x is divided by sqrt(mean(x^2) + eps), row by row
  float eps;
};

enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

// All of these compute on at most `threads` threads of the OpenMP runtime that the process already has, in one parallel
// region for each 64 rows, or in one for all. A problem too small to pay for waking a thread runs on fewer. The bits of the result depend
// on the instruction set, and on whether the rows are 1 to 4, 5 to 8, 9 or 10, 11 to 16, more, or so many that the kernels
// for many rows have them (many_rows_from), but not on the threads.

// y = (x v^T) u^T + bias + residual for each of `count` maps of the same input
void low_rank(const LowRankInput& input, const LowRankMap* maps, int count, int threads);

// y = (x[:, pivot[:rank]] + x[:, pivot[rank:]] v^T) u^T + bias + residual: map.v is [rank, in - rank], `pivot` [in] of indices
// of 4 or 8 bytes. Throws std::out_of_range, before anything is computed, where an index is.
void pivoted_low_rank(const LowRankInput& input, const void* pivot, bool long_index, LowRankMap map, int threads);

// A factorised linear map whose factors are 8-bit integers, with one scale for each direction of either.
struct Int8Map {
  const std::int8_t* v;  // [rank, in], rows v_stride apart, elements contiguous; behind a pivot [rank, in - rank]
  std::int64_t v_stride;
  const float* v_scale;  // [rank]
  const std::int8_t* u;  // [out, rank]
  std::int64_t u_stride;
  const float* u_scale;  // [rank]
  const void* bias;      // [out] or null, of the input's dtype, as y is
  void* y;               // [rows, out], contiguous; overlaps none of the inputs
  std::int64_t rank, out;
};

// Factors of 8-bit integers as numbers of a dtype (isa.h).
struct Int8Rows;
void unpack_int8(Dtype dtype, const Int8Rows& rows, int threads);

// y = ((x v^T * v_scale) * u_scale) u^T + bias; with a pivot [in] of indices of 4 or 8 bytes
// y = ((x[:, pivot[:rank]] + x[:, pivot[rank:]] v^T * v_scale) * u_scale) u^T + bias. Of up to eight rows products and sums
// are fp32 and nothing is rounded in between; of more the scaled weights are rounded to the dtype, a panel at a time, and
// it is low_rank and pivoted_low_rank. Throws std::out_of_range, before anything is computed, where an index is.
void low_rank_int8(const LowRankInput& input, const void* pivot, bool long_index, const Int8Map& map, int threads);

// down(act(gate(x)) * up(x)); the product in the middle is rounded to the dtype. `gate` and `up` have the same `out`,
// which is down's `in`; only down has a y, and none has a residual.
void low_rank_mlp(const LowRankInput& input, const LowRankMap& gate, const LowRankMap& up, const LowRankMap& down,
                  Activation activation, int threads);

struct AttributionBlock;
struct AttributionArgs {
  Dtype dtype;  // of the two products
  const AttributionBlock& block;
  std::int64_t rows, directions;
};

// Adds the per-direction sums of p = a b to the block's doubles. The bits of the result do not depend on the threads.
void attribution(const AttributionArgs& args, int threads);

// For each direction k the sums over tokens t of (grad[t] . u[k]) (x[t] . v[k]), all in fp32 or better.
struct SingularAttribution {
  Dtype dtype;   // of all four
  const void* x;  // [rows, in]
  std::int64_t x_stride;
  const void* grad;  // [rows, out]
  std::int64_t grad_stride;
  const void* v;  // [directions, in]
  std::int64_t v_stride;
  const void* u;  // [directions, out]: the left singular vectors in rows
  std::int64_t u_stride;
  std::int64_t rows, in, out, directions;
  std::int64_t tokens;  // rows of one sequence
  double* totals;  // [5, directions]: signed, absolute, squares, token squares, the open sequence's sum; added to
};

// False, and nothing done, where the instruction set in use has no fast products of many rows with fp32 results (baseline).
// The bits of the result do not depend on the threads.
bool singular_attribution(const SingularAttribution& p, int threads);

// Instruction sets this binary holds and this CPU has, best first.
std::vector<std::string> cpu_isas();
// All that were compiled, best first.
std::vector<std::string> compiled_cpu_isas();
std::string cpu_isa();
bool cpu_is_amd();
// Chooses one of cpu_isas(), or the best for "auto". False if it is not among them.
bool set_cpu_isa(const std::string& name);
// From how many rows on the instruction set in use has kernels for many rows of a dtype; the largest number there is where
// it has none.
std::int64_t many_rows_from(Dtype dtype);

// Threads OpenMP would use by itself; 0 when this binary was compiled without OpenMP.
int omp_threads();

// Reads `bytes` bytes with `threads` threads, as fast as plain loads go; for benchmarks that need a yardstick.
// Returns a checksum so that the reads cannot be dropped.
std::uint64_t read_memory(const void* data, std::int64_t bytes, int threads);

}  // namespace taco
