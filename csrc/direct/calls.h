// One struct for each op: what a call's arguments come to, and the kernel that computes it. `read` takes Python objects
// or torch's handles (see tensors.h).
#pragma once

#include <cstdint>

#include "cpu/taco_cpu.h"
#include "direct/tensors.h"

namespace taco::direct {

enum class Way {
  kOrdinary,  // not plain, or does not fit together: the ordinary way serves it, or has the message
  kLibrary,   // plain, but more rows than the CPU's kernels are good for
  kDirect,
};

inline Way way_of(bool within) { return within ? Way::kDirect : Way::kLibrary; }

inline LowRankInput input_of(const Rows& x) { return {x.dtype, x.tensor.data, x.stride, x.rows, x.width, false, 0.0f}; }

// One factorised map of inputs of `width` features: v [rank, width], u [out, rank], bias [out] or None.
template <class Object>
bool read_map(Object v, Object u, Object bias, const Rows& like, std::int64_t width, LowRankMap& out) {
  Matrix right, left;
  if (!read_matrix(v, like, right) || right.columns != width) return false;
  if (!read_matrix(u, like, left) || left.columns != right.rows) return false;
  const void* offset = nullptr;
  if (!read_vector(bias, like, left.rows, offset)) return false;
  out = {right.data, right.stride, left.data, left.stride, offset, nullptr, right.rows, left.rows, nullptr, 0};
  return true;
}

template <class Object>
bool read_residual(Object object, const Rows& x, LowRankMap& map) {
  if (absent(object)) return true;
  Rows rest;
  if (!read_like(object, x, map.out, rest)) return false;
  map.residual = rest.tensor.data, map.residual_stride = rest.stride;
  return true;
}

struct Linear {
  Rows x;
  LowRankMap map;

  template <class Object>
  Way read(Object x_, Object v, Object u, Object bias, Object residual) {
    if (!read_rows(x_, x) || !read_map(v, u, bias, x, x.width, map)) return Way::kOrdinary;
    if (!read_residual(residual, x, map)) return Way::kOrdinary;
    return way_of(within_limits(kLinear, x, map.rank));
  }

  std::int64_t width() const { return map.out; }  // of the result's rows
  LowRankInput input() const { return input_of(x); }

  void compute(void* y, int threads) {
    map.y = y;
    low_rank(input(), &map, 1, threads);
  }
};

struct Bridge {
  Rows x;
  LowRankMap map;
  float eps;

  template <class Object>
  Way read(Object h, Object v, Object u, Object bias, double eps_) {
    if (!read_rows(h, x) || !read_map(v, u, bias, x, x.width, map) || map.out != x.width) return Way::kOrdinary;
    map.residual = x.tensor.data, map.residual_stride = x.stride;
    eps = static_cast<float>(eps_);
    return way_of(within_limits(kBridge, x, map.rank));
  }

  std::int64_t width() const { return map.out; }  // of the result's rows

  LowRankInput input() const {
    LowRankInput normalised = input_of(x);
    normalised.normalise = true;
    normalised.eps = eps;
    return normalised;
  }

  void compute(void* y, int threads) {
    map.y = y;
    low_rank(input(), &map, 1, threads);
  }
};

struct Pivoted {
  Rows x;
  LowRankMap map;
  const void* pivot;
  bool is_long;

  template <class Object>
  Way read(Object x_, Object v, Object u, Object pivot_, Object bias, Object residual) {
    Matrix left;
    // u's columns say how many of the inputs the identity takes
    if (!read_rows(x_, x) || !read_matrix(u, x, left) || left.columns >= x.width) return Way::kOrdinary;
    if (!read_map(v, u, bias, x, x.width - left.columns, map)) return Way::kOrdinary;
    if (!read_index(pivot_, x, x.width, pivot, is_long) || !read_residual(residual, x, map)) return Way::kOrdinary;
    return way_of(within_limits(kPivoted, x, map.rank));
  }

  std::int64_t width() const { return map.out; }  // of the result's rows

  // of the product behind the pivot, its columns not gathered yet
  LowRankInput input() const {
    LowRankInput behind = input_of(x);
    behind.in = x.width - map.rank;
    return behind;
  }

  // Throws std::out_of_range for an index that is.
  void compute(void* y, int threads) {
    map.y = y;
    pivoted_low_rank(input_of(x), pivot, is_long, map, threads);
  }
};

struct Group {
  static constexpr int kMembers = 8;
  Rows x;
  LowRankMap maps[kMembers];
  int members = 0;
  std::int64_t ranks = 0;

  template <class Object>
  bool add(Object v, Object u, Object bias) {
    if (members == kMembers || !read_map(v, u, bias, x, x.width, maps[members])) return false;
    ranks += maps[members++].rank;
    return true;
  }

  Way way() const { return members == 0 ? Way::kOrdinary : way_of(within_limits(kGroup, x, ranks)); }

  // into maps[i].y
  void compute(int threads) { low_rank(input_of(x), maps, members, threads); }
};

struct Mlp {
  Rows x;
  LowRankMap gate, up, down;
  Activation act;

  template <class Object>
  Way read(Object x_, Object const (&maps)[9], Activation act_) {
    if (!read_rows(x_, x) || !read_map(maps[0], maps[1], maps[2], x, x.width, gate)) return Way::kOrdinary;
    if (!read_map(maps[3], maps[4], maps[5], x, x.width, up) || up.out != gate.out) return Way::kOrdinary;
    if (!read_map(maps[6], maps[7], maps[8], x, gate.out, down)) return Way::kOrdinary;
    act = act_;
    // with more rows it is composed of its maps, each by its own rank
    return within_limits(kMlp, x, gate.rank + up.rank) ? Way::kDirect : Way::kOrdinary;
  }

  std::int64_t width() const { return down.out; }  // of the result's rows

  void compute(void* y, int threads) {
    down.y = y;
    low_rank_mlp(input_of(x), gate, up, down, act, threads);
  }
};

}  // namespace taco::direct
