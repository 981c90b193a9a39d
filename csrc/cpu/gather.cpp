// Inputs of a pivoted map, reordered: what the identity takes first, then what goes through v. Loads of two bytes from
// anywhere have no faster form in any instruction set (of four bytes hardly), so one compilation serves every CPU.
#include "taco_cpu.h"

#include <stdexcept>

namespace taco {
namespace {

// Elements that make one more thread worth waking.
constexpr std::int64_t kPerThread = 1 << 14;

template <class Index>
void check(const Index* pivot, std::int64_t width) {
  Index low = 0, high = 0;
  for (std::int64_t i = 0; i < width; ++i) {
    low = pivot[i] < low ? pivot[i] : low;
    high = pivot[i] > high ? pivot[i] : high;
  }
  if (low < 0 || high >= width) throw std::out_of_range("pivot names an input that is not there");
}

template <class Element, class Index>
void row(const Element* x, const Index* pivot, Element* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = x[pivot[i]];
}

template <class Element, class Index>
void rows(const GatherArgs& a, int threads) {
  const Index* const pivot = static_cast<const Index*>(a.pivot);
  check(pivot, a.width);
  const std::int64_t useful = a.rows * a.width / kPerThread;
  const int team = static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
#else
  (void)team;
#endif
  for (std::int64_t r = 0; r < a.rows; ++r) {
    const Element* const x = static_cast<const Element*>(a.x) + r * a.x_stride;
    row(x, pivot, static_cast<Element*>(a.first) + r * a.first_stride, a.rank);
    row(x, pivot + a.rank, static_cast<Element*>(a.rest) + r * a.rest_stride, a.width - a.rank);
  }
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
