// The driver: which instruction set, how many threads, who computes what. Compiled for every CPU.
#include "taco_cpu.h"

#include <atomic>
#include <cstring>
#include <limits>

#include "driver.h"
#include "isa.h"
#include "team.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define TACO_X86 1
#endif

namespace taco {
namespace {

#ifdef TACO_X86
struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512bf16 = false;

  CpuFeatures() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c & (1u << 12), osxsave = c & (1u << 27), avx = c & (1u << 28), f16c = c & (1u << 29);
    if (!osxsave || !avx) return;
    // The operating system must save the wider registers, or using them is an illegal instruction.
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool saves_ymm = (low & 0x6u) == 0x6u, saves_zmm = (low & 0xe6u) == 0xe6u;
    if (!saves_ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned subleaves = a;
    avx2 = fma && f16c && (b & (1u << 5));
    const bool f = b & (1u << 16), dq = b & (1u << 17), bw = b & (1u << 30), vl = b & (1u << 31);
    avx512 = avx2 && saves_zmm && f && dq && bw && vl;
    if (avx512 && subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512bf16 = a & (1u << 5);
  }
};
#endif

std::vector<const CpuKernels*> usable() {
  std::vector<const CpuKernels*> found;
#ifdef TACO_X86
  const CpuFeatures cpu;
#ifdef TACO_HAVE_AVX512BF16
  if (cpu.avx512bf16) found.push_back(&kAvx512Bf16Kernels);
#endif
#ifdef TACO_HAVE_AVX512
  if (cpu.avx512) found.push_back(&kAvx512Kernels);
#endif
#ifdef TACO_HAVE_AVX2
  if (cpu.avx2) found.push_back(&kAvx2Kernels);
#endif
#endif
  found.push_back(&kBaselineKernels);
  return found;
}

const std::vector<const CpuKernels*>& usable_once() {
  static const std::vector<const CpuKernels*> kernels = usable();
  return kernels;
}

std::atomic<const CpuKernels*>& active() {
  static std::atomic<const CpuKernels*> kernels{usable_once().front()};
  return kernels;
}

// Rows of x from which the second product has the batch rows as lanes and widens weights first (Layout::kGroups), where the
// instruction set offers that. Of many rows every widened weight serves several vectors; of fewer that pays only where the
// rank is so small that additions across vectors cost as much as the products (two Zen 4 cores, fp16: 9% less time at rank
// 64 and 12 rows, 40% more at rank 512).
constexpr std::int64_t kGroupedRows = 17, kGroupedRowsOfSmallRanks = 11, kSmallRank = 128;

// Lanes of vectors in places (Layout::kPlaces) for a call of so many rows; 0 where they are not for it.
std::int64_t lanes_for(std::int64_t rows, const DtypeKernels& kernels) {
  if (!kernels.places || rows < kernels.places || rows > Layout::kLanes) return 0;
  return rows <= Layout::kHalfLanes ? Layout::kHalfLanes : Layout::kLanes;
}

// By all rows of the call, not by those of a block: a row's bits must not depend on where it stands.
Layout layout_for(std::int64_t rank, std::int64_t rows, const DtypeKernels& kernels, bool may_round = true) {
  const std::int64_t stride = whole_steps(rank);
  const std::int64_t lanes = may_round ? lanes_for(rows, kernels) : 0;
  if (lanes) return {stride, Layout::kPlaces, lanes};
  const bool groups = kernels.groups && rows >= (rank < kSmallRank ? kGroupedRowsOfSmallRanks : kGroupedRows);
  return {stride, groups ? Layout::kGroups : Layout::kRows};
}

// Rank from which on the first product has x in places, too (Layout::kPlaces): of fewer directions it saves less than packing
// and one more meeting cost (two Zen 4 cores, 4096 columns, 5 to 16 rows: 128 directions up to 10% slower, 192 level, 1024 up
// to 25% faster). By each map's own rank: its bits must not depend on its company.
constexpr std::int64_t kPackedRank = 160;

// x in places, where there is a map that wants it so; else it has no lanes.
class PackedInput {
 public:
  PackedInput(const LowRankInput& input, const LowRankMap* maps, int count, const DtypeKernels& kernels)
      : kernels_(kernels), input_(input), width_(static_cast<int>(4 / size_of(input.dtype))) {
    const bool any = std::any_of(maps, maps + count, [](const LowRankMap& map) { return map.rank >= kPackedRank; });
    if (any) lanes_ = lanes_for(input.rows, kernels);
  }
  std::int64_t floats() const { return lanes_ * ((input_.in + width_ * kGroup - 1) / (width_ * kGroup) * kGroup); }
  // Tells a product that x is at `places`, if that is how it wants it.
  void offer(const float* places, FirstProduct& product, std::int64_t rank) const {
    if (lanes_ && rank >= kPackedRank) product.x = places, product.x_lanes = lanes_;
  }
  // The thread's share of it, and a meeting with those that do the rest
  void pack(float* places, int index, int members) const {
    if (!lanes_) return;
    std::uint32_t* const to = reinterpret_cast<std::uint32_t*>(places);
    pack_share(kernels_.pack, width_, {input_.x, input_.x_stride, input_.rows, input_.in, to, lanes_}, index, members);
    meet();
  }

