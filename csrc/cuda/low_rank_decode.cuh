// Decode kernels (1 to 16 rows): y = scale * (x v^T) u^T + bias + residual in one launch.
//
//   u's tiles start travelling to shared memory
//   t_partial[split] = x[:, slice] v[:, slice]^T        units of 16 ranks x one slice of `in`; float32, to work space
//   ---- barrier over the whole grid ----
//   t = scale * sum over splits                         every block, in a fixed order, into its shared memory
//   y = t u^T + bias + residual                         tiles of 16 outputs
//
// At these sizes the weights' bytes are all that costs: each is read once, by a 16-byte load that the thread's own
// lane of the matrix unit consumes, so weights pass through no transposition and (before the barrier) no shared memory.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace taco::cuda {

struct DecodeArgs {
  LowRankCall call;
  DecodePlan plan;
  float* partial;  // [splits][rows][rank_padded]
  float* squares;  // [splits][rows]
};

// Shared memory, in this order (see header_bytes).
struct Shared {
  float* sums;      // [kWarps][rows_padded][kTile]: what the warps of a block have to add up
  float* scale;     // [rows]
  float* squares;   // [kWarps][kMaxDecodeRows]
  void* barrier;    // of the copies
  char* t;          // the intermediate
};

TACO_DEVICE Shared shared_layout(int rows_padded) {
  char* at = shared_memory();
  Shared s;
  s.sums = reinterpret_cast<float*>(at);
  at += kWarps * rows_padded * kTile * 4;
  s.scale = reinterpret_cast<float*>(at);
  at += kScaleBytes;
  s.squares = reinterpret_cast<float*>(at);
  at += kSquaresBytes;
  s.barrier = at;
  s.t = at + kBarrierBytes;
  return s;
}

