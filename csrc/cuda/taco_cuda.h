// CUDA kernels of taco_kernels: raw pointers, sizes, strides, a stream. No torch, no Python, no hidden state but the
// cached properties of each device; nothing here synchronises with the host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace taco::cuda {

// Most rows the decode kernels take: the width of two matrix-unit tiles.
inline constexpr int kMaxDecodeRows = 16;

// Most members of one call.
inline constexpr int kMaxMembers = 4;

// One factorised linear: v [rank, in], u [out, rank], y [rows, out], rows strided (in elements), last dimension
// contiguous; bias [out] may be null; y overlaps nothing else. rank and out are at least 1.
// With a pivot v is [rank, in - rank] and multiplies x[:, pivot[rank:]], and x[:, pivot[:rank]] is added to that product.
// An index out of range reads zero.
struct Factors {
  const void* v;
  std::int64_t v_stride;
  const void* u;
  std::int64_t u_stride;
  const void* bias;
  void* y;
  std::int64_t y_stride;
  std::int64_t rank, out;
  const void* pivot;  // [in], or null
  bool long_pivot;    // 64 bits each, not 32
};

// What becomes of two members' results in the gated form: y of the first is act(first) * second.
enum Gate : int { kNoGate = 0, kSilu = 1, kGeluTanh = 2, kGelu = 3, kRelu = 4 };

// How the two products of a call follow each other.
enum Launch : int {
  kCooperative = 0,  // one kernel with a barrier over the whole grid between them
  kDependent = 1,    // two kernels, the second launched early (programmatic dependent launch); Hopper and later
};

// One call y = scale * (x v^T) u^T + bias + residual for each of `count` members; scale is 1, or
// 1 / sqrt(mean(x^2) + eps) per row if `norm`. x [rows, in] and residual [rows, out] (of a single member; may be null)
// have strided rows. dtype: 0 float32, 1 float16, 2 bfloat16, for every tensor. Rows are at most kMaxDecodeRows.
// A gated call has exactly two members of one `out`, and no residual. Where a member has a pivot there is no norm.
struct LowRankCall {
  const void* x;
  std::int64_t x_stride;
  const void* residual;
  std::int64_t residual_stride;
  std::int64_t rows, in;
  Factors members[kMaxMembers];
  int count;
  int gate;
  int dtype;
  bool norm;
  float eps;
};

// Bytes of work space that low_rank_decode needs on the current device for calls of these sizes (of pointers it matters
// only which members have a pivot, and no strides do), whatever the alignment of the tensors; a negative number is an error
// (the negated cudaError). The work space needs no initialisation and 16-byte alignment.
std::int64_t low_rank_decode_workspace_bytes(const LowRankCall& call);

// Launches one call on `stream` (a cudaStream_t) of the current device; returns a cudaError (0 is success). May be
// captured into a CUDA graph, and sums in a fixed order: the same input gives the same bits, with either launch. Calls
// that may run at the same time need work spaces of their own. Where the device, the code that it runs (PTX of an
// earlier architecture) or the driver (before CUDA 12.3) has no dependent launch, or none in graphs, kDependent launches
// its two kernels one after the other; where a cooperative launch is not supported or has been refused, as of more blocks
// than this process's share of the device holds, kCooperative does what kDependent does.
int low_rank_decode(const LowRankCall& call, Launch launch, void* workspace, std::size_t workspace_bytes, void* stream);

// y[:, c] = x[:, pivot[c]]; zero where x has no such column. x [rows, width] and y of the same shape have strided rows and
// elements of 2 or 4 bytes; y overlaps nothing else. rows and width are at least 1.
struct GatherCall {
  const void* x;
  std::int64_t x_stride;
  const void* pivot;  // [width]
  bool long_pivot;    // 64 bits each, not 32
  void* y;
  std::int64_t y_stride;
  std::int64_t rows, width;
  int element;  // bytes
};

// Launches one call on `stream` (a cudaStream_t) of the current device; returns a cudaError (0 is success).
int gather(const GatherCall& call, void* stream);

// Why the kernels cannot be launched on the current device, in words; empty where they can. Leaves no error behind.
const char* why_unusable();

// The index of the current device; a negative number is an error (the negated cudaError).
int current_device_index();

// What a cudaError means, in words.
const char* error_string(int error);

}  // namespace taco::cuda
