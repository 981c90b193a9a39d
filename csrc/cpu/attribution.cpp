// Threads for singular_attribution and for the reduction behind it. Compiled for every CPU.
#include <algorithm>
#include <memory>

#include "isa.h"
#include "taco_cpu.h"
#include "team.h"

namespace taco {
namespace {

// Threads share the directions, never the rows: no sum is split, so the bits do not depend on how many there are.
std::int64_t steps_of(std::int64_t directions) { return (directions + kStepMultiple - 1) / kStepMultiple; }

// body(begin, end) for a thread's share of the directions, in whole steps
template <class Body>
void on_share(std::int64_t directions, int index, int members, const Body& body) {
  const std::int64_t steps = steps_of(directions), begin = steps * index / members * kStepMultiple;
  const std::int64_t end = std::min(directions, steps * (index + 1) / members * kStepMultiple);
  if (begin < end) body(begin, end);
}

}  // namespace

void attribution(const AttributionArgs& args, int threads) {
  if (args.rows <= 0 || args.directions <= 0) return;
  const AttributionBlock& block = args.block;
  const auto kernel = active_kernels().by_dtype[static_cast<int>(args.dtype)].attribution;
  // One more thread is worth waking for some tens of microseconds of work: a few elements go by per nanosecond.
  constexpr std::int64_t kElementsPerThread = 64 * 1024;
  const std::int64_t worth = std::min(steps_of(args.directions), args.rows * args.directions / kElementsPerThread);
  const int team = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, worth)));
  on_team(team, [&](int index, int members) {
    on_share(args.directions, index, members, [&](std::int64_t begin, std::int64_t end) { kernel(block, begin, end); });
  });
}

bool singular_attribution(const SingularAttribution& p, int threads) {
  const CpuKernels& isa = active_kernels();
  const DtypeKernels& kernels = isa.by_dtype[static_cast<int>(p.dtype)];
  // Those for many rows have products in fp32 on some instruction sets. Elsewhere dot products along the columns are as
  // fast, of those that take the results of several rows together.
  const ManyRows* const many = kernels.many && kernels.many->width == 1 ? kernels.many : nullptr;
  if (!many && !kernels.groups) return false;
  if (p.rows <= 0 || p.directions <= 0) return true;
  const auto reduce = isa.by_dtype[static_cast<int>(Dtype::kF32)].attribution;
  const std::int64_t element = p.dtype == Dtype::kF32 ? 4 : 2;
  const int team = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, steps_of(p.directions))));
  // of a block of rows: both inputs packed, both products, and the sums of columns that wait for others
  const std::int64_t most = std::min(kRowBlock, (p.rows + kGroup - 1) / kGroup * kGroup);
  const std::int64_t packed_x = many ? most * many->places_of(p.in) : 0;
  const std::int64_t packed = many ? packed_x + most * many->places_of(p.out) : 0, products = most * p.directions;
  const std::unique_ptr<float[]> work(new float[static_cast<std::size_t>(packed + 3 * products)]);
  std::uint32_t* const x = reinterpret_cast<std::uint32_t*>(work.get());
  std::uint32_t* const g = x + packed_x;
  float* const a = work.get() + packed;
  float* const b = a + products;
  float* const waiting = b + products;

  for (std::int64_t start = 0; start < p.rows; start += most) {
    const std::int64_t rows = std::min(most, p.rows - start), lanes = (rows + kGroup - 1) / kGroup * kGroup;
    const auto packing = [&](const void* data, std::int64_t stride, std::int64_t columns, std::uint32_t* to) {
      return Packing{static_cast<const char*>(data) + start * stride * element, stride, rows, columns, to, lanes};
    };
    AttributionBlock block = {a, p.directions, b, p.directions, rows, p.tokens, start % p.tokens};
    block.add_to(p.totals, p.directions);
    on_team(team, [&](int index, int members) {
      if (many) {
        pack_share(*many, packing(p.x, p.x_stride, p.in, x), index, members);
        pack_share(*many, packing(p.grad, p.grad_stride, p.out, g), index, members);
        meet();
      }
      on_share(p.directions, index, members, [&](std::int64_t begin, std::int64_t end) {
        const auto multiply = [&](const Packing& input, const void* directions, std::int64_t stride, float* to) {
          if (many) {
            const SecondProduct product = {nullptr, {}, directions, stride, nullptr, nullptr, nullptr, 0, nullptr,
                                           to, p.directions, rows, input.columns};
            many->second({input.places, lanes, product, waiting}, begin, end);
          } else {
            kernels.first({input.x, input.x_stride, directions, stride, to, {p.directions, Layout::kInOrder}, rows,
                           input.columns}, begin, end);
          }
        };
        multiply(packing(p.x, p.x_stride, p.in, x), p.v, p.v_stride, a);
        multiply(packing(p.grad, p.grad_stride, p.out, g), p.u, p.u_stride, b);
        reduce(block, begin, end);
      });
    });
  }
  return true;
}

}  // namespace taco