template <class T>
TACO_DEVICE float pair_low(uint32_t pair) {
  const uint16_t bits = uint16_t(pair);
  T value;
  static_assert(sizeof(T) == 2, "half types only");
  memcpy(&value, &bits, 2);
  return to_float(value);
}
template <class T>
TACO_DEVICE float pair_high(uint32_t pair) {
  return pair_low<T>(pair >> 16);
}
template <class T>
TACO_DEVICE uint32_t make_pair(float low, float high) {
  const T values[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t pair;
  memcpy(&pair, values, 4);
  return pair;
}
template <class T>
TACO_DEVICE float pair_squares(uint32_t pair) {
  const float low = pair_low<T>(pair), high = pair_high<T>(pair);
  return low * low + high * high;
}

// One step of 32 elements: a 16-row weight tile against 8 rows of activations. Lane 4 g + q holds elements
// 8 q ... 8 q + 7 of weight rows g and g + 8 and of activation row g. The matrix unit expects other positions along
// the sum, but the same ones for both operands, and a sum has no order.
template <class T>
TACO_DEVICE void tile_step(float (&c)[4], const uint4& top, const uint4& bottom, const uint4& x) {
  mma<T>(c, top.x, bottom.x, top.y, bottom.y, x.x, x.y);
  mma<T>(c, top.z, bottom.z, top.w, bottom.w, x.z, x.w);
}

// Puts a warp's 16 x 8 accumulators into sums[warp][row][tile row].
TACO_DEVICE void deposit(float* sums, int rows_padded, int warp, int lane, int row0, const float (&c)[4]) {
  const int g = lane / 4, q = lane % 4;
  float* mine = sums + (warp * rows_padded + row0) * kTile;
  mine[(2 * q) * kTile + g] = c[0];
  mine[(2 * q + 1) * kTile + g] = c[1];
  mine[(2 * q) * kTile + g + 8] = c[2];
  mine[(2 * q + 1) * kTile + g + 8] = c[3];
}

// Row scales from the splits' sums of squares (1 without a norm); needs a block barrier before they are read.
TACO_DEVICE void compute_scale(const DecodeArgs& a, float* scale) {
  const int m = thread_index();
  if (m >= int(a.call.rows)) return;
  float factor = 1.0f;
  if (a.call.norm) {
    float total = 0.0f;
    for (int s = 0; s < a.plan.splits; ++s) total += load_written(a.squares + s * a.call.rows + m);
    factor = inverse_sqrt(total / float(a.call.in) + a.call.eps);
  }
  scale[m] = factor;
}

// Four neighbouring elements of t: ranks r ... r + 3 of row m. Beyond the rank they may be whatever the work space
// held before: the matrix unit's ranks come in eights, and the plain kernel's sums stop at the rank.
TACO_DEVICE float4 combine_splits(const DecodeArgs& a, int m, int r, float scale) {
  float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
  const int64_t plane = a.call.rows * a.plan.rank_padded;
  const float* from = a.partial + int64_t(m) * a.plan.rank_padded + r;
#pragma unroll 4
  for (int s = 0; s < a.plan.splits; ++s) {
    const float4 part = load_written4(from + s * plane);
    total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
  }
  total.x *= scale, total.y *= scale, total.z *= scale, total.w *= scale;
  return total;
}

template <class T>
TACO_DEVICE void store_output(const DecodeArgs& a, int m, int64_t n, float value) {
  if (a.call.bias != nullptr) value += to_float(static_cast<const T*>(a.call.bias)[n]);
  if (a.call.residual != nullptr) {
    value += to_float(static_cast<const T*>(a.call.residual)[m * a.call.residual_stride + n]);
  }
  static_cast<T*>(a.call.y)[m * a.call.out + n] = from_float<T>(value);
}

// What rounding to T left over, as a T. An infinite `rounded` (float16 beyond 65504) leaves nothing: infinity stays
// infinity, as in two separate products, and does not become NaN.
template <class T>
TACO_DEVICE float remainder_of(float value, float rounded) {
  const float rest = value - rounded;
  return rest - rest == 0.0f ? rest : 0.0f;
}

// --- half types, 16-byte rows: matrix unit ---------------------------------------------------------------------------

// Groups is the number of 8-row groups of activations (1 or 2).
template <class T, int Groups>
TACO_DEVICE void first_product_mma(const DecodeArgs& a, const Shared& shared) {
  constexpr int kRows = 8 * Groups;
  constexpr int kUnroll = 4;  // steps whose loads are all on their way before the first is used
  const LowRankCall& call = a.call;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, q = lane % 4;
  const int rank_tiles = int((call.rank + kTile - 1) / kTile);
  const uint4 zero = {0, 0, 0, 0};
  for (int unit = block_index(); unit < rank_tiles * a.plan.splits; unit += a.plan.blocks) {
    const int tile = unit % rank_tiles, split = unit / rank_tiles;
    const int64_t top_row = int64_t(tile) * kTile + g, bottom_row = top_row + 8;
    const bool has_top = top_row < call.rank, has_bottom = bottom_row < call.rank;
    const T* top = static_cast<const T*>(call.v) + (has_top ? top_row : 0) * call.v_stride;
    const T* bottom = static_cast<const T*>(call.v) + (has_bottom ? bottom_row : 0) * call.v_stride;
    const int64_t begin = int64_t(split) * a.plan.split_length;
    const int64_t end = begin + a.plan.split_length < call.in ? begin + a.plan.split_length : call.in;

    float sum[Groups][4] = {};
    float squares[Groups] = {};
    for (int64_t k0 = begin + warp * kChunk; k0 < end; k0 += kWarps * kChunk * kUnroll) {
      uint4 tops[kUnroll], bottoms[kUnroll], xs[kUnroll][Groups];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int64_t k = k0 + j * kWarps * kChunk + q * 8;
        const bool inside = k < end;
        tops[j] = inside && has_top ? load_weights(top + k) : zero;
        bottoms[j] = inside && has_bottom ? load_weights(bottom + k) : zero;
#pragma unroll
        for (int n = 0; n < Groups; ++n) {
          const int m = n * 8 + g;
          const T* x = static_cast<const T*>(call.x) + m * call.x_stride + k;
          xs[j][n] = inside && m < call.rows ? load_activations(x) : zero;
        }
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
#pragma unroll
        for (int n = 0; n < Groups; ++n) {
          tile_step<T>(sum[n], tops[j], bottoms[j], xs[j][n]);
          if (call.norm && tile == 0) {
            const uint4& x = xs[j][n];
            squares[n] += pair_squares<T>(x.x) + pair_squares<T>(x.y) + pair_squares<T>(x.z) + pair_squares<T>(x.w);
          }
        }
      }
    }

#pragma unroll
    for (int n = 0; n < Groups; ++n) {
      deposit(shared.sums, kRows, warp, lane, n * 8, sum[n]);
      if (call.norm && tile == 0) {
        const float total = lane_sum<4>(squares[n]);
        if (q == 0) shared.squares[warp * kMaxDecodeRows + n * 8 + g] = total;
      }
    }
    block_barrier();
    for (int e = thread_index(); e < int(call.rows) * kTile; e += kThreads) {
      const int m = e / kTile, i = e % kTile;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shared.sums[(w * kRows + m) * kTile + i];
      a.partial[(split * call.rows + m) * a.plan.rank_padded + tile * kTile + i] = total;
    }
    if (call.norm && tile == 0 && thread_index() < int(call.rows)) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shared.squares[w * kMaxDecodeRows + thread_index()];
      a.squares[split * call.rows + thread_index()] = total;
    }
    block_barrier();  // the next unit writes over the sums
  }
}

