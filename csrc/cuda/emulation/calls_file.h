// How the emulation's programs read the calls that a test has written. After the kernels' header, with the same names.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// A tensor's bytes in memory of exactly that size, so that the sanitizer sees one byte too many.
struct Bytes {
  char* data = nullptr;
  ~Bytes() { free(data); }
};

inline bool read(FILE* file, Bytes& to, std::int64_t rows, std::int64_t stride, std::int64_t columns,
                 std::int64_t element) {
  const std::size_t bytes = std::size_t(((rows - 1) * stride + columns) * element);
  if (posix_memalign(reinterpret_cast<void**>(&to.data), 16, bytes) != 0) return false;
  return fread(to.data, 1, bytes, file) == bytes;
}

// CALLS and RESULTS of a program's command line; says what is wrong where they cannot be opened.
struct Files {
  FILE* in = nullptr;
  FILE* out = nullptr;
  bool open(int argc, char** argv) {
    if (argc != 3) return fprintf(stderr, "usage: %s CALLS RESULTS\n", argv[0]), false;
    in = fopen(argv[1], "rb"), out = fopen(argv[2], "wb");
    if (in == nullptr || out == nullptr) return fprintf(stderr, "cannot open the files\n"), false;
    return true;
  }
  int close() {
    fclose(in);
    return fclose(out) == 0 ? 0 : 2;
  }
};
