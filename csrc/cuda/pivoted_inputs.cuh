// A member's inputs where it has a pivot: x's columns in the pivot's order, those behind the identity first.
//
// The kernels gather them themselves, a block the slice that its unit multiplies, so that no launch has to go before.
// Where the two parts of a pivot are sorted (taco_svd's are), neighbouring threads read neighbouring columns.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace taco::cuda {

// Which column of x comes at place i; -1 where x has no such column.
TACO_DEVICE int pivot_at(const LowRankCall& call, const Factors& member, int64_t i) {
  const int64_t column = member.long_pivot ? load_input(static_cast<const int64_t*>(member.pivot) + i)
                                           : load_input(static_cast<const int32_t*>(member.pivot) + i);
  return column >= 0 && column < call.in ? int(column) : -1;
}

// x[m, column]; zero where there is none.
template <class T>
TACO_DEVICE T input_at(const LowRankCall& call, int m, int column) {
  return column >= 0 ? load_input(static_cast<const T*>(call.x) + m * call.x_stride + column) : from_float<T>(0.0f);
}

// staged[m][c] = the input that column begin + c of the member's v multiplies, for `count` columns, at most kPiece. By
// all threads of the block, which has to wait for each other before and after. The elements of `Together` rows are on
// their way at a time.
template <class T, int Rows, int Together>
TACO_DEVICE void stage_inputs(const LowRankCall& call, const Factors& member, T* staged, int pitch, int64_t begin,
                              int count) {
  constexpr int kShare = kPiece / kThreads;
  int column[kShare];  // the indices are on their way together, and then a row's elements
#pragma unroll
  for (int j = 0; j < kShare; ++j) {
    const int c = thread_index() + j * kThreads;
    column[j] = c < count ? pivot_at(call, member, member.rank + begin + c) : -1;
  }
#pragma unroll
  for (int m0 = 0; m0 < Rows; m0 += Together) {
    if (m0 >= int(call.rows)) break;
    T inputs[Together][kShare];
#pragma unroll
    for (int i = 0; i < Together; ++i) {
#pragma unroll
      for (int j = 0; j < kShare; ++j) {
        inputs[i][j] = input_at<T>(call, m0 + i, m0 + i < int(call.rows) ? column[j] : -1);
      }
    }
#pragma unroll
    for (int i = 0; i < Together; ++i) {
#pragma unroll
      for (int j = 0; j < kShare; ++j) {
        const int c = thread_index() + j * kThreads;
        if (m0 + i < int(call.rows) && c < count) staged[(m0 + i) * pitch + c] = inputs[i][j];
      }
    }
  }
}

// What the identity gives to rank r of row m's intermediate.
template <class T>
TACO_DEVICE float identity_at(const LowRankCall& call, const Factors& member, int m, int64_t r) {
  return to_float(input_at<T>(call, m, pivot_at(call, member, r)));
}

}  // namespace taco::cuda
