// The gather of many rows on the CPU, as a program: reads calls from a file, writes their results to another. Built and
// fed by tests/kernels/test_cuda_gather.py.
#define TACO_EMULATE 1
#include "cuda/gather_rows.cuh"
#include "cuda/emulation/calls_file.h"

int main(int argc, char** argv) {
  using namespace taco::cuda;
  Files files;
  if (!files.open(argc, argv)) return 2;
  std::int64_t h[6];  // rows, width, x_stride, y_stride, bytes of an element, bytes of an index
  while (fread(h, sizeof(h), 1, files.in) == 1) {
    Bytes x, pivot;
    if (!read(files.in, x, h[0], h[2], h[1], h[4]) || !read(files.in, pivot, 1, 0, h[1], h[5])) return 2;
    const std::size_t bytes = std::size_t(((h[0] - 1) * h[3] + h[1]) * h[4]);
    std::unique_ptr<char[]> y(new char[bytes]);
    memset(y.get(), 0xff, bytes);
    const GatherCall call = {x.data, h[2], pivot.data, h[5] == 8, y.get(), h[3], h[0], h[1], int(h[4])};
    const auto body = [&] {
      if (h[4] == 2) h[5] == 8 ? gather_rows<std::uint16_t, std::int64_t>(call) : gather_rows<std::uint16_t, std::int32_t>(call);
      else h[5] == 8 ? gather_rows<std::uint32_t, std::int64_t>(call) : gather_rows<std::uint32_t, std::int32_t>(call);
    };
    if (!run(int(gather_blocks(call)), kGatherThreads, 1, body)) return 1;
    fwrite(y.get(), 1, bytes, files.out);
  }
  return files.close();
}
