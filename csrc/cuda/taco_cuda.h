// CUDA kernels of taco_kernels: raw pointers, sizes, strides, a stream. No torch, no Python, no hidden state but the
// cached properties of each device; nothing here synchronises with the host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace taco::cuda {

// Most rows the decode kernels take: the width of two matrix-unit tiles.
inline constexpr int kMaxDecodeRows = 16;

// One call y = scale * (x v^T) u^T + bias + residual; scale is 1, or 1 / sqrt(mean(x^2) + eps) per row if `norm`.
// x [rows, in], v [rank, in], u [out, rank], residual [rows, out]: rows strided, last dimension contiguous; strides in
// elements. bias [out] and residual may be null. y [rows, out] is contiguous and overlaps nothing else.
// dtype: 0 float32, 1 float16, 2 bfloat16, for every tensor. Sizes are at least 1, rows at most kMaxDecodeRows.
struct LowRankCall {
  const void* x;
  std::int64_t x_stride;
  const void* v;
  std::int64_t v_stride;
  const void* u;
  std::int64_t u_stride;
  const void* bias;
  const void* residual;
  std::int64_t residual_stride;
  void* y;
  std::int64_t rows, in, rank, out;
  int dtype;
  bool norm;
  float eps;
};

// Bytes of work space that low_rank_decode needs on the current device, whatever the alignment of the tensors; a
// negative number is an error (the negated cudaError). The work space needs no initialisation and 16-byte alignment.
std::int64_t low_rank_decode_workspace_bytes(std::int64_t rows, std::int64_t in, std::int64_t rank, std::int64_t out,
                                             int dtype);

// Launches one kernel on `stream` (a cudaStream_t) of the current device; returns a cudaError (0 is success). The
// launch is cooperative (all blocks resident at once), may be captured into a CUDA graph, and sums in a fixed order:
// the same input gives the same bits. Calls that may run at the same time need work spaces of their own.
int low_rank_decode(const LowRankCall& call, void* workspace, std::size_t workspace_bytes, void* stream);

// What a cudaError means, in words.
const char* error_string(int error);

}  // namespace taco::cuda
