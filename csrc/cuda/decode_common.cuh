// Decode kernels (1 to 16 rows): y = scale * (x v^T) u^T + bias + residual for up to four members (v, u, bias) of one x;
// or, gated, y = act(first) * second of two members. What the matrix-unit and the plain kernels share.
//
//   u's tiles start travelling to shared memory
//   t_partial = x v^T, in parts of the columns          each block its share; float32, to work space
//                                                       (with a pivot the block gathers x, pivoted_inputs.cuh; what the
//                                                       identity gives is in the first part)
//   ---- barrier over the whole grid, or the next kernel ----
//   t = scale * sum over the parts                      every block, in a fixed order, into its shared memory
//   y = t u^T + bias + residual                         tiles of 16 outputs
//
// At these sizes the weights' bytes are all that costs: each is read once, by a 16-byte load that the thread's own
// lane of the matrix unit consumes, so weights pass through no transposition and (before the barrier) no shared memory.
//
// Cooperative launch: one kernel, Part::kBoth. Dependent launch: kFirst up to the barrier, kSecond from there on; the
// second starts while the first still runs, brings its tiles of u, and waits.
#pragma once

#include "device.cuh"
#include "pivoted_inputs.cuh"
#include "plan.h"

namespace taco::cuda {

enum class Part { kBoth, kFirst, kSecond };

struct DecodeArgs {
  LowRankCall call;
  DecodePlan plan;
  float* partial;  // [splits][rows][rank_padded]
  float* squares;  // [splits][rows]
};

// Divides the work space.
inline void arrange(DecodeArgs& a, void* workspace) {
  a.partial = static_cast<float*>(workspace);
  a.squares = a.partial + int64_t(a.plan.splits) * a.call.rows * a.plan.rank_padded;
}

// Shared memory, in this order (see header_bytes).
struct Shared {
  float* sums;      // [kWarps][rows_padded][kSumPitch]: what the warps of a block have to add up
  float* scale;     // [rows]
  float* squares;   // [kWarps][kMaxDecodeRows]
  void* barrier;    // of the copies
  char* t;          // the intermediate
};

TACO_DEVICE Shared shared_layout(int rows_padded) {
  char* at = shared_memory();
  Shared s;
  s.sums = reinterpret_cast<float*>(at);
  at += kWarps * rows_padded * kSumPitch * 4;
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
  float* mine = sums + (warp * rows_padded + row0) * kSumPitch;
  mine[(2 * q) * kSumPitch + g] = c[0];
  mine[(2 * q + 1) * kSumPitch + g] = c[1];
  mine[(2 * q) * kSumPitch + g + 8] = c[2];
  mine[(2 * q + 1) * kSumPitch + g + 8] = c[3];
}

// How many partial sums there are of a member's rank: slices, or the blocks that share its tile.
TACO_DEVICE int parts_of(const DecodePlan& plan, int index, int rank) {
  if (!plan.matrix_unit) return plan.splits;
  const int begin = plan.chunk_start[index] + rank / kTile * plan.tile_chunks[index];
  return (begin + plan.tile_chunks[index] - 1) / plan.share - begin / plan.share + 1;
}

// Row scales from the parts' sums of squares (1 without a norm); needs a block barrier before they are read.
TACO_DEVICE void compute_scale(const DecodeArgs& a, float* scale) {
  const int m = thread_index();
  if (m >= int(a.call.rows)) return;
  float factor = 1.0f;
  if (a.call.norm) {
    float total = 0.0f;
    const int parts = parts_of(a.plan, 0, 0);
    for (int s = 0; s < parts; ++s) total += load_written(a.squares + s * a.call.rows + m);
    factor = inverse_sqrt(total / float(a.call.in) + a.call.eps);
  }
  scale[m] = factor;
}

// Which of the ranges that begin at starts[0], starts[1], ... `at` is in; `count` ranges, some may be empty.
TACO_DEVICE int range_of(const int (&starts)[kMaxMembers + 1], int count, int at) {
  int found = 0;
  for (int i = 1; i < count; ++i) found = at >= starts[i] ? i : found;
  return found;
}

// Which of so many tiles of the second product are this block's: neighbours, so that few blocks need two members'
// intermediates.
struct Range {
  int first, count;
};
TACO_DEVICE Range block_share(const DecodePlan& plan, int64_t all) {
  const int first = int(all * block_index() / plan.blocks), end = int(all * (block_index() + 1) / plan.blocks);
  return {first, end - first};
}

// Four neighbouring elements of a member's t: its ranks r ... r + 3 of row m.
// Beyond the rank they may be whatever the work space held before: the matrix unit's ranks come in eights, and the
// plain kernel's sums stop at the rank.
TACO_DEVICE float4 combine_parts(const DecodeArgs& a, int index, int m, int r, float scale) {
  float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
  const int64_t plane = a.call.rows * a.plan.rank_padded;
  const float* from = a.partial + int64_t(m) * a.plan.rank_padded + a.plan.rank_start[index] + r;
  const int parts = parts_of(a.plan, index, r);
#pragma unroll 4
  for (int s = 0; s < parts; ++s) {
    const float4 part = load_written4(from + s * plane);
    total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
  }
  total.x *= scale, total.y *= scale, total.z *= scale, total.w *= scale;
  return total;
}

// act(z) in float32 (Hendrycks and Gimpel, 2016, for the two gelus).
TACO_DEVICE float activate(int gate, float z) {
  if (gate == kRelu) return z > 0.0f || z != z ? z : 0.0f;
  if (gate == kGelu) return 0.5f * z * (1.0f + erff(z * 0.70710678f));
  // (1 + tanh(a)) / 2 is the logistic function of 2 a.
  const float a = gate == kGeluTanh ? 1.59576912f * (z + 0.044715f * z * z * z) : z;
  return z / (1.0f + expf(-a));
}

// Epilogue of one output of a member: `which` is 0 for the first member of a phase. In the gated form the first one's
// result only waits in `held` for the second's.
template <class T>
TACO_DEVICE void store_output(const DecodeArgs& a, const Factors& member, int which, int m, int64_t n, float value,
                              float& held) {
  if (member.bias != nullptr) value += to_float(static_cast<const T*>(member.bias)[n]);
  if (a.plan.width == 2) {
    if (which == 0) {
      held = activate(a.call.gate, value);
      return;
    }
    value *= held;
  } else if (a.call.residual != nullptr) {
    value += to_float(static_cast<const T*>(a.call.residual)[m * a.call.residual_stride + n]);
  }
  const Factors& to = a.plan.width == 2 ? a.call.members[0] : member;
  static_cast<T*>(to.y)[m * to.y_stride + n] = from_float<T>(value);
}

// Asks for what the epilogues of this block's tiles add, which would otherwise be waited for at the very end. Before the
// barrier: no kernel of the call writes them.
template <class T>
TACO_DEVICE void prefetch_epilogues(const DecodeArgs& a) {
  const DecodePlan& plan = a.plan;
  const Range mine = block_share(plan, plan.tile_start[plan.phases]);
  const int residuals = a.call.residual != nullptr ? int(a.call.rows) : 0, each = plan.width + residuals;
  for (int e = thread_index(); e < mine.count * each; e += kThreads) {
    const int tile = mine.first + e / each, what = e % each;
    const int phase = range_of(plan.tile_start, plan.phases, tile);
    const int64_t n = int64_t(tile - plan.tile_start[phase]) * kTile;
    if (what >= plan.width) {
      prefetch_to_cache(static_cast<const T*>(a.call.residual) + (what - plan.width) * a.call.residual_stride + n);
    } else if (const Factors& member = a.call.members[phase + what]; member.bias != nullptr) {
      prefetch_to_cache(static_cast<const T*>(member.bias) + n);
    }
  }
}

// T's largest finite number.
template <class T>
inline constexpr float kLargest = 65504.0f;
template <>
inline constexpr float kLargest<Bfloat> = 3.3895313892515355e38f;

// A float32 in two parts: the first is this, rounded to T, the second what is then left over. The first part stops at
// T's largest number, so the two reach twice as far: float16 stays finite up to 131008, and is infinite beyond, not the
// difference of two infinities. A NaN goes into the second part.
template <class T>
TACO_DEVICE float first_part(float x) {
  return fminf(fmaxf(x, -kLargest<T>), kLargest<T>);
}

}  // namespace taco::cuda
