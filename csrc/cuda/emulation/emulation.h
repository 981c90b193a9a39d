// The names of device.cuh for a CPU: every CUDA thread of a launch is a fiber, switched at barriers and warp exchanges.
// Slow, exact in its indexing, and run under the address sanitizer: for tests on machines without a GPU. Included by
// device.cuh only.
//
// What it shows: wrong indices, reads or writes out of bounds, missing barriers that matter under round-robin order,
// barriers not reached by every thread, reads of copies not waited for, or of what the kernel before has yet to write.
// What it cannot: timing, memory ordering.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define TACO_DEVICE inline

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace taco::cuda {

// --- fibers ----------------------------------------------------------------------------------------------------------

struct Barrier {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  float floats[32];
  uint32_t words[32][6];
};

struct Block {
  Barrier barrier;
  std::unique_ptr<char[]> memory;
  std::vector<Warp> warps;
  std::vector<std::function<void()>> copies;  // on their way: done when somebody waits, not before
  bool copying = false;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int thread, block;
  bool finished = false;
};

struct Machine {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier grid;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  std::function<void()> body;
  std::function<bool()> previous;  // the kernel before, while this one runs ahead of it
  uint64_t progress = 0;
#if defined(__SANITIZE_ADDRESS__)
  const void* main_stack = nullptr;
  size_t main_size = 0;
#endif
};

inline Machine* g_machine = nullptr;
constexpr size_t kStackBytes = 64 * 1024;

inline void enter_fiber(Fiber& f) {
  Machine& m = *g_machine;
  m.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack.get(), kStackBytes);
  swapcontext(&m.scheduler, &f.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  swapcontext(&m.scheduler, &f.context);
#endif
}

inline void leave_fiber() {
  Machine& m = *g_machine;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(m.current->finished ? nullptr : &fake, m.main_stack, m.main_size);
  swapcontext(&m.current->context, &m.scheduler);
  __sanitizer_finish_switch_fiber(fake, &m.main_stack, &m.main_size);
#else
  swapcontext(&m.current->context, &m.scheduler);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &g_machine->main_stack, &g_machine->main_size);
#endif
  g_machine->body();
  g_machine->current->finished = true;
  ++g_machine->progress;
  leave_fiber();
}

inline void wait(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++g_machine->progress;
  }
  while (barrier.generation == generation) leave_fiber();
}

// Runs `body` in blocks x threads fibers with `shared_bytes` of shared memory each. Returns false where the launch
// hangs: some threads wait at a barrier that the others never reach. `previous` runs the kernel that a dependent launch
// depends on: as late as can be, when every thread here has ended or waits for it.
inline bool run(int blocks, int threads, int64_t shared_bytes, std::function<void()> body,
                std::function<bool()> previous = nullptr) {
  Machine machine;
  g_machine = &machine;
  machine.body = std::move(body);
  machine.previous = std::move(previous);
  machine.grid.size = blocks * threads;
  machine.blocks.resize(size_t(blocks));
  machine.fibers = std::vector<Fiber>(size_t(blocks) * size_t(threads));
  for (int b = 0; b < blocks; ++b) {
    Block& block = machine.blocks[size_t(b)];
    block.barrier.size = threads;
    block.memory.reset(new char[size_t(shared_bytes)]);
    memset(block.memory.get(), 0xff, size_t(shared_bytes));  // NaN in every dtype
    block.warps.resize(size_t(threads / 32));
    for (Warp& warp : block.warps) warp.barrier.size = 32;
    for (int t = 0; t < threads; ++t) {
      Fiber& f = machine.fibers[size_t(b) * size_t(threads) + size_t(t)];
      f.thread = t;
      f.block = b;
      f.stack.reset(new char[kStackBytes]);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStackBytes;
      f.context.uc_link = nullptr;
      makecontext(&f.context, fiber_main, 0);
    }
  }
  bool alive = true;
  while (alive || machine.previous != nullptr) {
    const uint64_t before = machine.progress;
    alive = false;
    for (Fiber& f : machine.fibers) {
      if (f.finished) continue;
      alive = true;
      enter_fiber(f);
    }
    if (machine.progress != before) continue;
    if (machine.previous == nullptr) return !alive;
    const std::function<bool()> now = std::move(machine.previous);
    machine.previous = nullptr;
    const bool done = now();
    g_machine = &machine;
    if (!done) return false;
    alive = true;
  }
  return true;
}

