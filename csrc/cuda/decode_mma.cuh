// Decode kernels for half types whose rows are multiples of 16 bytes: the matrix unit; see decode_common.cuh.
#pragma once

#include "decode_common.cuh"

namespace taco::cuda {

// Where a block's stretch of the first product is: one tile of ranks, some of its columns.
struct Stretch {
  int index, first_rank;  // member, and the tile's first rank of it
  int part;               // which of the tile's partial sums this is
  int begin, end;         // columns of v
  int next;               // the chunk behind it
};
TACO_DEVICE Stretch stretch_at(const DecodePlan& plan, int count, int at, int stop) {
  Stretch s;
  s.index = range_of(plan.chunk_start, count, at);
  const int tile_chunks = plan.tile_chunks[s.index];
  const int tile = (at - plan.chunk_start[s.index]) / tile_chunks;
  const int begin = plan.chunk_start[s.index] + tile * tile_chunks;
  s.first_rank = tile * kTile;
  s.part = block_index() - begin / plan.share;
  s.next = stop < begin + tile_chunks ? stop : begin + tile_chunks;
  s.begin = (at - begin) * kChunk;
  const int end = (s.next - begin) * kChunk, columns = plan.columns[s.index];
  s.end = end < columns ? end : columns;
  return s;
}

// Groups is the number of 8-row groups of activations (1 or 2).
template <class T, int Groups, Part part>
TACO_DEVICE void first_product_mma(const DecodeArgs& a, const Shared& shared) {
  constexpr int kRows = 8 * Groups;
  static_assert(kRows * kTile <= kThreads, "one result per thread");
  // Steps whose activations are asked for together, and rows that are gathered together: as registers allow.
  constexpr bool kFewRegisters = part == Part::kFirst && Groups == 2;
  constexpr int kSteps = kFewRegisters ? kUnroll / 2 : kUnroll, kTogether = kFewRegisters ? 2 : 4;
  const LowRankCall& call = a.call;
  const DecodePlan& plan = a.plan;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, q = lane % 4;
  const int result_row = thread_index() / kTile, result_rank = thread_index() % kTile;
  const uint4 zero = {0, 0, 0, 0};
  T* const staged = reinterpret_cast<T*>(shared.t);
  int staged_index = -1, staged_count = 0;  // whose inputs are there, how many, and from which column on
  int staged_begin = 0;
  const int all = plan.chunk_start[call.count];
  const int64_t first = int64_t(block_index()) * plan.share;
  const int stop = first + plan.share < all ? int(first) + plan.share : all;
  Stretch s;
  for (int at = first < all ? int(first) : stop; at < stop; at = s.next) {
    s = stretch_at(plan, call.count, at, stop);
    const Factors& member = call.members[s.index];
    const int top_row = s.first_rank + g, bottom_row = top_row + 8;
    const bool has_top = top_row < member.rank, has_bottom = bottom_row < member.rank;
    const T* top = static_cast<const T*>(member.v) + (has_top ? top_row : 0) * member.v_stride;
    const T* bottom = static_cast<const T*>(member.v) + (has_bottom ? bottom_row : 0) * member.v_stride;
    const bool squared = call.norm && s.index == 0 && s.first_rank == 0;
    const auto identity_share = [&] {
      const bool has = member.pivot != nullptr && s.part == 0 && result_row < int(call.rows) &&
                       s.first_rank + result_rank < member.rank;
      return has ? identity_at<T>(call, member, result_row, s.first_rank + result_rank) : 0.0f;
    };
    const float identity = kFewRegisters ? 0.0f : identity_share();  // asked for now, needed when the sums are there

    float sum[Groups][4] = {};
    float squares[Groups] = {};
    for (int piece = s.begin; piece < s.end; piece += kPiece) {
      uint4 tops[kUnroll], bottoms[kUnroll];
      const auto place = [&](int j) { return piece + (j * kWarps + warp) * kChunk + q * 8; };
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int k = place(j);
        tops[j] = k < s.end && has_top ? load_weights(top + k) : zero;
        bottoms[j] = k < s.end && has_bottom ? load_weights(bottom + k) : zero;
      }
      if (member.pivot != nullptr) {
        const int count = s.end - piece < kPiece ? s.end - piece : kPiece;
        if (s.index != staged_index || piece != staged_begin || count > staged_count) {
          block_barrier();  // the piece before has been read
          stage_inputs<T, kRows, kTogether>(call, member, staged, plan.staged_pitch, piece, count);
          block_barrier();
          staged_index = s.index, staged_begin = piece, staged_count = count;
        }
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
          const int k = place(j);
#pragma unroll
          for (int n = 0; n < Groups; ++n) {
            const int m = n * 8 + g;
            uint4 x = zero;
            if (k < s.end && m < call.rows) {
              x = *reinterpret_cast<const uint4*>(staged + m * plan.staged_pitch + (k - piece));
            }
            tile_step<T>(sum[n], tops[j], bottoms[j], x);
          }
        }
        continue;
      }
#pragma unroll
      for (int j0 = 0; j0 < kUnroll; j0 += kSteps) {
        uint4 xs[kSteps][Groups];
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          const int k = place(j0 + j);
#pragma unroll
          for (int n = 0; n < Groups; ++n) {
            const int m = n * 8 + g;
            const T* x = static_cast<const T*>(call.x) + m * call.x_stride + k;
            xs[j][n] = k < s.end && m < call.rows ? load_activations(x) : zero;
          }
        }
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
#pragma unroll
          for (int n = 0; n < Groups; ++n) {
            const uint4& x = xs[j][n];
            tile_step<T>(sum[n], tops[j0 + j], bottoms[j0 + j], x);
            if (squared) {
              squares[n] += pair_squares<T>(x.x) + pair_squares<T>(x.y) + pair_squares<T>(x.z) + pair_squares<T>(x.w);
            }
          }
        }
      }
    }

