// How a decode call is cut into pieces. Plain C++, shared by the launcher and by the emulation that tests the kernels.
//
// The first product's weights are counted in chunks of (16 rows of v) x (32 columns), tile after tile; each block takes
// as many neighbouring chunks as the others, whatever tiles they belong to, so that none waits for one that has more.
// The blocks that share a tile leave a partial sum each. (The plain kernel's warps take rows of v x slices of `in`.) The
// second product is cut into tiles of 16 outputs. Each block keeps as many of its tiles of u in shared memory as fit,
// since those can travel while the first product is still being computed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "taco_cuda.h"

namespace taco::cuda {

inline constexpr int kWarps = 8;  // 8 warps x 4 steps x 1 KB of weights in flight: above latency x bandwidth per SM
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kTile = 16;   // rows of a weight tile: the height of mma.m16n8k16
inline constexpr int kChunk = 32;  // elements along the sum per warp and step: 4 lanes of 16 bytes (half types)
inline constexpr int kUnroll = 4;  // steps of the first product whose loads are all on their way before the first is used
inline constexpr int kPiece = kUnroll * kWarps * kChunk;  // elements along the sum that a block takes with these
// Floats from one row of a warp's sums in shared memory to the next: a warp's 32 stores hit 32 banks.
inline constexpr int kSumPitch = kTile + 4;

struct DecodePlan {
  bool matrix_unit;      // half types with 16-byte rows; everything else goes through plain multiply-adds
  int rows_padded;       // rows the kernel is compiled for
  int vector;            // elements per load of the plain kernel
  int blocks;            // one per multiprocessor at most, so that a grid-wide barrier is possible
  int splits;            // partial sums that there is room for: slices of the columns, or blocks that share a tile
  int columns[kMaxMembers];       // of each member's v
  int split_length[kMaxMembers];  // of those, per slice (plain kernel); a narrow member's last slices may have none
  int share;                        // chunks of a block (the matrix unit's kernel)
  int tile_chunks[kMaxMembers];     // of each member's tiles
  int chunk_start[kMaxMembers + 1];  // where each member's chunks begin
  int rank_padded;       // row length of the partial sums: every member's ranks, padded
  int t_capacity;        // ranks of each intermediate that are in shared memory at a time
  int t_pitch;           // elements from one of its rows to the next
  int t_bytes;           // of shared memory in front of u's tiles (the matrix unit's kernel)
  int u_pitch;           // bytes from one row of u in shared memory to the next
  int width;             // members whose results meet in one output: 2 in the gated form, else 1
  int phases;            // what the second product is done for, one after the other: members, or pairs of them
  int rank_start[kMaxMembers + 1];  // where each member's ranks begin in a row of the partial sums
  int unit_start[kMaxMembers + 1];  // rows of v, counted through the members (plain kernel)
  int tile_start[kMaxMembers + 1];  // the second product's tiles, counted through the phases
  int prefetched_tiles;  // tiles of u per block that travel before the barrier
  int tile_warps;        // tiles of outputs a block works on at a time (the other factor of kWarps splits the rank)
  int staged_pitch;      // elements from one row of gathered inputs in shared memory to the next; 0 without a pivot
  std::int64_t shared_bytes;
  std::int64_t first_shared_bytes;  // of the first kernel of a dependent launch
  std::int64_t workspace_bytes;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Rows 64 bytes apart modulo 128 let the 8 lanes of a quarter-warp (2 rows x 4 lanes x 16 bytes) hit all banks once.
inline std::int64_t conflict_free_pitch(std::int64_t bytes) {
  return round_up(bytes, 64) % 128 == 0 ? round_up(bytes, 64) + 64 : round_up(bytes, 64);
}

// Blocks that can share one of a member's tiles, where each takes `share` chunks: partial sums of it.
inline std::int64_t parts_of_tiles(std::int64_t start, std::int64_t tile_chunks, std::int64_t share) {
  if (start % tile_chunks == 0 && share % tile_chunks == 0) return 1;  // cuts between tiles only
  if (start % share == 0 && tile_chunks % share == 0) return tile_chunks / share;
  return (tile_chunks + share - 2) / share + 1;
}

// What a share of chunks costs, in nanoseconds of an H100: other GPUs have other numbers in much the same proportions.
// The weights of a block's stretch come in pieces, one after the other; u's tiles meanwhile keep the memory busy. Then
// every block reads all partial sums, out of L2.
struct FirstProduct {
  std::int64_t tile_chunks;   // of a tile of the widest member
  std::int64_t weight_bytes;  // that come from memory before the barrier, u's tiles included
  std::int64_t sum_bytes;     // of one partial sum of everything
};
inline double first_product_cost(const FirstProduct& f, std::int64_t share, std::int64_t parts) {
  constexpr double kRoundTrip = 700, kMemory = 3350, kMemoryPerBlock = 25, kCachePerBlock = 42;  // ns, bytes per ns
  constexpr std::int64_t kPieceChunks = kPiece / kChunk, kChunkBytes = kTile * kChunk * 2;
  const std::int64_t whole = share / f.tile_chunks, rest = share % f.tile_chunks;
  const bool aligned = rest == 0 || (whole == 0 && f.tile_chunks % share == 0);
  // an unaligned stretch begins and ends inside of a tile
  const std::int64_t trips =
      whole * ceil_div(f.tile_chunks, kPieceChunks) + ceil_div(rest, kPieceChunks) + (aligned ? 0 : 1);
  const double stretch = double(trips) * kRoundTrip + double(share * kChunkBytes) / kMemoryPerBlock;
  const double stream = double(f.weight_bytes) / kMemory;
  return std::max(stretch, stream) + double(parts * f.sum_bytes) / kCachePerBlock;
}

// Shared memory in front of the intermediate: partial sums of the warps, row scales, the copy barrier.
inline constexpr int kScaleBytes = kMaxDecodeRows * 4;
inline constexpr int kSquaresBytes = kWarps * kMaxDecodeRows * 4;
inline constexpr int kBarrierBytes = 16;
inline std::int64_t header_bytes(int rows_padded) {
  return std::int64_t(kWarps) * kSumPitch * rows_padded * 4 + kScaleBytes + kSquaresBytes + kBarrierBytes;
}

// Elements from one row of gathered inputs in shared memory to the next (the matrix unit's kernel, half types), where at
// most so many columns are multiplied one after the other.
inline int staged_pitch(std::int64_t columns) {
  return int(conflict_free_pitch(std::min<std::int64_t>(columns, kPiece) * 2) / 2);
}

inline bool has_pivot(const LowRankCall& call) {
  return std::any_of(call.members, call.members + call.count, [](const Factors& f) { return f.pivot != nullptr; });
}

// Of a device's limit, what the second kernel of a dependent launch may have: it must fit on a multiprocessor beside a
// block of the first (its header, and inputs that it has gathered), or it could not start early. 1 KB of each is the
// system's.
inline std::int64_t beside_first_kernel(const LowRankCall& call, std::int64_t shared_limit) {
  const std::int64_t staged = has_pivot(call) ? kMaxDecodeRows * staged_pitch(kPiece) * 2 : 0;
  return shared_limit - header_bytes(kMaxDecodeRows) - staged - 2 * 1024;
}

// Ranks of an intermediate that are in shared memory at a time, where there is room for `most`. Pieces are whole steps
// of all warps, so that each rank meets the warp, the lane and the place in the sum that it meets in any other cut: the
// bits depend neither on how much shared memory there is nor, with that, on the launch. Every GPU that the kernels run
// on has room for a step.
inline int ranks_at_a_time(std::int64_t padded_rank, std::int64_t most) {
  constexpr std::int64_t kStep = kWarps * kChunk;
  static_assert(kStep % (32 * 4) == 0, "a step of the plain kernel, at four elements per lane");
  if (most >= padded_rank) return int(padded_rank);
  return int(std::max<std::int64_t>(kChunk, most >= kStep ? most / kStep * kStep : most));
}

// Cuts every member's columns into `splits` slices of whole steps, and counts those that are needed (plain kernel).
inline void divide(DecodePlan& p, const LowRankCall& call, std::int64_t splits, std::int64_t step) {
  p.splits = 1;
  for (int i = 0; i < call.count; ++i) {
    p.split_length[i] = int(round_up(ceil_div(p.columns[i], splits), step));
    p.splits = std::max(p.splits, int(ceil_div(p.columns[i], p.split_length[i])));
  }
}

// How many chunks each block takes of the first product (the matrix unit's kernel): the cheapest of those that cut
// between tiles, or tiles into equal parts, or give every block the same. Does not go by shared memory, and so not by the
// launch.
inline void share_chunks(DecodePlan& p, const LowRankCall& call, std::int64_t processors) {
  FirstProduct f{};
  std::int64_t widest = 1;
  for (int i = 0; i < call.count; ++i) {
    const std::int64_t rank = call.members[i].rank, tiles = ceil_div(rank, kTile);
    p.tile_chunks[i] = int(ceil_div(p.columns[i], kChunk));
    p.chunk_start[i + 1] = p.chunk_start[i] + int(tiles * p.tile_chunks[i]);
    widest = std::max<std::int64_t>(widest, p.tile_chunks[i]);
    f.weight_bytes += 2 * rank * (p.columns[i] + call.members[i].out);
  }
  f.tile_chunks = widest;
  f.sum_bytes = 4 * call.rows * p.rank_padded;
  const std::int64_t least = ceil_div(p.chunk_start[call.count], processors);
  double best = 0;
  const auto consider = [&](std::int64_t share) {
    if (share < least || share < 1) return;
    std::int64_t parts = 1;
    for (int i = 0; i < call.count; ++i) {
      parts = std::max(parts, parts_of_tiles(p.chunk_start[i], p.tile_chunks[i], share));
    }
    const double cost = first_product_cost(f, share, parts);
    if (p.share != 0 && cost >= best) return;
    best = cost, p.share = int(share), p.splits = int(parts);
  };
  consider(least);
  consider(ceil_div(least, widest) * widest);
  for (std::int64_t parts = widest / least; parts >= 1; --parts) {
    if (widest % parts == 0) consider(widest / parts);
  }
}

// Tiles of outputs that a block works on at a time, of its `local` ones: the other warps split the rank. As few steps as
// can be, each of a batch's along the rank and a few for adding up its warps' sums.
inline int choose_tile_warps(std::int64_t local, std::int64_t most_padded) {
  constexpr std::int64_t kBatch = 4;
  int best = 1;
  std::int64_t least = -1;
  for (int tiles = 1; tiles <= kWarps; tiles *= 2) {
    const std::int64_t steps = ceil_div(most_padded / kChunk, kWarps / tiles) + kBatch;
    const std::int64_t cost = ceil_div(local, tiles) * steps;
    if (least < 0 || cost <= least) best = tiles, least = cost;
  }
  return best;
}

// `shared_limit` is what a block may have: the device's limit, or what beside_first_kernel leaves of it.
inline DecodePlan plan_decode(const LowRankCall& call, bool aligned, int processors, std::int64_t shared_limit) {
  DecodePlan p{};
  const std::int64_t element = call.dtype == 0 ? 4 : 2, rows = call.rows;
  p.matrix_unit = call.dtype != 0 && aligned;
  p.width = call.gate != kNoGate ? 2 : 1;
  p.phases = call.count / p.width;
  std::int64_t most_rank = 0, in = 0;
  for (int i = 0; i < call.count; ++i) {
    const std::int64_t rank = call.members[i].rank;
    p.columns[i] = int(call.in - (call.members[i].pivot != nullptr ? rank : 0));
    most_rank = std::max(most_rank, rank), in = std::max<std::int64_t>(in, p.columns[i]);
    p.rank_start[i + 1] = p.rank_start[i] + int(round_up(rank, kChunk));
    p.unit_start[i + 1] = p.unit_start[i] + int(rank);
  }
  for (int i = 0; i < p.phases; ++i) p.tile_start[i + 1] = p.tile_start[i] + int(ceil_div(call.members[i].out, kTile));
  p.rank_padded = p.rank_start[call.count];
  const std::int64_t units = p.unit_start[call.count], out_tiles = p.tile_start[p.phases];
  const std::int64_t most_padded = round_up(most_rank, kChunk);
  if (p.matrix_unit) {
    p.rows_padded = rows <= 8 ? 8 : 16;
    p.vector = 8;
    share_chunks(p, call, processors);
    p.blocks = int(std::min<std::int64_t>(
        processors, std::max(ceil_div(p.chunk_start[call.count], p.share), out_tiles)));
    const std::int64_t local = ceil_div(out_tiles, p.blocks);
    p.tile_warps = choose_tile_warps(local, most_padded);
    // The intermediates (two half-type numbers per element) get at most half of the shared memory; three quarters where
    // they are whole then: in pieces they are put together again for every batch of tiles.
    const std::int64_t free_bytes = shared_limit - header_bytes(p.rows_padded);
    const std::int64_t per_byte = 2 * p.rows_padded * p.width;  // of a row of one
    const bool whole = per_byte * conflict_free_pitch(most_padded * 2) <= free_bytes / 4 * 3;
    const std::int64_t most = whole ? most_padded : free_bytes / 2 / (2 * per_byte) / kChunk * kChunk - kChunk;
    p.t_capacity = ranks_at_a_time(most_padded, most);
    p.t_pitch = int(conflict_free_pitch(p.t_capacity * 2) / 2);
    p.u_pitch = int(conflict_free_pitch(most_padded * 2));
    if (has_pivot(call)) p.staged_pitch = staged_pitch(std::min<std::int64_t>(ceil_div(in, kChunk), p.share) * kChunk);
    // Gathered inputs lie where the intermediates come later.
    const std::int64_t staged_bytes = std::int64_t(p.rows_padded) * p.staged_pitch * 2;
    const std::int64_t t_bytes =
        std::max(2 * 2 * std::int64_t(p.rows_padded) * p.t_pitch * p.width, staged_bytes);
    const std::int64_t tile_bytes = std::int64_t(kTile) * p.u_pitch;
    p.prefetched_tiles = int(std::max<std::int64_t>(0, std::min(local * p.width, (free_bytes - t_bytes) / tile_bytes)));
    p.t_bytes = int(t_bytes);
    p.shared_bytes = header_bytes(p.rows_padded) + t_bytes + p.prefetched_tiles * tile_bytes;
    p.first_shared_bytes = header_bytes(p.rows_padded) + staged_bytes;
  } else {
    p.rows_padded = rows == 1 ? 1 : rows <= 4 ? 4 : 16;
    p.vector = aligned ? int(16 / element) : 1;
    const std::int64_t step = 32 * p.vector, warps = std::int64_t(processors) * kWarps;
    const std::int64_t wanted = std::max<std::int64_t>(1, std::min(warps / units, in / (4 * step)));
    divide(p, call, wanted, step);
    p.blocks = int(std::min<std::int64_t>(processors, ceil_div(std::max(units * p.splits, out_tiles * kTile), kWarps)));
    p.tile_warps = kWarps;
    const std::int64_t free_bytes = shared_limit - header_bytes(p.rows_padded);
    const std::int64_t most = free_bytes / 2 / (4 * p.rows_padded * p.width) / kChunk * kChunk;
    p.t_capacity = ranks_at_a_time(most_padded, most);
    p.t_pitch = p.t_capacity;
    p.shared_bytes = header_bytes(p.rows_padded) + 4 * std::int64_t(p.rows_padded) * p.t_pitch * p.width;
    p.first_shared_bytes = header_bytes(p.rows_padded);
  }
  // partial sums [splits][rows][rank_padded], sums of squares [splits][rows]
  p.workspace_bytes = rows * p.splits * (std::int64_t(p.rank_padded) + 1) * 4;
  return p;
}

}  // namespace taco::cuda
