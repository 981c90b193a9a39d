// The gather of many rows on the CPU, as a program: reads calls from a file, writes their results to another. Built and
// fed by tests/kernels/test_cuda_gather.py.
#define TACO_EMULATE 1
#include "cuda/gather_rows.cuh"

namespace {

// A tensor's bytes in memory of exactly that size, so that the sanitizer sees one byte too many.
std::unique_ptr<char[]> read(FILE* file, std::int64_t bytes) {
  std::unique_ptr<char[]> made(new char[std::size_t(bytes)]);
  if (fread(made.get(), 1, std::size_t(bytes), file) != std::size_t(bytes)) exit(2);
  return made;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace taco::cuda;
  if (argc != 3) return fprintf(stderr, "usage: %s CALLS RESULTS\n", argv[0]), 2;
  FILE* in = fopen(argv[1], "rb");
  FILE* out = fopen(argv[2], "wb");
  if (in == nullptr || out == nullptr) return fprintf(stderr, "cannot open the files\n"), 2;
  std::int64_t h[6];  // rows, width, x_stride, y_stride, bytes of an element, bytes of an index
  while (fread(h, sizeof(h), 1, in) == 1) {
    const auto x = read(in, ((h[0] - 1) * h[2] + h[1]) * h[4]);
    const auto pivot = read(in, h[1] * h[5]);
    const std::size_t bytes = std::size_t(((h[0] - 1) * h[3] + h[1]) * h[4]);
    std::unique_ptr<char[]> y(new char[bytes]);
    memset(y.get(), 0xff, bytes);
    const GatherCall call = {x.get(), h[2], pivot.get(), h[5] == 8, y.get(), h[3], h[0], h[1], int(h[4])};
    const auto body = [&] {
      if (h[4] == 2) h[5] == 8 ? gather_rows<std::uint16_t, std::int64_t>(call) : gather_rows<std::uint16_t, std::int32_t>(call);
      else h[5] == 8 ? gather_rows<std::uint32_t, std::int64_t>(call) : gather_rows<std::uint32_t, std::int32_t>(call);
    };
    if (!run(int(gather_blocks(call)), kGatherThreads, 1, body)) return 1;
    fwrite(y.get(), 1, bytes, out);
  }
  fclose(in);
  return fclose(out) == 0 ? 0 : 2;
}