 private:
  const DtypeKernels& kernels_;
  const LowRankInput& input_;
  int width_;  // columns of a place
  std::int64_t lanes_ = 0;
};

// The filling behind the last column of t must be zero: it meets what stands for missing weights. Positions are permuted
// only within a step, so the last step holds all of it. Lanes without a row are multiplied as well: whatever was there
// before could be denormal, which is slow on some CPUs.
void zero_filling(float* t, const Layout& layout, std::int64_t rank, std::int64_t rows, std::int64_t element) {
  const std::int64_t group = layout.rows_per_group(), groups = (rows + group - 1) / group;
  const bool whole = rows == groups * group, filled = layout.stride == rank;  // without directions, too
  if (filled && whole) return;
  const std::int64_t size = layout.kind == Layout::kPlaces ? element : static_cast<std::int64_t>(sizeof(float));
  const std::int64_t all = group * layout.stride * size, last = filled ? 0 : group * kStepMultiple * size;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t zeros = !whole && g == groups - 1 ? all : last;
    std::memset(reinterpret_cast<char*>(t) + (g + 1) * all - zeros, 0, static_cast<std::size_t>(zeros));
  }
}

// One input block and the maps that share it, between two barriers each.
struct Stage {
  const DtypeKernels* kernels;
  FirstProduct* first;
  SecondProduct* second;
  const LowRankMap* maps;
  int count;
  std::int64_t element;
  Panels panels;

  void first_products(int index, int threads) const {
    Shares shares(index, threads);
    for (int i = 0; i < count; ++i) shares.expect(maps[i].rank, 1);
    for (int i = 0; i < count; ++i) {
      const Range mine = shares.next(maps[i].rank, 1);
      each_panel(*kernels, maps[i].v, maps[i].v_stride, first[i].in, maps[i].v_scale, true, element,
                 panels.of(index), mine,
                 [&](const void* v, std::int64_t stride, std::int64_t begin, std::int64_t end) {
                   FirstProduct some = first[i];
                   some.v = v, some.v_stride = stride;
                   kernels->first(some, begin, end);
                 });
    }
  }
  void second_products(int index, int threads) const {
    Shares shares(index, threads);
    for (int i = 0; i < count; ++i) shares.expect(maps[i].out, maps[i].rank + kOutputCost);
    for (int i = 0; i < count; ++i) {
      const Range mine = shares.next(maps[i].out, maps[i].rank + kOutputCost);
      each_panel(*kernels, maps[i].u, maps[i].u_stride, maps[i].rank, maps[i].u_scale, false, element,
                 panels.of(index), mine,
                 [&](const void* u, std::int64_t stride, std::int64_t begin, std::int64_t end) {
                   SecondProduct some = second[i];
                   some.u = u, some.u_stride = stride;
                   kernels->second(some, begin, end);
                 });
    }
  }
};

}  // namespace

