// Inputs of a pivoted map, reordered: what the identity takes first, then what goes through v. Loads from anywhere are a loop
// in every instruction set (of two bytes there is nothing else, of four hardly better); but where both parts of a pivot
// ascend, as those of our checkpoints do, they split a row in its own order, which some do by whole vectors.
#include "gather.h"

#include <stdexcept>

#include "isa.h"
#include "team.h"

namespace taco {
namespace {

// Elements that make one more thread worth waking.
constexpr std::int64_t kPerThread = 1 << 14;
// Rows from which looking at the whole pivot pays
constexpr std::int64_t kSplitRows = 8;

template <class Index>
void check(const Index* pivot, std::int64_t width) {
  Index low = 0, high = 0;
  for (std::int64_t i = 0; i < width; ++i) {
    low = pivot[i] < low ? pivot[i] : low;
    high = pivot[i] > high ? pivot[i] : high;
  }
  if (low < 0 || high >= width) throw std::out_of_range("pivot names an input that is not there");
}

template <class Index>
bool ascends(const Index* pivot, std::int64_t count) {
  bool up = true;
  for (std::int64_t i = 1; i < count; ++i) up &= pivot[i - 1] < pivot[i];
  return up;
}

// Whether both parts ascend and have no input in common, hence all; then `masks` says which are in the first. The pivot
// has been checked.
template <class Index>
bool masks_of(const Index* pivot, std::int64_t rank, std::int64_t width, std::vector<std::uint16_t>& masks) {
  if (!ascends(pivot, rank) || !ascends(pivot + rank, width - rank)) return false;
  const std::int64_t words = (width + 15) / 16;
  std::vector<std::uint8_t> is_first(static_cast<std::size_t>(words * 16));
  for (std::int64_t i = 0; i < rank; ++i) is_first[static_cast<std::size_t>(pivot[i])] = 1;
  std::uint8_t twice = 0;
  for (std::int64_t i = rank; i < width; ++i) twice |= is_first[static_cast<std::size_t>(pivot[i])];
  if (twice) return false;
  masks.resize(static_cast<std::size_t>(words));
  for (std::int64_t j = 0; j < words; ++j) {
    unsigned mask = 0;
    for (unsigned i = 0; i < 16; ++i) mask |= static_cast<unsigned>(is_first[static_cast<std::size_t>(16 * j) + i]) << i;
    masks[static_cast<std::size_t>(j)] = static_cast<std::uint16_t>(mask);
  }
  return true;
}

template <class Element, class Index>
void gather_rows(const GatherRows& a, const Index* pivot, std::int64_t width, std::int64_t rank, std::int64_t begin,
                 std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const Element* const x = static_cast<const Element*>(a.x) + r * a.x_stride;
    Element* const first = static_cast<Element*>(a.first) + r * a.first_stride;
    Element* const rest = static_cast<Element*>(a.rest) + r * a.rest_stride;
    for (std::int64_t i = 0; i < rank; ++i) first[i] = x[pivot[i]];
    for (std::int64_t i = rank; i < width; ++i) rest[i - rank] = x[pivot[i]];
  }
}

// f(the indices, of their type)
template <class Body>
void with_indices(const void* pivot, bool is_long, const Body& body) {
  is_long ? body(static_cast<const std::int64_t*>(pivot)) : body(static_cast<const std::int32_t*>(pivot));
}

}  // namespace

Gatherer::Gatherer(const void* pivot, bool is_long, std::int64_t width, std::int64_t rank, std::int64_t element,
                   std::int64_t rows)
    : pivot_(pivot), is_long_(is_long), width_(width), rank_(rank), element_(element) {
  const CpuKernels& isa = active_kernels();
  const auto split = element == 2 ? isa.split_2 : isa.split_4;
  with_indices(pivot, is_long, [&](const auto* indices) {
    check(indices, width);
    if (split && rows >= kSplitRows && masks_of(indices, rank, width, masks_)) split_ = split;
  });
}

void Gatherer::rows(const GatherRows& a, std::int64_t begin, std::int64_t end) const {
  if (split_) {
    split_({a.x, a.x_stride, masks_.data(), a.first, a.first_stride, a.rest, a.rest_stride, width_, rank_}, begin, end);
    return;
  }
  with_indices(pivot_, is_long_, [&](const auto* indices) {
    element_ == 4 ? gather_rows<std::uint32_t>(a, indices, width_, rank_, begin, end)
                  : gather_rows<std::uint16_t>(a, indices, width_, rank_, begin, end);
  });
}

void Gatherer::all(const GatherRows& a, std::int64_t count, int threads) const {
  const std::int64_t useful = count * width_ / kPerThread;
  on_team(static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads), [&](int index, int members) {
    rows(a, count * index / members, count * (index + 1) / members);
  });
}

}  // namespace taco
