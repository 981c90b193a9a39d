// What precedes a decode with a pivot: x's columns in the pivot's order. Those behind the identity go, as float32, where a
// further split's partial sums would be, so that the second product adds them up with the others; the rest goes to work
// space, in rows that the first product can read 16 bytes at a time.
#pragma once

#include "decode_common.cuh"

namespace taco::cuda {

struct GatherArgs {
  const void* x;
  int64_t x_stride;
  const void* pivot;
  bool long_pivot;
  int rows, width, rank;  // of x, and of the identity
  float* first;           // [rows][first_pitch]
  int64_t first_pitch;
  void* rest;  // [rows][rest_pitch]
  int64_t rest_pitch;
  int blocks;
};

// Divides the work space of `a` and, with a pivot, lets the decode read what the returned gather will have written.
inline GatherArgs arrange(DecodeArgs& a, void* workspace) {
  const DecodePlan& p = a.plan;
  a.partial = static_cast<float*>(workspace);
  a.squares = a.partial + int64_t(p.planes) * a.call.rows * p.rank_padded;
  GatherArgs g = {};
  if (a.call.pivot == nullptr) return g;
  g.x = a.call.x, g.x_stride = a.call.x_stride, g.pivot = a.call.pivot, g.long_pivot = a.call.long_pivot;
  g.rows = int(a.call.rows), g.rank = int(a.call.members[0].rank), g.width = int(a.call.in) + g.rank;
  g.first = a.partial + int64_t(p.splits) * a.call.rows * p.rank_padded, g.first_pitch = p.rank_padded;
  g.rest = static_cast<char*>(workspace) + p.sums_bytes, g.rest_pitch = p.rest_pitch;
  g.blocks = int(ceil_div(int64_t(g.rows) * g.width, kThreads));
  a.call.x = g.rest, a.call.x_stride = g.rest_pitch;
  return g;
}

template <class T>
TACO_DEVICE void gather(const GatherArgs& a) {
  const int64_t e = int64_t(block_index()) * kThreads + thread_index();
  if (e >= int64_t(a.rows) * a.width) return;
  const int64_t m = e / a.width, c = e % a.width;
  const int64_t from =
      a.long_pivot ? static_cast<const int64_t*>(a.pivot)[c] : int64_t(static_cast<const int32_t*>(a.pivot)[c]);
  const bool inside = from >= 0 && from < a.width;
  const T value = inside ? static_cast<const T*>(a.x)[m * a.x_stride + from] : from_float<T>(0.0f);
  if (c < a.rank) a.first[m * a.first_pitch + c] = to_float(value);
  else static_cast<T*>(a.rest)[m * a.rest_pitch + c - a.rank] = value;
}

}  // namespace taco::cuda