void low_rank(const LowRankInput& input, const LowRankMap* maps, int count, int threads) {
  if (input.rows <= 0 || count <= 0) return;
  const CpuKernels* isa = active().load(std::memory_order_relaxed);
  const DtypeKernels* kernels = &isa->by_dtype[static_cast<int>(input.dtype)];
  std::int64_t largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max(largest, maps[i].rank);
  if (const ManyRows* many = many_rows(kernels->many, input.rows, largest)) {
    low_rank_many(*kernels, *many, input, maps, count, threads);
    return;
  }
  const std::int64_t element = size_of(input.dtype), most = std::min(input.rows, kRowBlock);
  std::int64_t weights = 0, floats = most;  // the norms' scales first
  for (int i = 0; i < count; ++i) {
    weights += maps[i].rank * (input.in + maps[i].out);
    floats += layout_for(maps[i].rank, input.rows, *kernels).floats(most);
  }
  floats += kStepMultiple;  // what rounds the scales up, so that vectors of t are aligned
  const PackedInput packed(input, maps, count, *kernels);
  floats += packed.floats();
  const int team = threads_for(weights, input, threads);
  float* const scales = scratch.get(static_cast<std::size_t>(floats));
  float* const scale = input.normalise && input.in > 0 ? scales : nullptr;
  const Panels panels = panels_for(maps, count, input.in, element, team);

  std::vector<FirstProduct>& first = scratch.first;
  std::vector<SecondProduct>& second = scratch.second;
  first.resize(static_cast<std::size_t>(count));
  second.resize(static_cast<std::size_t>(count));
  for (std::int64_t start = 0; start < input.rows; start += kRowBlock) {
    const std::int64_t rows = std::min(kRowBlock, input.rows - start);
    const void* const x = offset(input.x, start * input.x_stride, element);
    float* t = scales + whole_steps(most);
    float* const places = t;
    t += packed.floats();
    for (int i = 0; i < count; ++i) {
      const LowRankMap& map = maps[i];
      const Layout layout = layout_for(map.rank, input.rows, *kernels);
      const std::size_t k = static_cast<std::size_t>(i);
      zero_filling(t, layout, map.rank, rows, element);
      first[k] = {x, input.x_stride, map.v, map.v_stride, t, layout, rows, input.in,
                  offset(map.direct, start * map.direct_stride, element), map.direct_stride};
      second[k] = {t, layout, map.u, map.u_stride, scale, map.bias,
                   offset(map.residual, start * map.residual_stride, element), map.residual_stride,
                   offset(map.y, start * map.out, element), nullptr, map.out, rows, map.rank};
      t += layout.floats(rows);
      packed.offer(places, first[k], map.rank);
    }
    const Stage stage = {kernels, first.data(), second.data(), maps, count, element, panels};
    on_team(team, [&](int index, int members) {
      if (scale) norm_scales(*kernels, input, x, rows, index, members, scale);
      packed.pack(places, index, members);
      stage.first_products(index, members);
      meet();
      stage.second_products(index, members);
    });
  }
}

void low_rank_mlp(const LowRankInput& input, const LowRankMap& gate, const LowRankMap& up, const LowRankMap& down,
                  Activation activation, int threads) {
  if (input.rows <= 0) return;
  const CpuKernels* isa = active().load(std::memory_order_relaxed);
  const DtypeKernels* kernels = &isa->by_dtype[static_cast<int>(input.dtype)];
  const std::int64_t element = size_of(input.dtype), most = std::min(input.rows, kRowBlock);
  const std::int64_t width = gate.out;
  const std::int64_t stride = whole_steps(width);
  const LowRankMap open[2] = {gate, up};
  const LowRankMap* const all[3] = {&gate, &up, &down};
  std::int64_t floats = 3 * most * stride;  // gate, up and their product, which may need half of its share
  for (const LowRankMap* map : all) floats += layout_for(map->rank, input.rows, *kernels, input.dtype == Dtype::kF32).floats(most);
  const std::int64_t weights =
      gate.rank * (input.in + width) + up.rank * (input.in + width) + down.rank * (width + down.out);
  const int team = threads_for(weights, input, threads);
  float* const gate_out = scratch.get(static_cast<std::size_t>(floats));
  float* const up_out = gate_out + most * stride;
  float* const hidden = up_out + most * stride;

  for (std::int64_t start = 0; start < input.rows; start += kRowBlock) {
    const std::int64_t rows = std::min(kRowBlock, input.rows - start);
    const void* const x = offset(input.x, start * input.x_stride, element);
    float* t = hidden + most * stride;
    float* ts[3];
    Layout layouts[3];
    for (int i = 0; i < 3; ++i) {
      layouts[i] = layout_for(all[i]->rank, input.rows, *kernels, input.dtype == Dtype::kF32);
      ts[i] = t;
      zero_filling(t, layouts[i], all[i]->rank, rows, element);
      t += layouts[i].floats(rows);
    }
    FirstProduct first[2];
    SecondProduct second[2];
    float* const wide[2] = {gate_out, up_out};
    for (int i = 0; i < 2; ++i) {
      first[i] = {x, input.x_stride, open[i].v, open[i].v_stride, ts[i], layouts[i], rows, input.in};
      second[i] = {ts[i], layouts[i], open[i].u, open[i].u_stride, nullptr, open[i].bias, nullptr, 0, nullptr, wide[i],
                   stride, rows, open[i].rank};
    }
    const Gating gating = {gate_out, up_out, stride, hidden, stride, rows, static_cast<int>(activation)};
    FirstProduct down_first = {hidden, stride, down.v, down.v_stride, ts[2], layouts[2], rows, width};
    SecondProduct down_second = {ts[2], layouts[2], down.u, down.u_stride, nullptr, down.bias, nullptr, 0,
                                 offset(down.y, start * down.out, element), nullptr, down.out, rows, down.rank};
    const Stage opening = {kernels, first, second, open, 2, element, {}};
    const Stage closing = {kernels, &down_first, &down_second, &down, 1, element, {}};
    on_team(team, [&](int index, int members) {
      opening.first_products(index, members);
      meet();
      // The same outputs of gate and up, so that their product needs no meeting in between.
      Shares shares(index, members);
      shares.expect(width, 1);
      const Range mine = shares.next(width, 1);
      if (mine.begin < mine.end) {
        kernels->second(second[0], mine.begin, mine.end);
        kernels->second(second[1], mine.begin, mine.end);
        kernels->gating(gating, mine.begin, mine.end);
      }
      meet();
      closing.first_products(index, members);
      meet();
      closing.second_products(index, members);
    });
  }
}

const CpuKernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : usable_once()) names.emplace_back(kernels->name);
  return names;
}

std::vector<std::string> compiled_cpu_isas() {
  std::vector<std::string> names;
#ifdef TACO_HAVE_AVX512BF16
  names.emplace_back("avx512bf16");
#endif
#ifdef TACO_HAVE_AVX512
  names.emplace_back("avx512");
#endif
#ifdef TACO_HAVE_AVX2
  names.emplace_back("avx2");
#endif
  names.emplace_back("baseline");
  return names;
}

std::string cpu_isa() { return active().load()->name; }

bool cpu_is_amd() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

std::int64_t many_rows_from(Dtype dtype) {
  const ManyRows* many = active_kernels().by_dtype[static_cast<int>(dtype)].many;
  while (many && many->fewer) many = many->fewer;
  return many ? many->few + 1 : std::numeric_limits<std::int64_t>::max();
}

bool set_cpu_isa(const std::string& name) {
  if (name == "auto") {
    active().store(usable_once().front());
    return true;
  }
  for (const CpuKernels* kernels : usable_once())
    if (name == kernels->name) {
      active().store(kernels);
      return true;
    }
  return false;
}

int omp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

std::uint64_t read_memory(const void* data, std::int64_t bytes, int threads) {
  const std::uint64_t* words = static_cast<const std::uint64_t*>(data);
  const std::int64_t lines = bytes / 64;
  std::uint64_t total = 0;
#ifndef _OPENMP
  (void)threads;
#else
#pragma omp parallel num_threads(threads) reduction(+ : total)
#endif
  {
#ifdef _OPENMP
    const std::int64_t index = omp_get_thread_num(), count = omp_get_num_threads();
#else
    const std::int64_t index = 0, count = 1;
#endif
    const std::int64_t begin = lines * index / count, end = lines * (index + 1) / count;
    // Four streams without a gap, which hardware prefetchers follow, like the kernels' own way through the weights: one
    // stream alone, or prefetches by hand, left bandwidth unused, and a yardstick that the measured thing can beat is
    // none.
    const std::int64_t stream = (end - begin) / 4;
    const std::uint64_t* p[4];
    for (int s = 0; s < 4; ++s) p[s] = words + 8 * (begin + s * stream);
    std::uint64_t sums[4] = {};
    for (std::int64_t i = 0; i < 8 * stream; i += 8)
      for (int s = 0; s < 4; ++s)  // two words of a line bring all of it in
        sums[s] += p[s][i] + p[s][i + 4];
    for (std::int64_t i = 8 * (begin + 4 * stream); i < 8 * end; i += 8) sums[0] += words[i];
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return total;
}

}  // namespace taco