// t [rows_padded][t_pitch] for ranks r0 ..., as a T and what that left over (also a T): together as good as float32.
template <class T>
TACO_DEVICE void load_t_mma(const DecodeArgs& a, const Shared& shared, int r0) {
  T* high = reinterpret_cast<T*>(shared.t);
  T* low = high + a.plan.rows_padded * a.plan.t_pitch;
  const int quads = a.plan.t_capacity / 4;
  for (int e = thread_index(); e < a.plan.rows_padded * quads; e += kThreads) {
    const int m = e / quads, r = e % quads * 4;
    float4 t = {0.0f, 0.0f, 0.0f, 0.0f};
    if (m < int(a.call.rows) && r0 + r < int(a.call.rank)) t = combine_splits(a, m, r0 + r, shared.scale[m]);
    uint2 h, l;
    h.x = make_pair<T>(t.x, t.y), h.y = make_pair<T>(t.z, t.w);
    l.x = make_pair<T>(remainder_of<T>(t.x, pair_low<T>(h.x)), remainder_of<T>(t.y, pair_high<T>(h.x)));
    l.y = make_pair<T>(remainder_of<T>(t.z, pair_low<T>(h.y)), remainder_of<T>(t.w, pair_high<T>(h.y)));
    *reinterpret_cast<uint2*>(high + m * a.plan.t_pitch + r) = h;
    *reinterpret_cast<uint2*>(low + m * a.plan.t_pitch + r) = l;
  }
}

