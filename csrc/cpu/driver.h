// What the drivers of the low-rank products share: work space, and how work is divided. Compiled for every CPU, like them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>

#include "isa.h"
#include "taco_cpu.h"

namespace taco {

inline std::int64_t size_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

inline const void* offset(const void* p, std::int64_t elements, std::int64_t size) {
  return p ? static_cast<const char*>(p) + elements * size : nullptr;
}
inline void* offset(void* p, std::int64_t elements, std::int64_t size) {
  return p ? static_cast<char*>(p) + elements * size : nullptr;
}

inline std::int64_t whole_steps(std::int64_t n) { return (n + kStepMultiple - 1) / kStepMultiple * kStepMultiple; }

// Scratch memory of the calling thread, kept from call to call: a decode step must not pay for the allocator.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // Small, and of the driver's own: kept for the same reason.
  std::vector<FirstProduct> first;
  std::vector<SecondProduct> second;

  float* get(std::size_t floats) {
    if (floats > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      void* p = nullptr;
      if (posix_memalign(&p, 64, floats * sizeof(float)) != 0) throw std::bad_alloc();
      data_ = static_cast<float*>(p);
      size_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  std::size_t size_ = 0;
};
inline thread_local Scratch scratch;
// The calling thread's too, for the weights that its team unpacks (Panels).
inline thread_local Scratch panel_scratch;

struct Range {
  std::int64_t begin, end;
};

// Shares several ranges among threads, in proportion to cost. Each thread gets consecutive pieces, in whole tiles (so
// that no two threads write to one line of the cache) while there are tiles enough.
class Shares {
 public:
  Shares(int index, int threads) : index_(index), threads_(threads) {}
  void expect(std::int64_t rows, std::int64_t cost) { total_ += rows * cost; }
  // To be called in the order of expect(), after all of them.
  Range next(std::int64_t rows, std::int64_t cost) {
    const std::int64_t unit = rows >= 4 * kTile * threads_ ? kTile : 4;
    const Range range = {cut(index_, rows, cost, unit), cut(index_ + 1, rows, cost, unit)};
    passed_ += rows * cost;
    return range;
  }

 private:
  std::int64_t cut(int index, std::int64_t rows, std::int64_t cost, std::int64_t unit) const {
    if (index <= 0) return 0;
    if (index >= threads_) return rows;
    const std::int64_t at = total_ * index / threads_ - passed_;
    return at <= 0 ? 0 : std::min(rows, (at / cost + unit / 2) / unit * unit);
  }
  int index_, threads_;
  std::int64_t total_ = 0, passed_ = 0;
};

// What one more output costs beside its dot products, in columns of weights: small ranks are not free.
constexpr std::int64_t kOutputCost = 16;

// Bytes of weights (times the work the rows add) that make one more thread worth waking.
constexpr std::int64_t kBytesPerThread = 96 * 1024;

inline int threads_for(std::int64_t weights, const LowRankInput& input, int threads) {
  const std::int64_t work = weights * size_of(input.dtype) * (1 + std::min(input.rows, kRowBlock) / 4);
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, work / kBytesPerThread)));
}

// 1 / sqrt(mean(x^2) + eps) of a thread's share of `rows` rows, which begin at x.
inline void norm_scales(const DtypeKernels& kernels, const LowRankInput& input, const void* x, std::int64_t rows, int index,
                 int members, float* scale) {
  for (std::int64_t r = index; r < rows; r += members) {
    const float squares = kernels.sum_of_squares(offset(x, r * input.x_stride, size_of(input.dtype)), input.in);
    scale[r] = 1.0f / std::sqrt(squares / static_cast<float>(input.in) + input.eps);
  }
}

// A panel is what is unpacked at once of the rows of a factor of 8-bit integers: as many of them as fit the second cache.
constexpr std::int64_t kPanelBytes = 192 * 1024, kMostPanelRows = 128;

// Elements from one row of a panel to the next: a line beside each, so that rows do not fall into one set of the cache.
inline std::int64_t panel_stride(std::int64_t columns, std::int64_t element) { return whole_steps(columns) + 64 / element; }

inline std::int64_t panel_rows(std::int64_t columns, std::int64_t element) {
  const std::int64_t fitting = std::min(kMostPanelRows, kPanelBytes / (panel_stride(columns, element) * element));
  return fitting < 2 * kTile ? kTile : fitting / (2 * kTile) * (2 * kTile);
}

// Enough for panels of at most so many columns, whole lines of the cache.
inline std::int64_t panel_bytes(std::int64_t columns, std::int64_t element) {
  const std::int64_t row = panel_stride(columns, element) * element;
  return std::max(kTile * row, std::min(kMostPanelRows * row, kPanelBytes));
}

// Memory for one panel of each thread of a team. The calling thread takes it before it calls the others: an exception that
// leaves another thread ends the process.
struct Panels {
  char* first = nullptr;
  std::int64_t bytes = 0;  // of each

  char* of(int index) const { return first + index * bytes; }
};

// For factors of at most so many columns; none where all of them are multiplied as they lie.
inline Panels panels_for(const LowRankMap* maps, int count, std::int64_t columns_of_v, std::int64_t element, int team) {
  std::int64_t columns = -1;
  for (int i = 0; i < count; ++i)
    if (maps[i].v_scale) columns = std::max({columns, columns_of_v, maps[i].rank});
  if (columns < 0) return {};
  const std::int64_t bytes = panel_bytes(columns, element);
  return {reinterpret_cast<char*>(panel_scratch.get(static_cast<std::size_t>(team * bytes / 4))), bytes};
}

// body(weights, stride, begin, end) over all of the range's rows of a factor [.., columns]: where they lie, or, of 8-bit
// integers, a panel at a time. `weights` is where row 0 would be.
template <class Body>
void each_panel(const DtypeKernels& kernels, const void* weights, std::int64_t stride, std::int64_t columns,
                const float* scale, bool scale_of_rows, std::int64_t element, char* panel, Range range, const Body& body) {
  if (range.begin >= range.end) return;
  if (scale == nullptr) {
    body(weights, stride, range.begin, range.end);
    return;
  }
  const std::int64_t out_stride = panel_stride(columns, element), rows = panel_rows(columns, element);
  for (std::int64_t begin = range.begin; begin < range.end; begin += rows) {
    const std::int64_t end = std::min(range.end, begin + rows);
    char* const first = panel - begin * out_stride * element;
    kernels.int8.unpack({static_cast<const std::int8_t*>(weights), stride, end, columns, scale, scale_of_rows, first, out_stride},
                        begin, end);
    body(static_cast<const void*>(first), out_stride, begin, end);
  }
}

// As low_rank, by kernels for many rows. With a gatherer input.x holds rows of input.in + rank columns, to be gathered into
// what the one map adds to its intermediate and into what it multiplies.
class Gatherer;
void low_rank_many(const DtypeKernels& kernels, const ManyRows& many, const LowRankInput& input, const LowRankMap* maps,
                   int count, int threads, const Gatherer* gatherer = nullptr);

}  // namespace taco
