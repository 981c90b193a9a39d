// y = ((x v^T * v_scale) * u_scale) u^T + bias with factors of 8-bit integers. Compiled for every CPU.
#include <memory>

#include "driver.h"
#include "gather.h"
#include "isa.h"
#include "taco_cpu.h"
#include "team.h"

namespace taco {
namespace {

// Rows of x for which it pays to unpack weights into the sums themselves: to unpack them anew for every few rows costs more
// than to multiply them.
constexpr std::int64_t kFewRows = 8;

}  // namespace

void unpack_int8(Dtype dtype, const Int8Rows& rows, int threads) {
  const DtypeKernels& kernels = active_kernels().by_dtype[static_cast<int>(dtype)];
  const std::int64_t useful = rows.rows * rows.columns / kBytesPerThread;
  const int team = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, useful)));
  on_team(team, [&](int index, int members) {
    kernels.int8.unpack(rows, rows.rows * index / members, rows.rows * (index + 1) / members);
  });
}

void low_rank_int8(const LowRankInput& input, const void* pivot, bool long_index, const Int8Map& map, int threads) {
  if (input.rows > kFewRows) {
    LowRankMap same = {map.v, map.v_stride, map.u, map.u_stride, map.bias, map.y, map.rank, map.out, nullptr, 0};
    same.v_scale = map.v_scale, same.u_scale = map.u_scale;
    if (pivot)
      pivoted_low_rank(input, pivot, long_index, same, threads);
    else
      low_rank(input, &same, 1, threads);
    return;
  }
  const std::int64_t element = size_of(input.dtype), behind = pivot ? input.in - map.rank : input.in;
  std::unique_ptr<char[]> gathered;
  const void* x = input.x;
  std::int64_t x_stride = input.x_stride;
  if (pivot) {
    const Gatherer gatherer(pivot, long_index, input.in, map.rank, element, input.rows);
    if (input.rows <= 0) return;
    gathered.reset(new char[static_cast<std::size_t>(input.rows * input.in * element)]);
    char* const rest = gathered.get() + map.rank * element;
    gatherer.all({x, x_stride, gathered.get(), input.in, rest, input.in}, input.rows, threads);
    x = rest, x_stride = input.in;
  }
  if (input.rows <= 0) return;
  const DtypeKernels& kernels = active_kernels().by_dtype[static_cast<int>(input.dtype)];
  const Layout layout = {whole_steps(map.rank), Layout::kRows};
  const std::int64_t wide_stride = whole_steps(behind);
  const std::int64_t rows = input.rows;
  float* const wide = scratch.get(static_cast<std::size_t>(rows * (wide_stride + layout.stride)));
  float* const t = wide + rows * wide_stride;
  // half the bytes of what the estimate is made for, but each of them is widened first
  const int team = threads_for(map.rank * (behind + map.out), input, threads);
  const FirstInt8 first = {wide, wide_stride, map.v, map.v_stride, map.v_scale, map.u_scale, gathered.get(), input.in, t,
                           layout.stride, rows, behind};
  const SecondProduct second = {t, layout, map.u, map.u_stride, nullptr, map.bias, nullptr, 0, map.y, nullptr, map.out,
                                rows, map.rank};
  on_team(team, [&](int index, int members) {
    for (std::int64_t r = index; r < rows; r += members) {
      kernels.int8.widen(offset(x, r * x_stride, element), wide + r * wide_stride, behind);
      for (std::int64_t k = map.rank; k < layout.stride; ++k) t[r * layout.stride + k] = 0.0f;
    }
    meet();
    Shares directions(index, members), outputs(index, members);
    directions.expect(map.rank, 1);
    const Range of_v = directions.next(map.rank, 1);
    if (of_v.begin < of_v.end) kernels.int8.first(first, of_v.begin, of_v.end);
    meet();
    outputs.expect(map.out, map.rank + kOutputCost);
    const Range of_u = outputs.next(map.out, map.rank + kOutputCost);
    if (of_u.begin < of_u.end) kernels.int8.second(second, of_u.begin, of_u.end);
  });
}

}  // namespace taco
