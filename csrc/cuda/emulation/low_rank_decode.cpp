// The decode kernels on the CPU, as a program: reads calls from a file, writes their results to another. A program, so
// that the sanitizers need not be preloaded into Python. Built and fed by tests/kernels/test_cuda_emulated.py.
#define TACO_EMULATE 1
#include "cuda/low_rank_decode.cuh"

namespace taco::cuda {

template <class T>
bool launch(const DecodeArgs& args) {
  const DecodePlan& p = args.plan;
  const auto go = [&](auto body) { return run(p.blocks, kThreads, p.shared_bytes, body); };
  if constexpr (sizeof(T) == 2) {
    if (p.matrix_unit && p.rows_padded == 8) return go([&] { decode_mma<T, 1>(args); });
    if (p.matrix_unit) return go([&] { decode_mma<T, 2>(args); });
  } else {
    if (p.vector == 4 && p.rows_padded == 1) return go([&] { decode_plain<T, 4, 1>(args); });
    if (p.vector == 4 && p.rows_padded == 4) return go([&] { decode_plain<T, 4, 4>(args); });
    if (p.vector == 4) return go([&] { decode_plain<T, 4, 16>(args); });
  }
  if (p.rows_padded == 1) return go([&] { decode_plain<T, 1, 1>(args); });
  if (p.rows_padded == 4) return go([&] { decode_plain<T, 1, 4>(args); });
  return go([&] { decode_plain<T, 1, 16>(args); });
}

}  // namespace taco::cuda

namespace {

struct Header {  // as the test writes it; 64-bit each
  int64_t rows, in, rank, out, dtype, norm, aligned, has_bias, has_residual, processors, shared_limit;
  int64_t x_stride, v_stride, u_stride, residual_stride;
  double eps;
};

// A tensor's bytes in memory of exactly that size, so that the sanitizer sees one byte too many.
struct Bytes {
  char* data = nullptr;
  ~Bytes() { free(data); }
};

bool read(FILE* file, Bytes& to, int64_t rows, int64_t stride, int64_t columns, int64_t element) {
  const size_t bytes = size_t(((rows - 1) * stride + columns) * element);
  if (posix_memalign(reinterpret_cast<void**>(&to.data), 16, bytes) != 0) return false;
  return fread(to.data, 1, bytes, file) == bytes;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace taco::cuda;
  if (argc != 3) return fprintf(stderr, "usage: %s CALLS RESULTS\n", argv[0]), 2;
  FILE* in = fopen(argv[1], "rb");
  FILE* out = fopen(argv[2], "wb");
  if (in == nullptr || out == nullptr) return fprintf(stderr, "cannot open the files\n"), 2;
  Header h;
  while (fread(&h, sizeof(h), 1, in) == 1) {
    const int64_t element = h.dtype == 0 ? 4 : 2;
    Bytes x, v, u, bias, residual;
    if (!read(in, x, h.rows, h.x_stride, h.in, element) || !read(in, v, h.rank, h.v_stride, h.in, element) ||
        !read(in, u, h.out, h.u_stride, h.rank, element) || (h.has_bias && !read(in, bias, 1, 0, h.out, element)) ||
        (h.has_residual && !read(in, residual, h.rows, h.residual_stride, h.out, element))) {
      return fprintf(stderr, "the file ends in the middle of a call\n"), 2;
    }
    const size_t y_bytes = size_t(h.rows * h.out * element);
    std::unique_ptr<char[]> y(new char[y_bytes]);
    memset(y.get(), 0xff, y_bytes);  // NaN
    const LowRankCall call = {x.data, h.x_stride, v.data,  h.v_stride, u.data, h.u_stride,   bias.data, residual.data,
                              h.residual_stride, y.get(), h.rows,     h.in,   h.rank,       h.out,     int(h.dtype),
                              h.norm != 0,       float(h.eps)};
    DecodeArgs args{call,
                    plan_decode(h.rows, h.in, h.rank, h.out, int(h.dtype), h.aligned != 0, int(h.processors),
                                h.shared_limit),
                    nullptr, nullptr};
    if (args.plan.shared_bytes > h.shared_limit) {
      return fprintf(stderr, "the plan wants %lld bytes of shared memory\n", (long long)args.plan.shared_bytes), 1;
    }
    Bytes work;
    if (posix_memalign(reinterpret_cast<void**>(&work.data), 16, size_t(args.plan.workspace_bytes)) != 0) return 2;
    memset(work.data, 0xff, size_t(args.plan.workspace_bytes));  // NaN
    args.partial = reinterpret_cast<float*>(work.data);
    args.squares = args.partial + int64_t(args.plan.splits) * h.rows * args.plan.rank_padded;
    const bool done = h.dtype == 0   ? launch<float>(args)
                      : h.dtype == 1 ? launch<Half>(args)
                                     : launch<Bfloat>(args);
    if (!done) return fprintf(stderr, "the launch hangs: a barrier that not every thread reaches\n"), 1;
    const int64_t facts[5] = {args.plan.matrix_unit, args.plan.splits, args.plan.prefetched_tiles,
                              args.plan.t_capacity, args.plan.tile_warps};
    fwrite(facts, sizeof(facts), 1, out);
    fwrite(y.get(), 1, y_bytes, out);
  }
  fclose(in);
  return fclose(out) == 0 ? 0 : 2;
}