template <class T, int Groups>
TACO_DEVICE void second_product_mma(const DecodeArgs& a, const Shared& shared, const char* u_shared) {
  constexpr int kRows = 8 * Groups;
  const LowRankCall& call = a.call;
  const DecodePlan& plan = a.plan;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, q = lane % 4;
  const int rank_warps = kWarps / plan.tile_warps;
  const int out_tiles = int((call.out + kTile - 1) / kTile);
  const int local_tiles = block_index() < out_tiles ? (out_tiles - block_index() + plan.blocks - 1) / plan.blocks : 0;
  const bool whole = plan.t_capacity >= int(call.rank);  // t fits: load it once
  const T* high = reinterpret_cast<const T*>(shared.t);
  const T* low = high + plan.rows_padded * plan.t_pitch;
  const uint4 zero = {0, 0, 0, 0};

  for (int first = 0; first < local_tiles; first += plan.tile_warps) {
    const int local = first + warp / rank_warps;
    const int64_t n0 = (block_index() + int64_t(local) * plan.blocks) * kTile;
    float sum[Groups][4] = {};
    for (int r0 = 0; r0 < int(call.rank); r0 += plan.t_capacity) {
      if (first == 0 || !whole) {
        block_barrier();
        load_t_mma<T>(a, shared, r0);
        block_barrier();
      }
      const int length = int(call.rank) - r0 < plan.t_capacity ? int(call.rank) - r0 : plan.t_capacity;
      for (int c = warp % rank_warps * kChunk; c < length && local < local_tiles; c += rank_warps * kChunk) {
        const int k = c + q * 8;
        const bool inside = k < length;
        uint4 top = zero, bottom = zero;
        if (local < plan.prefetched_tiles) {
          const char* row = u_shared + (int64_t(local) * kTile + g) * plan.u_pitch + (r0 + k) * 2;
          // Rows beyond `out` hold garbage, but each row of the tile only reaches its own row of the result.
          if (inside) top = *reinterpret_cast<const uint4*>(row);
          if (inside) bottom = *reinterpret_cast<const uint4*>(row + 8 * plan.u_pitch);
        } else {
          const T* row = static_cast<const T*>(call.u) + (n0 + g) * call.u_stride + r0 + k;
          if (inside && n0 + g < call.out) top = load_weights(row);
          if (inside && n0 + g + 8 < call.out) bottom = load_weights(row + 8 * call.u_stride);
        }
#pragma unroll
        for (int n = 0; n < Groups; ++n) {
          const int at = (n * 8 + g) * plan.t_pitch + k;
          tile_step<T>(sum[n], top, bottom, *reinterpret_cast<const uint4*>(high + at));
          tile_step<T>(sum[n], top, bottom, *reinterpret_cast<const uint4*>(low + at));
        }
      }
    }
#pragma unroll
    for (int n = 0; n < Groups; ++n) deposit(shared.sums, kRows, warp, lane, n * 8, sum[n]);
    block_barrier();
    for (int e = thread_index(); e < plan.tile_warps * int(call.rows) * kTile; e += kThreads) {
      const int i = e % kTile, m = e / kTile % int(call.rows), group = e / kTile / int(call.rows);
      const int64_t n = (block_index() + int64_t(first + group) * plan.blocks) * kTile + i;
      if (first + group >= local_tiles || n >= call.out) continue;
      float total = 0.0f;
      for (int w = 0; w < rank_warps; ++w) {
        total += shared.sums[((group * rank_warps + w) * kRows + m) * kTile + i];
      }
      store_output<T>(a, m, n, total);
    }
    block_barrier();  // the next tiles write over the sums
  }
}

template <class T, int Groups>
TACO_DEVICE void decode_mma(const DecodeArgs& a) {
  const Shared shared = shared_layout(8 * Groups);
  char* u_shared = shared.t + 2 * 2 * a.plan.rows_padded * a.plan.t_pitch;
  if (a.plan.prefetched_tiles > 0) {
    copy_begin(shared.barrier);
    copy_rows(shared.barrier, u_shared, a.plan.u_pitch, a.plan.prefetched_tiles * kTile, int(a.call.rank) * 2,
              [&](int row) -> const void* {
                const int64_t n = (block_index() + int64_t(row / kTile) * a.plan.blocks) * kTile + row % kTile;
                return n < a.call.out ? static_cast<const T*>(a.call.u) + n * a.call.u_stride : nullptr;
              });
  }
  first_product_mma<T, Groups>(a, shared);
  grid_barrier();
  compute_scale(a, shared.scale);  // read after the block barrier in front of load_t_mma
  if (a.plan.prefetched_tiles > 0) copy_wait(shared.barrier);
  second_product_mma<T, Groups>(a, shared, u_shared);
}

