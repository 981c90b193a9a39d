// The launcher, low_rank_decode.cu itself, on a device that the arguments describe: tells what it launches, and fails
// where the result is wrong or an error is left behind. Built and run by tests/kernels/test_cuda_launcher.py.
#define TACO_EMULATE 1
#include "cuda/low_rank_decode.cu"

#include <cstring>

int main(int argc, char** argv) {
  using namespace taco::cuda;
  Launch how = kCooperative;
  bool ask = false;
  for (int i = 1; i < argc; ++i) {
    const auto number = [&](const char* name, int& to) {
      const std::size_t length = std::strlen(name);
      if (std::strncmp(argv[i], name, length) != 0) return false;
      to = std::atoi(argv[i] + length);
      return true;
    };
    const bool known = number("code=", g_fake.code) || number("cooperative=", g_fake.cooperative) ||
                       number("most_blocks=", g_fake.most_blocks) || number("driver=", g_fake.driver) ||
                       number("driver_error=", g_fake.driver_error) || number("code_error=", g_fake.code_error);
    if (std::strcmp(argv[i], "dependent") == 0) how = kDependent;
    else if (std::strcmp(argv[i], "unusable") == 0) ask = true;
    else if (!known) return std::fprintf(stderr, "what is %s?\n", argv[i]), 2;
  }

  if (ask) return std::printf("unusable: %s\n", why_unusable()), g_fake.last_error != 0;

  // A call behind a pivot. Twice: what is asked once per device must last.
  constexpr int kRows = 3, kIn = 40, kRank = 20, kOut = 24, kWidth = kIn + kRank;
  std::vector<float> x(kRows * kWidth), v(kRank * kIn), u(kOut * kRank), y(kRows * kOut);
  std::vector<std::int32_t> pivot(kWidth);
  for (int i = 0; i < kWidth; ++i) pivot[size_t(i)] = kWidth - 1 - i;
  unsigned state = 1;
  for (std::vector<float>* numbers : {&x, &v, &u}) {
    for (float& number : *numbers) {
      state = state * 1664525u + 1013904223u;
      number = float(state >> 8) / 8388608.0f - 1.0f;
    }
  }
  LowRankCall call = {};
  call.x = x.data(), call.x_stride = kWidth, call.rows = kRows, call.in = kWidth, call.count = 1;
  call.members[0] = {v.data(), kIn, u.data(), kRank, nullptr, y.data(), kOut, kRank, kOut, pivot.data(), false};
  const std::int64_t bytes = low_rank_decode_workspace_bytes(call);
  if (bytes < 0) return std::printf("error: %s\n", error_string(int(-bytes))), 0;
  std::unique_ptr<float[]> work(new float[std::size_t(bytes) / 4 + 4]);
  for (int time = 0; time < 2; ++time) {
    std::fill(y.begin(), y.end(), NAN);
    std::memset(work.get(), 0xff, std::size_t(bytes));
    const int error = low_rank_decode(call, how, work.get(), std::size_t(bytes), nullptr);
    if (error != 0) return std::printf("error: %s\n", error_string(error)), 0;
    for (int m = 0; m < kRows; ++m) {
      const auto input = [&](int i) { return double(x[size_t(m * kWidth + kWidth - 1 - i)]); };
      for (int n = 0; n < kOut; ++n) {
        double exact = 0;
        for (int r = 0; r < kRank; ++r) {
          double t = input(r);
          for (int i = 0; i < kIn; ++i) t += input(kRank + i) * double(v[size_t(r * kIn + i)]);
          exact += t * double(u[size_t(n * kRank + r)]);
        }
        // 80 roundings of terms that add up to 1000 at most
        if (!(std::fabs(double(y[size_t(m * kOut + n)]) - exact) < 80 * 6e-8 * 1000)) return 1;
      }
    }
  }
  return g_fake.last_error == 0 ? 0 : 1;
}
