// The decode kernels on the CPU, as a program: reads calls from a file, writes their results to another. A program, so
// that the sanitizers need not be preloaded into Python. Built and fed by tests/kernels/test_cuda_emulated.py.
#define TACO_EMULATE 1
#include "cuda/decode_mma.cuh"
#include "cuda/decode_plain.cuh"
#include "cuda/emulation/calls_file.h"

namespace taco::cuda {

template <class T, Part part>
bool launch_part(const DecodeArgs& args, std::function<bool()> previous = nullptr) {
  const DecodePlan& p = args.plan;
  const int64_t shared = part == Part::kFirst ? p.first_shared_bytes : p.shared_bytes;
  const auto go = [&](auto body) { return run(p.blocks, kThreads, shared, body, previous); };
  if constexpr (sizeof(T) == 2) {
    if (p.matrix_unit && p.rows_padded == 8) return go([&] { decode_mma<T, 1, part>(args); });
    if (p.matrix_unit) return go([&] { decode_mma<T, 2, part>(args); });
  } else {
    if (p.vector == 4 && p.rows_padded == 1) return go([&] { decode_plain<T, 4, 1, part>(args); });
    if (p.vector == 4 && p.rows_padded == 4) return go([&] { decode_plain<T, 4, 4, part>(args); });
    if (p.vector == 4) return go([&] { decode_plain<T, 4, 16, part>(args); });
  }
  if (p.rows_padded == 1) return go([&] { decode_plain<T, 1, 1, part>(args); });
  if (p.rows_padded == 4) return go([&] { decode_plain<T, 1, 4, part>(args); });
  return go([&] { decode_plain<T, 1, 16, part>(args); });
}

template <class T>
bool launch(const DecodeArgs& args, Launch how) {
  if (how == kCooperative) return launch_part<T, Part::kBoth>(args);
  return launch_part<T, Part::kSecond>(args, [&] { return launch_part<T, Part::kFirst>(args); });
}

}  // namespace taco::cuda

namespace {

struct Header {  // as the test writes it; 64-bit each
  int64_t rows, in, dtype, norm, gate, launch, aligned, has_residual, processors, shared_limit, count;
  int64_t x_stride, residual_stride;
  double eps;
};
struct MemberHeader {
  int64_t rank, out, has_bias, v_stride, u_stride, y_stride;
  int64_t pivot;  // bytes of an index, 0 without one
};

}  // namespace

int main(int argc, char** argv) {
  using namespace taco::cuda;
  Files files;
  if (!files.open(argc, argv)) return 2;
  FILE *const in = files.in, *const out = files.out;
  Header h;
  while (fread(&h, sizeof(h), 1, in) == 1) {
    const int64_t element = h.dtype == 0 ? 4 : 2;
    LowRankCall call = {};
    Bytes x, residual, v[kMaxMembers], u[kMaxMembers], bias[kMaxMembers], y[kMaxMembers], pivot[kMaxMembers];
    bool whole = h.count >= 1 && h.count <= kMaxMembers && read(in, x, h.rows, h.x_stride, h.in, element);
    for (int i = 0; whole && i < h.count; ++i) {
      MemberHeader m;
      whole = fread(&m, sizeof(m), 1, in) == 1 &&
              read(in, v[i], m.rank, m.v_stride, h.in - (m.pivot != 0 ? m.rank : 0), element) &&
              read(in, u[i], m.out, m.u_stride, m.rank, element) &&
              (!m.has_bias || read(in, bias[i], 1, 0, m.out, element)) &&
              (m.pivot == 0 || read(in, pivot[i], 1, 0, h.in, m.pivot));
      const size_t bytes = size_t(((h.rows - 1) * m.y_stride + m.out) * element);
      y[i].data = static_cast<char*>(malloc(bytes));
      memset(y[i].data, 0xff, bytes);  // NaN
      call.members[i] = {v[i].data,  m.v_stride, u[i].data, m.u_stride,    bias[i].data, y[i].data,
                         m.y_stride, m.rank,     m.out,     pivot[i].data, m.pivot == 8};
    }
    if (!whole ||
        (h.has_residual && !read(in, residual, h.rows, h.residual_stride, call.members[0].out, element))) {
      return fprintf(stderr, "the file ends in the middle of a call\n"), 2;
    }
    call.x = x.data, call.x_stride = h.x_stride, call.residual = residual.data;
    call.residual_stride = h.residual_stride, call.rows = h.rows, call.in = h.in, call.count = int(h.count);
    call.gate = int(h.gate), call.dtype = int(h.dtype), call.norm = h.norm != 0, call.eps = float(h.eps);
    DecodeArgs args{call, plan_decode(call, h.aligned != 0, int(h.processors), h.shared_limit), nullptr, nullptr};
    if (args.plan.shared_bytes > h.shared_limit) {
      return fprintf(stderr, "the plan wants %lld bytes of shared memory\n", (long long)args.plan.shared_bytes), 1;
    }
    Bytes work;
    if (posix_memalign(reinterpret_cast<void**>(&work.data), 16, size_t(args.plan.workspace_bytes)) != 0) return 2;
    memset(work.data, 0xff, size_t(args.plan.workspace_bytes));  // NaN
    arrange(args, work.data);
    const Launch how = Launch(h.launch);
    const bool done = h.dtype == 0   ? launch<float>(args, how)
                      : h.dtype == 1 ? launch<Half>(args, how)
                                     : launch<Bfloat>(args, how);
    if (!done) return fprintf(stderr, "the launch hangs: a barrier that not every thread reaches\n"), 1;
    const DecodePlan& plan = args.plan;
    const bool uneven = plan.matrix_unit && plan.share % plan.tile_chunks[0] != 0 && plan.tile_chunks[0] % plan.share != 0;
    const int64_t facts[6] = {plan.matrix_unit, plan.splits, plan.prefetched_tiles, plan.t_capacity, plan.tile_warps, uneven};
    fwrite(facts, sizeof(facts), 1, out);
    for (int i = 0; i < (h.gate ? 1 : h.count); ++i) {
      const Factors& f = call.members[i];
      fwrite(y[i].data, 1, size_t(((h.rows - 1) * f.y_stride + f.out) * element), out);
    }
  }
  return files.close();
}
