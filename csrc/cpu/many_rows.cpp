// The driver for many rows (ManyRows in isa.h): blocks of rows, and who takes them. Compiled for every CPU.
#include <memory>

#include "driver.h"
#include "gather.h"
#include "team.h"

namespace taco {
namespace {

// Where each thread has at least this share of the groups of rows that the busiest one has, every block of rows is one
// thread's: packed rows stay in the cache of the core that packed them, and nobody waits. With all threads in each block,
// a core fetches the others' parts of x from their caches. Two Zen 4 cores, bf16, 4096 x 4096: 27% faster at rank 256 and
// 512 rows, 2% at rank 1024 and 256 rows. The more threads, the dearer is sharing (not measured beyond two).
constexpr double kFilledByTwo = 15.0 / 16.0, kFilledByMore = 3.0 / 4.0;
// ... and where each has so many groups, since all threads then read all weights: fewer of 16 bits than of 32 (AVX2, two
// Zen 4 cores, fp32: 64 rows a fifth slower, 128 a twentieth, 256 rows 7% faster).
constexpr std::int64_t kGroupsAlone[2] = {2, 8};

struct ManyCall {
  const DtypeKernels& kernels;
  const ManyRows& many;
  const LowRankInput& input;
  const LowRankMap* maps;
  int count;
  const Gatherer* gatherer;

  std::int64_t element() const { return size_of(input.dtype); }
  std::int64_t columns() const { return many.group_columns && input.rows <= kGroup ? many.group_columns : many.columns; }
  std::int64_t places_of(std::int64_t columns) const { return many.places_of(columns); }
  std::int64_t width() const { return input.in + (gatherer ? maps[0].rank : 0); }

  // Places of x that are packed at once.
  std::int64_t places_at_once(int members) const {
    return places_of(members > 1 ? input.in : std::min(input.in, columns()));
  }

  // Floats of work space for a block of so many lanes, whole lines of the cache.
  std::int64_t floats(std::int64_t lanes, int members) const {
    std::int64_t per_lane = places_at_once(members);
    for (int i = 0; i < count; ++i) per_lane += places_of(maps[i].rank) + waiting_first(i) + waiting_second(i);
    const std::int64_t gathered = gatherer ? (lanes * width() * element() + 3) / 4 : 0;
    return scales(lanes) + (lanes * per_lane + gathered + kGroup - 1) / kGroup * kGroup;
  }

  // Rows [start, end) by `members` threads, of which this is one; `work` is theirs in common, `panel` its own.
  void block(std::int64_t start, std::int64_t end, float* work, char* panel, int index, int members) const {
    const std::int64_t rows = std::min(end, input.rows) - start, lanes = end - start;
    const auto together = [&] {
      if (members > 1) meet();
    };
    float* const scale = input.normalise && input.in > 0 ? work : nullptr;
    std::uint32_t* const packed = reinterpret_cast<std::uint32_t*>(work + scales(lanes));
    std::uint32_t* const behind = packed + lanes * places_at_once(members);  // the intermediates
    std::int64_t places = 0, waits = 0;
    for (int i = 0; i < count; ++i) {
      places += lanes * places_of(maps[i].rank);
      waits += lanes * (waiting_first(i) + waiting_second(i));
    }
    float* const waiting = reinterpret_cast<float*>(behind + places);

    const void* x = offset(input.x, start * input.x_stride, element());
    std::int64_t x_stride = input.x_stride;
    const void* gathered = nullptr;
    if (gatherer) {
      char* const to = reinterpret_cast<char*>(waiting + waits);
      char* const rest = to + maps[0].rank * element();
      gatherer->rows({x, x_stride, to, width(), rest, width()}, rows * index / members, rows * (index + 1) / members);
      gathered = to;
      x = rest, x_stride = width();
      together();
    }
    // body(map, its intermediate, where its sums wait in the first and in the second product)
    const auto each_map = [&](const auto& body) {
      std::uint32_t* t = behind;
      float* wait = waiting;
      for (int i = 0; i < count; ++i) {
        float* const of_second = wait + lanes * waiting_first(i);
        body(maps[i], t, wait, of_second);
        t += lanes * places_of(maps[i].rank);
        wait = of_second + lanes * waiting_second(i);
      }
    };
    if (gathered) pack_share(many, {gathered, width(), rows, maps[0].rank, behind, lanes}, index, members);
    if (scale) norm_scales(kernels, input, x, rows, index, members, scale);
    // So many columns at a time as the second cache holds of x. A thread on its own multiplies them before it packs the next
    // ones into their place; with others all columns have places, so that they meet once.
    const std::int64_t chunk = columns();
    const auto chunk_of_x = [&](std::int64_t at) {
      return Packing{offset(x, at, element()), x_stride, rows, std::min(chunk, input.in - at),
                     packed + (members > 1 && at ? lanes * places_of(at) : 0), lanes};
    };
    if (members > 1) {
      for (std::int64_t at = 0; at < input.in; at += chunk) pack_share(many, chunk_of_x(at), index, members);
      meet();
    }
    std::int64_t at = 0;
    do {  // a product of nothing is one, too
      const Packing some = chunk_of_x(at);
      if (members == 1) pack_share(many, some, index, members);
      Shares of_ranks(index, members);
      for (int i = 0; i < count; ++i) of_ranks.expect(maps[i].rank, 1);
      each_map([&](const LowRankMap& map, std::uint32_t* t, float* wait, float*) {
        const Range mine = of_ranks.next(map.rank, 1);
        each_panel(kernels, offset(map.v, at, map.v_scale ? 1 : element()), map.v_stride, some.columns, map.v_scale, true,
                   element(), panel, mine,
                   [&](const void* v, std::int64_t stride, std::int64_t begin, std::int64_t end) {
                     const ManyFirst first = {some.places, lanes, some.columns, map.rank, v, stride, t,
                                              gathered != nullptr, wait, at > 0, at + chunk < input.in};
                     many.first(first, begin, end);
                   });
      });
      at += chunk;
    } while (at < input.in);
    together();
    Shares of_outputs(index, members);
    for (int i = 0; i < count; ++i) of_outputs.expect(maps[i].out, maps[i].rank + kOutputCost);
    each_map([&](const LowRankMap& map, std::uint32_t* t, float*, float* wait) {
      const Range mine = of_outputs.next(map.out, map.rank + kOutputCost);
      each_panel(kernels, map.u, map.u_stride, map.rank, map.u_scale, false, element(), panel, mine,
                 [&](const void* u, std::int64_t stride, std::int64_t begin, std::int64_t end) {
                   const SecondProduct product = {
                       nullptr, {}, u, stride, scale, map.bias,
                       offset(map.residual, start * map.residual_stride, element()), map.residual_stride,
                       offset(map.y, start * map.out, element()), nullptr, map.out, rows, map.rank};
                   many.second({t, lanes, product, wait}, begin, end);
                 });
    });
  }

