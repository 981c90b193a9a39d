// How a decode call is cut into pieces. Plain C++, shared by the launcher and by the emulation that tests the kernels.
//
// The first product is cut into units of (16 rows of v) x (a slice of `in`), the second into tiles of 16 outputs; the
// blocks of one launch take them in turn. Each block keeps as many of its tiles of u in shared memory as fit, since
// those can travel while the first product is still being computed.
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

struct DecodePlan {
  bool matrix_unit;      // half types with 16-byte rows; everything else goes through plain multiply-adds
  int rows_padded;       // rows the kernel is compiled for
  int vector;            // elements per load of the plain kernel
  int blocks;            // one per multiprocessor at most, so that a grid-wide barrier is possible
  int splits;            // slices of each member's columns
  int columns[kMaxMembers];       // of each member's v
  int split_length[kMaxMembers];  // of those, per slice; a narrow member's last slices may have none
  int rank_padded;       // row length of the partial sums: every member's ranks, padded
  int t_capacity;        // ranks of each intermediate that are in shared memory at a time
  int t_pitch;           // elements from one of its rows to the next
  int t_bytes;           // of shared memory in front of u's tiles (the matrix unit's kernel)
  int u_pitch;           // bytes from one row of u in shared memory to the next
  int width;             // members whose results meet in one output: 2 in the gated form, else 1
  int phases;            // what the second product is done for, one after the other: members, or pairs of them
  int rank_start[kMaxMembers + 1];  // where each member's ranks begin in a row of the partial sums
  int unit_start[kMaxMembers + 1];  // the first product's tiles (plain kernel: rows of v), counted through the members
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

// Slices of the first product: the fewest that keep the blocks at least 90% busy, else the best there are. Fewer
// slices are fewer partial sums for every block to read back.
inline int choose_splits(std::int64_t tiles, std::int64_t blocks, std::int64_t most) {
  int best = 1;
  double best_share = 0;
  for (std::int64_t splits = 1; splits <= most; ++splits) {
    const std::int64_t units = tiles * splits;
    const double share = double(units) / double(ceil_div(units, blocks) * blocks);
    if (share > best_share + 1e-9) best = int(splits), best_share = share;
    if (best_share >= 0.9) break;
  }
  return best;
}

// Shared memory in front of the intermediate: partial sums of the warps, row scales, the copy barrier.
inline constexpr int kScaleBytes = kMaxDecodeRows * 4;
inline constexpr int kSquaresBytes = kWarps * kMaxDecodeRows * 4;
inline constexpr int kBarrierBytes = 16;
inline std::int64_t header_bytes(int rows_padded) {
  return std::int64_t(kWarps) * kTile * rows_padded * 4 + kScaleBytes + kSquaresBytes + kBarrierBytes;
}

// Elements from one row of gathered inputs in shared memory to the next (the matrix unit's kernel, half types).
inline int staged_pitch(std::int64_t split_length) {
  return int(conflict_free_pitch(std::min<std::int64_t>(split_length, kPiece) * 2) / 2);
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

// Cuts every member's columns into `splits` slices of whole steps, and counts those that are needed.
inline void divide(DecodePlan& p, const LowRankCall& call, std::int64_t splits, std::int64_t step) {
  p.splits = 1;
  for (int i = 0; i < call.count; ++i) {
    p.split_length[i] = int(round_up(ceil_div(p.columns[i], splits), step));
    p.splits = std::max(p.splits, int(ceil_div(p.columns[i], p.split_length[i])));
  }
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
    p.unit_start[i + 1] = p.unit_start[i] + int(p.matrix_unit ? ceil_div(rank, kTile) : rank);
  }
  for (int i = 0; i < p.phases; ++i) p.tile_start[i + 1] = p.tile_start[i] + int(ceil_div(call.members[i].out, kTile));
  p.rank_padded = p.rank_start[call.count];
  const std::int64_t units = p.unit_start[call.count], out_tiles = p.tile_start[p.phases];
  const std::int64_t most_padded = round_up(most_rank, kChunk);
  if (p.matrix_unit) {
    p.rows_padded = rows <= 8 ? 8 : 16;
    p.vector = 8;
    const std::int64_t chunks = ceil_div(in, kChunk);
    divide(p, call, choose_splits(units, processors, std::max<std::int64_t>(1, chunks / kWarps)), kChunk);
    p.blocks = int(std::min<std::int64_t>(processors, std::max(units * p.splits, out_tiles)));
    const std::int64_t local = ceil_div(out_tiles, p.blocks);
    p.tile_warps = 1;
    while (p.tile_warps < kWarps && p.tile_warps * 2 <= local) p.tile_warps *= 2;
    // The intermediates (two half-type numbers per element) get at most half of the shared memory.
    const std::int64_t free_bytes = shared_limit - header_bytes(p.rows_padded);
    const std::int64_t most = free_bytes / 2 / (2 * 2 * p.rows_padded * p.width) / kChunk * kChunk - kChunk;
    p.t_capacity = ranks_at_a_time(most_padded, most);
    p.t_pitch = int(conflict_free_pitch(p.t_capacity * 2) / 2);
    p.u_pitch = int(conflict_free_pitch(most_padded * 2));
    if (has_pivot(call)) p.staged_pitch = staged_pitch(ceil_div(chunks, p.splits) * kChunk);
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
