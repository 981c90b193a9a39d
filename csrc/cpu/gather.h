// x [rows, width] -> first [rows, rank] = x[:, pivot[:rank]] and rest [rows, width - rank] = x[:, pivot[rank:]], some rows at
// a time.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace taco {

// Strides count elements.
struct GatherRows {
  const void* x;
  std::int64_t x_stride;
  void* first;
  std::int64_t first_stride;
  void* rest;
  std::int64_t rest_stride;
};

// A pivot [width] whose first `rank` inputs go to `first`. It is read while rows are gathered.
class Gatherer {
 public:
  // Indices of 4 or 8 bytes, elements of 2 or 4; `rows` of them will be gathered in all. Throws std::out_of_range where an
  // index is.
  Gatherer(const void* pivot, bool is_long, std::int64_t width, std::int64_t rank, std::int64_t element, std::int64_t rows);

  // rows [begin, end), on this thread
  void rows(const GatherRows& args, std::int64_t begin, std::int64_t end) const;
  // rows [0, count), on at most so many threads
  void all(const GatherRows& args, std::int64_t count, int threads) const;

 private:
  const void* pivot_;
  bool is_long_;
  std::int64_t width_, rank_, element_;
  std::vector<std::uint16_t> masks_;  // see Split; used where there is a `split_`
  void (*split_)(const Split&, std::int64_t begin, std::int64_t end) = nullptr;
};

}  // namespace taco
