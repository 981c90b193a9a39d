// Decode kernels for everything that the matrix unit does not take: plain multiply-adds, one warp per weight row; see
// decode_common.cuh.
#pragma once

#include "decode_common.cuh"

namespace taco::cuda {

// Vector neighbouring elements in float32. Vector is 16 bytes' worth, or 1 where rows are not 16-byte aligned.
template <class T, int Vector>
TACO_DEVICE void load_vector(float (&values)[Vector], const T* address) {
  if constexpr (Vector == 1) {
    values[0] = to_float(*address);
  } else {
    static_assert(Vector * sizeof(T) == 16, "one 16-byte load");
    const uint4 bits = load_activations(address);
    T elements[Vector];
    memcpy(elements, &bits, 16);
#pragma unroll
    for (int i = 0; i < Vector; ++i) values[i] = to_float(elements[i]);
  }
}

template <class T, int Vector, int Rows>
TACO_DEVICE void first_product_plain(const DecodeArgs& a) {
  const LowRankCall& call = a.call;
  const DecodePlan& plan = a.plan;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int rows = int(call.rows), ranks = plan.unit_start[call.count];

  for (int64_t item = int64_t(block_index()) * kWarps + warp; item < int64_t(ranks) * plan.splits;
       item += int64_t(plan.blocks) * kWarps) {
    const int unit = int(item % ranks), split = int(item / ranks);
    const int index = range_of(plan.unit_start, call.count, unit);
    const int64_t r = unit - plan.unit_start[index];
    const Factors& member = call.members[index];
    const int64_t length = plan.split_length[index], columns = plan.columns[index];
    const int64_t begin = split * length, end = begin + length < columns ? begin + length : columns;
    const T* v = static_cast<const T*>(member.v) + r * member.v_stride;
    const bool gathers = member.pivot != nullptr;
    float sum[Rows] = {}, squares[Rows] = {};
    // The columns are a multiple of Vector (or Vector is 1), so a vector that starts inside ends inside.
    for (int64_t k0 = begin + lane * Vector; k0 < end; k0 += kUnroll * 32 * Vector) {
      float weights[kUnroll][Vector], x[Vector];  // the weights are all on their way before the first are used
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int64_t k = k0 + j * 32 * Vector;
        if (k < end) load_vector<T, Vector>(weights[j], v + k);
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int64_t k = k0 + j * 32 * Vector;
        if (k >= end) break;
        int column[Vector];
#pragma unroll
        for (int i = 0; i < Vector; ++i) column[i] = gathers ? pivot_at(call, member, member.rank + k + i) : 0;
#pragma unroll
        for (int m = 0; m < Rows; ++m) {
          if (m < rows) {
            if (gathers) {
#pragma unroll
              for (int i = 0; i < Vector; ++i) x[i] = to_float(input_at<T>(call, m, column[i]));
            } else {
              load_vector<T, Vector>(x, static_cast<const T*>(call.x) + m * call.x_stride + k);
            }
#pragma unroll
            for (int i = 0; i < Vector; ++i) sum[m] = multiply_add(weights[j][i], x[i], sum[m]);
            if (call.norm && unit == 0) {
#pragma unroll
              for (int i = 0; i < Vector; ++i) squares[m] = multiply_add(x[i], x[i], squares[m]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Rows; ++m) {
      if (m < rows) {
        float total = lane_sum<32>(sum[m]);
        if (gathers && split == 0) total += identity_at<T>(call, member, m, r);
        if (lane == 0) a.partial[(split * rows + m) * plan.rank_padded + plan.rank_start[index] + r] = total;
        if (call.norm && unit == 0) {
          const float square = lane_sum<32>(squares[m]);
          if (lane == 0) a.squares[split * rows + m] = square;
        }
      }
    }
  }
}

template <class T, int Vector, int Rows>
TACO_DEVICE void second_product_plain(const DecodeArgs& a, const Shared& shared) {
  const DecodePlan& plan = a.plan;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int rows = int(a.call.rows);

  for (int phase = 0; phase < plan.phases; ++phase) {
    const int64_t out = a.call.members[phase].out;
    const int64_t first = int64_t(block_index()) * kWarps, step = int64_t(plan.blocks) * kWarps;
    for (int64_t base = first; base < out; base += step) {
      const int64_t n = base + warp;
      float held[Rows] = {};
      for (int which = 0; which < plan.width; ++which) {
        const Factors& member = a.call.members[phase + which];
        const int rank = int(member.rank);
        float* t = reinterpret_cast<float*>(shared.t) + which * Rows * plan.t_pitch;
        float sum[Rows] = {};
        for (int r0 = 0; r0 < rank; r0 += plan.t_capacity) {
          if (base == first || plan.t_capacity < rank) {  // where it fits, t is loaded once in a phase
            block_barrier();
            const int quads = plan.t_capacity / 4;
            for (int e = thread_index(); e < rows * quads; e += kThreads) {
              const int m = e / quads, r = e % quads * 4;
              if (r0 + r >= rank) continue;  // never read: the sums below stop at the rank
              *reinterpret_cast<float4*>(t + m * plan.t_pitch + r) =
                  combine_parts(a, phase + which, m, r0 + r, shared.scale[m]);
            }
            block_barrier();
          }
          const int length = rank - r0 < plan.t_capacity ? rank - r0 : plan.t_capacity;
          if (n < out) {
            const T* u = static_cast<const T*>(member.u) + n * member.u_stride + r0;
            for (int k0 = lane * Vector; k0 < length; k0 += kUnroll * 32 * Vector) {
              float weights[kUnroll][Vector];
#pragma unroll
              for (int j = 0; j < kUnroll; ++j) {
                const int k = k0 + j * 32 * Vector;
                if (k < length) load_vector<T, Vector>(weights[j], u + k);
              }
#pragma unroll
              for (int j = 0; j < kUnroll; ++j) {
                const int k = k0 + j * 32 * Vector;
                if (k >= length) break;
#pragma unroll
                for (int m = 0; m < Rows; ++m) {
                  if (m < rows) {
#pragma unroll
                    for (int i = 0; i < Vector; ++i) {
                      sum[m] = multiply_add(weights[j][i], t[m * plan.t_pitch + k + i], sum[m]);
                    }
                  }
                }
              }
            }
          }
        }
        if (n < out) {
#pragma unroll
          for (int m = 0; m < Rows; ++m) {
            if (m < rows) {
              const float total = lane_sum<32>(sum[m]);
              if (lane == 0) store_output<T>(a, member, which, m, n, total, held[m]);
            }
          }
        }
      }
    }
  }
}

template <class T, int Vector, int Rows, Part part>
TACO_DEVICE void decode_plain(const DecodeArgs& a) {
  const Shared shared = shared_layout(Rows);
  if constexpr (part == Part::kFirst) let_next_kernel_start();
  if constexpr (part != Part::kFirst) prefetch_epilogues<T>(a);
  if constexpr (part != Part::kSecond) first_product_plain<T, Vector, Rows>(a);
  if constexpr (part == Part::kBoth) grid_barrier();
  if constexpr (part == Part::kSecond) wait_for_previous_kernel();
  if constexpr (part != Part::kFirst) {
    compute_scale(a, shared.scale);  // read after the block barrier in front of the first load of t
    second_product_plain<T, Vector, Rows>(a, shared);
  }
}

}  // namespace taco::cuda