// --- anything else: plain multiply-adds, one warp per weight row -----------------------------------------------------

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
TACO_DEVICE void decode_plain(const DecodeArgs& a) {
  const LowRankCall& call = a.call;
  const DecodePlan& plan = a.plan;
  const Shared shared = shared_layout(Rows);
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int rows = int(call.rows);

  for (int64_t item = int64_t(block_index()) * kWarps + warp; item < call.rank * plan.splits;
       item += int64_t(plan.blocks) * kWarps) {
    const int64_t r = item % call.rank, split = item / call.rank;
    const int64_t begin = split * plan.split_length;
    const int64_t end = begin + plan.split_length < call.in ? begin + plan.split_length : call.in;
    const T* v = static_cast<const T*>(call.v) + r * call.v_stride;
    float sum[Rows] = {}, squares[Rows] = {};
    // `in` is a multiple of Vector (or Vector is 1), so a vector that starts inside ends inside.
    for (int64_t k = begin + lane * Vector; k < end; k += 32 * Vector) {
      float weights[Vector], x[Vector];
      load_vector<T, Vector>(weights, v + k);
#pragma unroll
      for (int m = 0; m < Rows; ++m) {
        if (m < rows) {
          load_vector<T, Vector>(x, static_cast<const T*>(call.x) + m * call.x_stride + k);
#pragma unroll
          for (int i = 0; i < Vector; ++i) sum[m] += weights[i] * x[i];
          if (call.norm && r == 0) {
#pragma unroll
            for (int i = 0; i < Vector; ++i) squares[m] += x[i] * x[i];
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Rows; ++m) {
      if (m < rows) {
        const float total = lane_sum<32>(sum[m]);
        if (lane == 0) a.partial[(split * rows + m) * plan.rank_padded + r] = total;
        if (call.norm && r == 0) {
          const float square = lane_sum<32>(squares[m]);
          if (lane == 0) a.squares[split * rows + m] = square;
        }
      }
    }
  }
  grid_barrier();
  compute_scale(a, shared.scale);

  float* t = reinterpret_cast<float*>(shared.t);
  const bool whole = plan.t_capacity >= int(call.rank);
  bool loaded = false;
  for (int64_t base = int64_t(block_index()) * kWarps; base < call.out; base += int64_t(plan.blocks) * kWarps) {
    const int64_t n = base + warp;
    float sum[Rows] = {};
    for (int r0 = 0; r0 < int(call.rank); r0 += plan.t_capacity) {
      if (!loaded || !whole) {
        block_barrier();
        const int quads = plan.t_capacity / 4;
        for (int e = thread_index(); e < rows * quads; e += kThreads) {
          const int m = e / quads, r = e % quads * 4;
          if (r0 + r >= int(call.rank)) continue;  // never read: the sums below stop at the rank
          *reinterpret_cast<float4*>(t + m * plan.t_pitch + r) = combine_splits(a, m, r0 + r, shared.scale[m]);
        }
        block_barrier();
        loaded = true;
      }
      const int length = int(call.rank) - r0 < plan.t_capacity ? int(call.rank) - r0 : plan.t_capacity;
      if (n < call.out) {
        const T* u = static_cast<const T*>(call.u) + n * call.u_stride + r0;
        for (int k = lane * Vector; k < length; k += 32 * Vector) {
          float weights[Vector];
          load_vector<T, Vector>(weights, u + k);
#pragma unroll
          for (int m = 0; m < Rows; ++m) {
            if (m < rows) {
#pragma unroll
              for (int i = 0; i < Vector; ++i) sum[m] += weights[i] * t[m * plan.t_pitch + k + i];
            }
          }
        }
      }
    }
    if (n < call.out) {
#pragma unroll
      for (int m = 0; m < Rows; ++m) {
        if (m < rows) {
          const float total = lane_sum<32>(sum[m]);
          if (lane == 0) store_output<T>(a, m, n, total);
        }
      }
    }
  }
}

}  // namespace taco::cuda
