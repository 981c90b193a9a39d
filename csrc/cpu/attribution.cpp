// Threads for the reduction behind singular_attribution. Compiled for every CPU.
#include <algorithm>

#include "isa.h"
#include "taco_cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif

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
#ifdef _OPENMP
  if (team > 1) {
#pragma omp parallel num_threads(team)
    part(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  part(0, 1);
}

}  // namespace taco
