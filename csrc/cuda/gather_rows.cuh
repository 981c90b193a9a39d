// x's columns in another order, for many rows: what goes before the library's products behind a pivot.
//
// A thread takes one column of kGatherRows rows: its index is read once, and as many loads are on their way together.
// Neighbouring threads write neighbouring columns, and where the indices ascend they read neighbouring ones too.
#pragma once

#include "device.cuh"
#include "taco_cuda.h"

namespace taco::cuda {

inline constexpr int kGatherThreads = 256;
inline constexpr int kGatherRows = 8;

inline std::int64_t gather_blocks(const GatherCall& call) {
  return (call.width + kGatherThreads - 1) / kGatherThreads * ((call.rows + kGatherRows - 1) / kGatherRows);
}

// Element is an unsigned integer of the elements' size.
template <class Element, class Index>
TACO_DEVICE void gather_rows(const GatherCall& call) {
  const std::int64_t wide = (call.width + kGatherThreads - 1) / kGatherThreads;
  const std::int64_t column = block_index() % wide * kGatherThreads + thread_index();
  const std::int64_t first = block_index() / wide * kGatherRows;
  if (column >= call.width) return;
  const std::int64_t from = load_input(static_cast<const Index*>(call.pivot) + column);
  const bool inside = from >= 0 && from < call.width;
  const Element* x = static_cast<const Element*>(call.x) + first * call.x_stride + from;
  Element* y = static_cast<Element*>(call.y) + first * call.y_stride + column;
  Element values[kGatherRows];
#pragma unroll
  for (int i = 0; i < kGatherRows; ++i) {
    values[i] = inside && first + i < call.rows ? load_input(x + i * call.x_stride) : Element(0);
  }
#pragma unroll
  for (int i = 0; i < kGatherRows; ++i) {
    if (first + i < call.rows) y[i * call.y_stride] = values[i];
  }
}

}  // namespace taco::cuda