#pragma unroll
    for (int n = 0; n < Groups; ++n) {
      deposit(shared.sums, kRows, warp, lane, n * 8, sum[n]);
      if (squared) {
        const float total = lane_sum<4>(squares[n]);
        if (q == 0) shared.squares[warp * kMaxDecodeRows + n * 8 + g] = total;
      }
    }
    block_barrier();
    if (result_row < int(call.rows)) {
      float total = kFewRegisters ? identity_share() : identity;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shared.sums[(w * kRows + result_row) * kSumPitch + result_rank];
      a.partial[(int64_t(s.part) * call.rows + result_row) * plan.rank_padded + plan.rank_start[s.index] +
                s.first_rank + result_rank] = total;
    }
    if (squared && thread_index() < int(call.rows)) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shared.squares[w * kMaxDecodeRows + thread_index()];
      a.squares[s.part * call.rows + thread_index()] = total;
    }
    block_barrier();  // the next stretch writes over the sums
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
    if (m < int(a.call.rows) && r < rank) t = combine_parts(a, index, m, r, shared.scale[m]);
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
  copy_rows(shared.barrier, u_shared, plan.u_pitch, slots * kTile, [&](int row) -> Row {
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
          const int step = rank_warps * kChunk;
          for (int c = warp % rank_warps * kChunk; c < length && local < end; c += kUnroll * step) {
            // As in the first product: weights that come from memory are all on their way before the first is used.
            uint4 tops[kUnroll], bottoms[kUnroll];
#pragma unroll
            for (int j = 0; j < kUnroll; ++j) {
              const int k = c + j * step + q * 8;
              const bool inside = k < length;
              tops[j] = bottoms[j] = zero;
              if (slot < plan.prefetched_tiles) {
                const char* row = u_shared + (int64_t(slot) * kTile + g) * plan.u_pitch + (r0 + k) * 2;
                // Rows beyond `out` hold garbage, but each row of the tile only reaches its own row of the result.
                if (inside) tops[j] = *reinterpret_cast<const uint4*>(row);
                if (inside) bottoms[j] = *reinterpret_cast<const uint4*>(row + 8 * plan.u_pitch);
              } else {
                const T* row = static_cast<const T*>(member.u) + (n0 + g) * member.u_stride + r0 + k;
                if (inside && n0 + g < member.out) tops[j] = load_weights(row);
                if (inside && n0 + g + 8 < member.out) bottoms[j] = load_weights(row + 8 * member.u_stride);
              }
            }
#pragma unroll
            for (int j = 0; j < kUnroll; ++j) {
              if (c + j * step >= length) break;  // the whole warp
#pragma unroll
              for (int n = 0; n < Groups; ++n) {
                const int at = (n * 8 + g) * plan.t_pitch + c + j * step + q * 8;
                tile_step<T>(sum[n], tops[j], bottoms[j], *reinterpret_cast<const uint4*>(high + at));
                tile_step<T>(sum[n], tops[j], bottoms[j], *reinterpret_cast<const uint4*>(low + at));
              }
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
            total += shared.sums[((group * rank_warps + w) * kRows + m) * kSumPitch + i];
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
    first_product_mma<T, Groups, part>(a, shared);
  } else {
    char* u_shared = shared.t + a.plan.t_bytes;
    if (a.plan.prefetched_tiles > 0) prefetch_u<T>(a, shared, u_shared);
    prefetch_epilogues<T>(a);
    if constexpr (part == Part::kBoth) {
      first_product_mma<T, Groups, part>(a, shared);
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