// --- what device.cuh offers ------------------------------------------------------------------------------------------

inline Block& this_block() { return g_machine->blocks[size_t(g_machine->current->block)]; }
inline int thread_index() { return g_machine->current->thread; }
inline int block_index() { return g_machine->current->block; }
inline Warp& this_warp() { return this_block().warps[size_t(thread_index() / 32)]; }
inline char* shared_memory() { return this_block().memory.get(); }

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
inline float to_float(float x) { return x; }
inline float to_float(Half x) { return float(reinterpret_cast<const _Float16&>(x)); }
inline float to_float(Bfloat x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Half from_float<Half>(float x) {
  const _Float16 value = _Float16(x);
  Half half;
  memcpy(&half, &value, 2);
  return half;
}
template <>
inline Bfloat from_float<Bfloat>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}

inline float inverse_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline void prefetch_to_cache(const void* address) {  // what is not there must not be asked for
  volatile char read = *static_cast<const char*>(address);
  (void)read;
}

// A misaligned vector access is an error on the GPU; here it must be one as well.
inline void need_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  fprintf(stderr, "emulation: misaligned access of %zu bytes at %p\n", bytes, address);
  abort();
}
template <class V>
V load_as(const void* address) {
  need_alignment(address, sizeof(V));
  V value;
  memcpy(&value, address, sizeof(V));
  return value;
}
inline uint4 load_weights(const void* address) { return load_as<uint4>(address); }
inline uint4 load_activations(const void* address) { return load_as<uint4>(address); }
template <class T>
T load_input(const T* address) {
  return *address;
}
inline float4 load_written4(const float* address) { return load_as<float4>(address); }
inline float load_written(const float* address) { return *address; }

template <int Width>
float lane_sum(float x) {
  Warp& warp = this_warp();
  const int lane = thread_index() % 32;
  for (int bit = Width / 2; bit > 0; bit /= 2) {
    warp.floats[lane] = x;
    wait(warp.barrier);
    x += warp.floats[lane ^ bit];
    wait(warp.barrier);
  }
  return x;
}

template <class T>
float word_element(uint32_t word, int which) {
  const uint16_t bits = uint16_t(which ? word >> 16 : word);
  T value;
  memcpy(&value, &bits, 2);
  return to_float(value);
}

// mma.m16n8k16 from the fragment layout of the PTX ISA, element by element.
template <class T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Warp& warp = this_warp();
  const int lane = thread_index() % 32;
  const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(warp.words[lane], words, sizeof(words));
  wait(warp.barrier);
  const auto a = [&](int row, int k) {  // a0: k < 8, row < 8; a1: row >= 8; a2: k >= 8; a3: both
    const int from = row % 8 * 4 + k % 8 / 2;
    return word_element<T>(warp.words[from][(row >= 8) + 2 * (k >= 8)], k % 2);
  };
  const auto b = [&](int k, int column) {
    const int from = column * 4 + k % 8 / 2;
    return word_element<T>(warp.words[from][4 + (k >= 8)], k % 2);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) c[i] += a(row, k) * b(k, column);
  }
  wait(warp.barrier);
}

inline void block_barrier() { wait(this_block().barrier); }
inline void grid_barrier() { wait(g_machine->grid); }
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {
  while (g_machine->previous != nullptr) leave_fiber();
}

inline void copy_begin(void*) {
  block_barrier();
  this_block().copying = true;
}
struct Row {
  const void* from;
  int bytes;
};
template <class Source>
void copy_rows(void*, char* target, int pitch, int count, Source source) {
  if (thread_index() != 0) return;
  for (int i = 0; i < count; ++i) {
    const Row row = source(i);
    const void* from = row.from;
    const int bytes = row.bytes;
    if (from == nullptr) continue;
    if (bytes > pitch) abort();
    char* to = target + int64_t(i) * pitch;
    need_alignment(from, 16), need_alignment(to, 16);
    if (bytes % 16 != 0) abort();
    this_block().copies.push_back([=] { memcpy(to, from, size_t(bytes)); });
  }
}
inline void copy_wait(void*) {
  block_barrier();
  if (thread_index() == 0) {
    for (const auto& copy : this_block().copies) copy();
    this_block().copies.clear();
  }
  block_barrier();
}

}  // namespace taco::cuda
