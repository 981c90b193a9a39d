// What one instruction set offers to the driver: plain function pointers, so that nothing compiled with wider
// instructions can be inlined or merged (one definition rule) into code that every CPU runs.
#pragma once

#include <cstdint>

namespace taco {

struct BF16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

// How the rank-sized intermediate t lies in memory, chosen by the driver for both products of a call. Column j of t
// sits at place p = position(j), an order within each step that suits the unpacking of 16-bit weights.
//   lanes == 0: rows of `stride` floats, t[r * stride + p]; the second product is a sweep of dot products.
//   lanes > 0:  batch rows are the lanes of a vector. Groups of lanes / fold rows; in a group each vector holds `fold`
//               consecutive places of every row: t[group * stride * (lanes / fold) + p / fold * lanes + row * fold
//               + p % fold]. The second product multiplies such vectors by broadcast weights and needs no sums across
//               a vector, which cost more than the products themselves when the rank is small.
struct Layout {
  std::int64_t stride;  // places per row: the rank, rounded up to whole steps, filled up with zeros
  int lanes, fold;

  std::int64_t rows_per_group() const { return lanes ? lanes / fold : 1; }
  std::int64_t floats(std::int64_t rows) const {
    const std::int64_t group = rows_per_group();
    return (rows + group - 1) / group * group * stride;
  }
  std::int64_t index(std::int64_t row, std::int64_t place) const {
    if (lanes == 0) return row * stride + place;
    const std::int64_t group = rows_per_group();
    return row / group * group * stride + place / fold * lanes + row % group * fold + place % fold;
  }
};

// t = x v^T + direct for rows [begin, end) of v; t is fp32.
struct FirstProduct {
  const void* x;
  std::int64_t x_stride;
  const void* v;
  std::int64_t v_stride;
  float* t;
  Layout layout;
  std::int64_t rows, in;
  const void* direct = nullptr;  // [rows, rank] or null: inputs on which v is the identity
  std::int64_t direct_stride = 0;
};

// y = t u^T * scale + bias + residual for rows [begin, end) of u.
struct SecondProduct {
  const float* t;
  Layout layout;
  const void* u;
  std::int64_t u_stride;
  const float* scale;  // [rows] or null
  const void* bias;
  const void* residual;
  std::int64_t residual_stride;
  void* y;      // of the weights' dtype, or null:
  float* wide;  // then the result goes here in fp32, without scale and residual
  std::int64_t y_stride;  // of y or wide
  std::int64_t rows, rank;
};

// hidden = act(gate) * up, columns [begin, end), rounded to the dtype
struct Gating {
  const float* gate;
  const float* up;
  std::int64_t stride;  // of gate and up
  void* hidden;
  std::int64_t hidden_stride;
  std::int64_t rows;
  int activation;
};

// Two products [rows, directions] and what is kept of them per direction; see attribution.inl.
struct AttributionBlock {
  const void* a;
  std::int64_t a_stride;
  const void* b;
  std::int64_t b_stride;
  std::int64_t rows;
  std::int64_t tokens;    // rows of one sequence
  std::int64_t position;  // rows of the first sequence that came in earlier calls
  double* signed_sum;     // every sum below is added to
  double* absolute;
  double* squares;
  double* token_squares;
  double* open;           // the sum over the sequence that has not ended yet; not part of signed_sum
};

// For many rows: 16-bit vectors side by side. Two neighbouring columns of a row share 32 bits (the lower half comes first),
// and the pair j of all rows lies together: pairs[j * lanes + row]. `lanes` is the number of rows rounded up to whole
// groups of kGroup; rows that are not there, and the second half of an odd last pair, are zero.
constexpr int kGroup = 16;
struct Packing {
  const void* x;
  std::int64_t x_stride;
  std::int64_t rows, columns;
  std::uint32_t* pairs;
  std::int64_t lanes;
};

// t = x v^T + t, rounded to the dtype, for rows [begin, end) of v, begin even; both vectors are packed.
struct ManyFirst {
  const std::uint32_t* x;
  std::int64_t lanes, in;
  const void* v;
  std::int64_t v_stride;
  std::uint32_t* t;
  bool onto;  // whether t holds something to be added to
  float* partial;  // [rows of v, lanes], where there are more columns than kManyColumns
};

// What a SecondProduct does, from a packed t.
struct ManySecond {
  const std::uint32_t* t;
  std::int64_t lanes;
  SecondProduct product;  // its t and layout are not used
  float* partial;         // [rows of u, lanes], where the rank is larger than kManyColumns
};

struct DtypeKernels {
  void (*first)(const FirstProduct&, std::int64_t begin, std::int64_t end);
  void (*second)(const SecondProduct&, std::int64_t begin, std::int64_t end);
  float (*sum_of_squares)(const void* x, std::int64_t n);
  void (*gating)(const Gating&, std::int64_t begin, std::int64_t end);
  void (*attribution)(const AttributionBlock&, std::int64_t begin, std::int64_t end);
  // For many rows (kFewRows below says how many); null where the instruction set has nothing better than the others above.
  void (*pack)(const Packing&, std::int64_t begin, std::int64_t end) = nullptr;  // pairs [begin, end)
  void (*many_first)(const ManyFirst&, std::int64_t begin, std::int64_t end) = nullptr;
  void (*many_second)(const ManySecond&, std::int64_t begin, std::int64_t end) = nullptr;
};

// Layout::stride must be a multiple of this on every instruction set: two of the widest vectors.
constexpr std::int64_t kStepMultiple = 32;
// Results leave a sweep in runs of so many neighbours; ranges given to threads are multiples of it.
constexpr std::int64_t kTile = 16;
// Batch rows that go through a sweep together at most.
constexpr std::int64_t kRowBlock = 64;
// Columns of packed vectors that go through all weight rows together: of kRowBlock rows they take 3/4 of a second cache of
// 1 MiB.
constexpr std::int64_t kManyColumns = 6144;
// More rows than the first are for the kernels for many rows where the instruction set has them; where the ranks of a call
// are at least kManyRanks in all, more than the second. Other calls keep their intermediate in fp32.
constexpr std::int64_t kFewRows = 16, kLoneRows = 4, kManyRanks = 256;

struct CpuKernels {
  const char* name;
  int lanes;  // for Layout; 0 where the second product knows dot products only
  DtypeKernels by_dtype[3];  // indexed by Dtype
};

// The instruction set in use.
const CpuKernels& active_kernels();

extern const CpuKernels kBaselineKernels;
#ifdef TACO_HAVE_AVX2
extern const CpuKernels kAvx2Kernels;
#endif
#ifdef TACO_HAVE_AVX512
extern const CpuKernels kAvx512Kernels;
#endif
#ifdef TACO_HAVE_AVX512BF16
extern const CpuKernels kAvx512Bf16Kernels;
#endif

}  // namespace taco