 private:
  // Floats of the norms' scales: whole lines of the cache, so that vectors of what lies behind them are aligned
  static std::int64_t scales(std::int64_t lanes) { return (lanes + kGroup - 1) / kGroup * kGroup; }
  // Columns of sums that wait: those of one map at a time, but threads need not work on the same one.
  std::int64_t waiting_first(int i) const { return input.in > columns() ? maps[i].rank : 0; }
  std::int64_t waiting_second(int i) const { return maps[i].rank > columns() ? maps[i].out : 0; }
};

}  // namespace

void low_rank_many(const DtypeKernels& kernels, const ManyRows& many, const LowRankInput& input, const LowRankMap* maps,
                   int count, int threads, const Gatherer* gatherer) {
  const ManyCall call = {kernels, many, input, maps, count, gatherer};
  std::int64_t weights = 0;
  for (int i = 0; i < count; ++i) weights += maps[i].rank * (input.in + maps[i].out);
  const int team = threads_for(weights, input, threads);
  const std::int64_t group = many.group, groups = (input.rows + group - 1) / group;
  const std::int64_t most_groups = (groups + team - 1) / team;  // of a thread, on its own
  const double filled = static_cast<double>(groups) / static_cast<double>(team * most_groups);
  const std::int64_t least = kGroupsAlone[input.dtype == Dtype::kF32];
  const bool alone = group == kGroup && groups >= least * team && filled >= (team > 2 ? kFilledByMore : kFilledByTwo);
  // Blocks of at most kRowBlock rows, of as equal numbers of groups as can be: a lone group costs nearly as much as two.
  std::int64_t blocks = (groups * group + kRowBlock - 1) / kRowBlock;
  if (alone) blocks = (blocks + team - 1) / team * team;
  const std::int64_t floats = call.floats((groups + blocks - 1) / blocks * group, alone ? 1 : team);
  float* const work = scratch.get(static_cast<std::size_t>(floats * (alone ? team : 1)));
  const Panels panels = panels_for(maps, count, std::min(input.in, call.columns()), call.element(), team);
  const auto block = [&](std::int64_t number, float* own, char* panel, int index, int members) {
    call.block(groups * number / blocks * group, groups * (number + 1) / blocks * group, own, panel, index, members);
  };
  if (alone) {
    on_team(team, [&](int index, int members) {
      for (std::int64_t b = blocks * index / members; b < blocks * (index + 1) / members; ++b)
        block(b, work + floats * index, panels.of(index), 0, 1);
    });
    return;
  }
  for (std::int64_t b = 0; b < blocks; ++b)
    on_team(team, [&](int index, int members) { block(b, work, panels.of(index), index, members); });
}

void pivoted_low_rank(const LowRankInput& input, const void* pivot, bool long_index, LowRankMap map, int threads) {
  const std::int64_t element = size_of(input.dtype), width = input.in;
  const Gatherer gatherer(pivot, long_index, width, map.rank, element, input.rows);
  if (input.rows <= 0) return;
  LowRankInput behind = input;
  behind.in = width - map.rank;
  const DtypeKernels& kernels = active_kernels().by_dtype[static_cast<int>(input.dtype)];
  if (const ManyRows* many = many_rows(kernels.many, input.rows, map.rank)) {
    low_rank_many(kernels, *many, behind, &map, 1, threads, &gatherer);
    return;
  }
  const std::unique_ptr<char[]> gathered(new char[static_cast<std::size_t>(input.rows * width * element)]);
  char* const rest = gathered.get() + map.rank * element;
  gatherer.all({input.x, input.x_stride, gathered.get(), width, rest, width}, input.rows, threads);
  behind.x = rest, behind.x_stride = width;
  map.direct = gathered.get(), map.direct_stride = width;
  low_rank(behind, &map, 1, threads);
}

}  // namespace taco
