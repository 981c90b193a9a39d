// Threads for singular_attribution and for the reduction behind it. Compiled for every CPU.
#include <algorithm>
#include <memory>

#include "isa.h"
#include "taco_cpu.h"
#include "team.h"

namespace taco {

void attribution(const AttributionArgs& args, int threads) {
  if (args.rows <= 0 || args.directions <= 0) return;
  const AttributionBlock& block = args.block;
  const auto kernel = active_kernels().by_dtype[static_cast<int>(args.dtype)].attribution;
  // Threads share the columns, never the rows: no sum is split, so the bits do not depend on how many there are.
  const std::int64_t steps = (args.directions + kStepMultiple - 1) / kStepMultiple;
  // One more thread is worth waking for some tens of microseconds of work: a few elements go by per nanosecond.
  constexpr std::int64_t kElementsPerThread = 64 * 1024;
  const std::int64_t worth = args.rows * args.directions / kElementsPerThread;
  const int team = static_cast<int>(std::max<std::int64_t>(1, std::min({std::int64_t{threads}, steps, worth})));
  const auto part = [&](int index, int count) {
    const std::int64_t begin = steps * index / count * kStepMultiple;
    const std::int64_t end = std::min(args.directions, steps * (index + 1) / count * kStepMultiple);
    if (begin < end) kernel(block, begin, end);
  };
on_team(team, part);
}

bool singular_attribution(const SingularAttribution& p, int threads) {
  const CpuKernels& isa = active_kernels();
  const ManyRows* const many = isa.by_dtype[static_cast<int>(p.dtype)].many;
  if (many == nullptr || many->width != 1) return false;
  if (p.rows <= 0 || p.directions <= 0) return true;
  const auto reduce = isa.by_dtype[static_cast<int>(Dtype::kF32)].attribution;
  const std::int64_t element = p.dtype == Dtype::kF32 ? 4 : 2;
  const std::int64_t steps = (p.directions + kStepMultiple - 1) / kStepMultiple;
  const int team = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, steps)));
  // of a block of rows: both inputs packed, both products, and the sums of columns that wait for others
  const std::int64_t most = std::min(kRowBlock, (p.rows + kGroup - 1) / kGroup * kGroup);
  const std::int64_t packed = most * (p.in + p.out), products = most * p.directions;
  const std::unique_ptr<float[]> work(new float[static_cast<std::size_t>(packed + 3 * products)]);
  std::uint32_t* const x = reinterpret_cast<std::uint32_t*>(work.get());
  std::uint32_t* const g = x + most * p.in;
  float* const a = work.get() + packed;
  float* const b = a + products;
  float* const waiting = b + products;
  double* const sums = p.totals;

  for (std::int64_t start = 0; start < p.rows; start += most) {
    const std::int64_t rows = std::min(most, p.rows - start), lanes = (rows + kGroup - 1) / kGroup * kGroup;
    const auto from = [&](const void* data, std::int64_t stride) {
      return static_cast<const char*>(data) + start * stride * element;
    };
    on_team(team, [&](int index, int members) {
      const auto pack = [&](const void* data, std::int64_t stride, std::int64_t columns, std::uint32_t* to) {
        const std::int64_t vectors = (columns + kGroup - 1) / kGroup;
        const std::int64_t first = vectors * index / members * kGroup, last = vectors * (index + 1) / members * kGroup;
        many->pack({from(data, stride), stride, rows, columns, to, lanes}, first, std::min(last, columns));
      };
      pack(p.x, p.x_stride, p.in, x);
      pack(p.grad, p.grad_stride, p.out, g);
      meet();
      // Threads share the directions, in both products and in the sums: none waits for another.
      const std::int64_t begin = steps * index / members * kStepMultiple;
      const std::int64_t end = std::min(p.directions, steps * (index + 1) / members * kStepMultiple);
      if (begin >= end) return;
      const auto multiply = [&](const std::uint32_t* input, std::int64_t width, const void* directions,
                                std::int64_t stride, float* to) {
        const SecondProduct product = {nullptr, {}, directions, stride, nullptr, nullptr, nullptr, 0, nullptr,
                                       to, p.directions, rows, width};
        many->second({input, lanes, product, waiting}, begin, end);
      };
      multiply(x, p.in, p.v, p.v_stride, a);
      multiply(g, p.out, p.u, p.u_stride, b);
      reduce({a, p.directions, b, p.directions, rows, p.tokens, start % p.tokens, sums, sums + p.directions,
              sums + 2 * p.directions, sums + 3 * p.directions, sums + 4 * p.directions}, begin, end);
    });
  }
  return true;
}

}  // namespace taco
