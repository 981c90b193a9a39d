// Inputs of a pivoted map, reordered: what the identity takes first, then what goes through v. Loads from anywhere are a loop
// in every instruction set (of two bytes there is nothing else, of four hardly better); but where both parts of a pivot
// ascend, as those of our checkpoints do, they split a row in its own order, which some do by whole vectors.
#include "taco_cpu.h"

#include <stdexcept>
#include <vector>

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
void row(const Element* x, const Index* pivot, Element* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = x[pivot[i]];
}

template <class Element, class Index>
void rows(const GatherArgs& a, int threads) {
  const Index* const pivot = static_cast<const Index*>(a.pivot);
  check(pivot, a.width);
  const CpuKernels& isa = active_kernels();
  const auto split = sizeof(Element) == 2 ? isa.split_2 : isa.split_4;
  std::vector<std::uint16_t> masks;
  const bool whole = split && a.rows >= kSplitRows && masks_of(pivot, a.rank, a.width, masks);
  const std::int64_t useful = a.rows * a.width / kPerThread;
  on_team(static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads), [&](int index, int members) {
    const std::int64_t begin = a.rows * index / members, end = a.rows * (index + 1) / members;
    if (whole) {
      split({a.x, a.x_stride, masks.data(), a.first, a.first_stride, a.rest, a.rest_stride, a.width, a.rank}, begin, end);
      return;
    }
    for (std::int64_t r = begin; r < end; ++r) {
      const Element* const x = static_cast<const Element*>(a.x) + r * a.x_stride;
      row(x, pivot, static_cast<Element*>(a.first) + r * a.first_stride, a.rank);
      row(x, pivot + a.rank, static_cast<Element*>(a.rest) + r * a.rest_stride, a.width - a.rank);
    }
  });
}

template <class Element>
void gather_of(const GatherArgs& args, bool long_index, int threads) {
  long_index ? rows<Element, std::int64_t>(args, threads) : rows<Element, std::int32_t>(args, threads);
}

}  // namespace

void gather(const GatherArgs& args, bool long_index, int threads) {
  args.element == 4 ? gather_of<std::uint32_t>(args, long_index, threads)
                    : gather_of<std::uint16_t>(args, long_index, threads);
}

}  // namespace taco
