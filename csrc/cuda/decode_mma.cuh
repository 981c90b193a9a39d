// Decode kernels for half types whose rows are multiples of 16 bytes: the matrix unit; see decode_common.cuh.
#pragma once

#include "decode_common.cuh"

namespace taco::cuda {

// Groups is the number of 8-row groups of activations (1 or 2).
template <class T, int Groups>
TACO_DEVICE void first_product_mma(const DecodeArgs& a, const Shared& shared) {
  constexpr int kRows = 8 * Groups;
  const LowRankCall& call = a.call;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, q = lane % 4;
  const int rank_tiles = a.plan.unit_start[call.count];
  const uint4 zero = {0, 0, 0, 0};
  T* const staged = reinterpret_cast<T*>(shared.t);
  int staged_index = -1;  // whose inputs are there, and from which column on
  int64_t staged_begin = 0;
  const Range mine = block_share(a.plan, int64_t(rank_tiles) * a.plan.splits);
  for (int unit = mine.first; unit < mine.first + mine.count; ++unit) {
    const int tile = unit % rank_tiles, split = unit / rank_tiles;
    const int index = range_of(a.plan.unit_start, call.count, tile);
    const Factors& member = call.members[index];
    const int first_rank = (tile - a.plan.unit_start[index]) * kTile;
    const int64_t top_row = first_rank + g, bottom_row = top_row + 8;
    const bool has_top = top_row < member.rank, has_bottom = bottom_row < member.rank;
    const T* top = static_cast<const T*>(member.v) + (has_top ? top_row : 0) * member.v_stride;
    const T* bottom = static_cast<const T*>(member.v) + (has_bottom ? bottom_row : 0) * member.v_stride;
    const int64_t columns = a.plan.columns[index], length = a.plan.split_length[index];
    const int64_t begin = split * length, end = begin + length < columns ? begin + length : columns;

    float sum[Groups][4] = {};
    float squares[Groups] = {};
    for (int64_t piece = begin; piece < end; piece += kPiece) {
      uint4 tops[kUnroll], bottoms[kUnroll];
      const auto place = [&](int j) { return piece + (j * kWarps + warp) * kChunk + q * 8; };
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int64_t k = place(j);
        tops[j] = k < end && has_top ? load_weights(top + k) : zero;
        bottoms[j] = k < end && has_bottom ? load_weights(bottom + k) : zero;
      }
      if (member.pivot != nullptr) {
        if (index != staged_index || piece != staged_begin) {
          block_barrier();  // the piece before has been read
          const int count = int(end - piece < kPiece ? end - piece : kPiece);
          stage_inputs<T>(call, member, staged, a.plan.staged_pitch, piece, count);
          block_barrier();
          staged_index = index, staged_begin = piece;
        }
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
          const int64_t k = place(j);
#pragma unroll
          for (int n = 0; n < Groups; ++n) {
            const int m = n * 8 + g;
            uint4 x = zero;
            if (k < end && m < call.rows) {
              x = *reinterpret_cast<const uint4*>(staged + m * a.plan.staged_pitch + (k - piece));
            }
            tile_step<T>(sum[n], tops[j], bottoms[j], x);
          }
        }
        continue;
      }
      uint4 xs[kUnroll][Groups];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
#pragma unroll
        for (int n = 0; n < Groups; ++n) {
          const int m = n * 8 + g;
          const T* x = static_cast<const T*>(call.x) + m * call.x_stride + place(j);
          xs[j][n] = place(j) < end && m < call.rows ? load_activations(x) : zero;
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
      a.partial[(split * call.rows + m) * a.plan.rank_padded + a.plan.rank_start[index] + first_rank + i] = total;
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

// A member's t [rows_padded][t_pitch] for ranks r0 ..., as a T and what that left over (also a T): together twice T's
// precision, which next to the rounding of the result is as good as float32.
template <class T>
TACO_DEVICE void load_t_mma(const DecodeArgs& a, const Shared& shared, T* high, int index, int r0) {
  T* low = high + a.plan.rows_padded * a.plan.t_pitch;
  const int quads = a.plan.t_capacity / 4, rank = int(a.call.members[index].rank);
  for (int e = thread_index(); e < a.plan.rows_padded * quads; e += kThreads) {
    const int m = e / quads, r = r0 + e % quads * 4;
    float4 t = {0.0f, 0.0f, 0.0f, 0.0f};
    if (m < int(a.call.rows) && r < rank) t = combine_splits<T>(a, index, m, r, shared.scale[m]);
    uint2 h, l;
    h.x = make_pair<T>(first_part<T>(t.x), first_part<T>(t.y));
    h.y = make_pair<T>(first_part<T>(t.z), first_part<T>(t.w));
    l.x = make_pair<T>(t.x - pair_low<T>(h.x), t.y - pair_high<T>(h.x));
    l.y = make_pair<T>(t.z - pair_low<T>(h.y), t.w - pair_high<T>(h.y));
    *reinterpret_cast<uint2*>(high + m * a.plan.t_pitch + r - r0) = h;
    *reinterpret_cast<uint2*>(low + m * a.plan.t_pitch + r - r0) = l;
  }
}

// Tiles of u that this block keeps in shared memory, counted as it works through them: `slot` is
// (tile within the block's) * width + (member within the phase). Row i of slot s lies at row s * kTile + i.
template <class T>
TACO_DEVICE void prefetch_u(const DecodeArgs& a, const Shared& shared, char* u_shared) {
  const DecodePlan& plan = a.plan;
  const Range mine = block_share(plan, plan.tile_start[plan.phases]);
  const int slots = mine.count * plan.width < plan.prefetched_tiles ? mine.count * plan.width : plan.prefetched_tiles;
  copy_begin(shared.barrier);
  copy_rows(shared.barrier, u_shared, plan.u_pitch, slots * kTile, plan.u_pitch, [&](int row) -> Row {
    const int slot = row / kTile, tile = mine.first + slot / plan.width;
    const int phase = range_of(plan.tile_start, plan.phases, tile);
    const Factors& member = a.call.members[phase + slot % plan.width];
    const int64_t n = int64_t(tile - plan.tile_start[phase]) * kTile + row % kTile;
    if (n >= member.out) return {nullptr, 0};
    return {static_cast<const T*>(member.u) + n * member.u_stride, int(member.rank) * 2};
  });
}

template <class T, int Groups>
TACO_DEVICE void second_product_mma(const DecodeArgs& a, const Shared& shared, const char* u_shared) {
  constexpr int kRows = 8 * Groups;
  // Outputs of a batch of tiles that one thread adds up: the gated form keeps the first member's in registers.
  constexpr int kShare = kWarps * kRows * kTile / kThreads;
  const DecodePlan& plan = a.plan;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, q = lane % 4;
  const int rank_warps = kWarps / plan.tile_warps, rows = int(a.call.rows);
  const Range mine = block_share(plan, plan.tile_start[plan.phases]);
  const uint4 zero = {0, 0, 0, 0};

  for (int phase = 0; phase < plan.phases; ++phase) {
    // The part of this phase's tiles that is ours, counted as in `mine`.
    const int from = plan.tile_start[phase] - mine.first, to = plan.tile_start[phase + 1] - mine.first;
    const int begin = from > 0 ? from : 0, end = to < mine.count ? to : mine.count;
    for (int first = begin; first < end; first += plan.tile_warps) {
      const int local = first + warp / rank_warps;
      const int64_t n0 = int64_t(mine.first + local - plan.tile_start[phase]) * kTile;
      float held[kShare] = {};
      for (int which = 0; which < plan.width; ++which) {
        const Factors& member = a.call.members[phase + which];
        const int rank = int(member.rank);
        T* high = reinterpret_cast<T*>(shared.t) + which * 2 * plan.rows_padded * plan.t_pitch;
        const T* low = high + plan.rows_padded * plan.t_pitch;
        const int slot = local * plan.width + which;
        float sum[Groups][4] = {};
        for (int r0 = 0; r0 < rank; r0 += plan.t_capacity) {
          if (first == begin || plan.t_capacity < rank) {  // where it fits, t is loaded once in a phase
            block_barrier();
            load_t_mma<T>(a, shared, high, phase + which, r0);
            block_barrier();
          }
          const int length = rank - r0 < plan.t_capacity ? rank - r0 : plan.t_capacity;
          for (int c = warp % rank_warps * kChunk; c < length && local < end; c += rank_warps * kChunk) {
            const int k = c + q * 8;
            const bool inside = k < length;
            uint4 top = zero, bottom = zero;
            if (slot < plan.prefetched_tiles) {
              const char* row = u_shared + (int64_t(slot) * kTile + g) * plan.u_pitch + (r0 + k) * 2;
              // Rows beyond `out` hold garbage, but each row of the tile only reaches its own row of the result.
              if (inside) top = *reinterpret_cast<const uint4*>(row);
              if (inside) bottom = *reinterpret_cast<const uint4*>(row + 8 * plan.u_pitch);
            } else {
              const T* row = static_cast<const T*>(member.u) + (n0 + g) * member.u_stride + r0 + k;
              if (inside && n0 + g < member.out) top = load_weights(row);
              if (inside && n0 + g + 8 < member.out) bottom = load_weights(row + 8 * member.u_stride);
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
#pragma unroll
        for (int j = 0; j < kShare; ++j) {
          const int e = thread_index() + j * kThreads;
          const int i = e % kTile, m = e / kTile % rows, group = e / kTile / rows;
          const int tile = first + group;
          const int64_t n = int64_t(mine.first + tile - plan.tile_start[phase]) * kTile + i;
          if (group >= plan.tile_warps || tile >= end || n >= member.out) continue;
          float total = 0.0f;
          for (int w = 0; w < rank_warps; ++w) {
            total += shared.sums[((group * rank_warps + w) * kRows + m) * kTile + i];
          }
          store_output<T>(a, member, which, m, n, total, held[j]);
        }
        block_barrier();  // the next sums are written over these
      }
    }
  }
}

template <class T, int Groups, Part part>
TACO_DEVICE void decode_mma(const DecodeArgs& a) {
  const Shared shared = shared_layout(8 * Groups);
  if constexpr (part == Part::kFirst) {
    let_next_kernel_start();
    first_product_mma<T, Groups>(a, shared);
  } else {
    char* u_shared = shared.t + a.plan.t_bytes;
    if (a.plan.prefetched_tiles > 0) prefetch_u<T>(a, shared, u_shared);
    if constexpr (part == Part::kBoth) {
      first_product_mma<T, Groups>(a, shared);
      grid_barrier();
    } else {
      wait_for_previous_kernel();
    }
    compute_scale(a, shared.scale);  // read after the block barrier in front of load_t_mma
    if (a.plan.prefetched_tiles > 0) copy_wait(shared.barrier);
    second_product_mma<T, Groups>(a, shared, u_shared);
  }
}

}  // namespace taco::cuda
