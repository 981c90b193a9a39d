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

// How the rank-sized intermediate t lies in memory, chosen by the driver for both products of a call.
struct Layout {
  enum Kind {
    // rows of `stride` floats: the second product is a sweep of dot products
    kRows,
    // Batch rows in the lanes of a vector, kLanes rows to a group: place p of row r is
    // t[r / kLanes * kLanes * stride + p * kLanes + r % kLanes]. The second product multiplies such vectors by broadcast
    // weights and needs no sums across a vector, which cost more than the products themselves when the rank is small.
    kGroups,
    // The same for one group of rows, elements of the weights' type (bf16 is rounded), columns in their order: a vector
    // holds a few neighbours of each of `lanes` rows.
    kPlaces,
    // rows of `stride` floats, columns in their order: not for a second product
    kInOrder,
  };
  static constexpr std::int64_t kLanes = 16, kHalfLanes = 8;

  // Places per row: the rank, rounded up to whole steps. The filling is zeros. In kRows and kGroups column j sits at place
  // position(j), an order within each step that suits the unpacking of 16-bit weights.
  std::int64_t stride;
  Kind kind;
  std::int64_t lanes = 0;  // of kPlaces: kLanes or kHalfLanes

  std::int64_t rows_per_group() const { return kind == kPlaces ? lanes : kind == kGroups ? kLanes : 1; }
  std::int64_t floats(std::int64_t rows) const {  // bf16 needs half of that
    const std::int64_t group = rows_per_group();
    return (rows + group - 1) / group * group * stride;
  }
  // Place p of a row is at start(row) + p * step(), but in kPlaces.
  std::int64_t start(std::int64_t row) const {
    return kind == kGroups ? row / kLanes * kLanes * stride + row % kLanes : row * stride;
  }
  std::int64_t step() const { return kind == kGroups ? kLanes : 1; }
  // Of kPlaces: where column j of a row is, with a vector's kAcross neighbours of each row
  template <int kAcross>
  std::int64_t place(std::int64_t row, std::int64_t j) const {
    return j / kAcross * kAcross * lanes + row * kAcross + j % kAcross;
  }
};

// t = x v^T + direct for rows [begin, end) of v
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
  std::int64_t x_lanes = 0;  // where x lies in places, as t does in Layout::kPlaces: its lanes
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

// Factors [rows, columns] of 8-bit integers as numbers of a dtype, each the integer times its scale, rounded. `scale` is one
// of rows or of columns.
struct Int8Rows {
  const std::int8_t* integers;
  std::int64_t stride, rows, columns;
  const float* scale;
  bool scale_of_rows;
  void* out;
  std::int64_t out_stride;
};

// t = (x v^T * v_scale + direct) * u_scale for rows [begin, end) of v, which holds 8-bit integers
struct FirstInt8 {
  const float* x;  // [rows, in], zeros behind the last column up to a multiple of kStepMultiple
  std::int64_t x_stride;
  const std::int8_t* v;
  std::int64_t v_stride;
  const float* v_scale;
  const float* u_scale;
  const void* direct;  // [rows, rank] of the call's dtype, or null
  std::int64_t direct_stride;
  float* t;
  std::int64_t t_stride;
  std::int64_t rows, in;
};

// Columns of rows of x, those that a mask names to `first`, the others to `rest`, both in their order.
struct Split {
  const void* x;
  std::int64_t x_stride;
  const std::uint16_t* masks;  // bit i of masks[j]: whether column 16 j + i goes to first
  void* first;
  std::int64_t first_stride;
  void* rest;
  std::int64_t rest_stride;
  std::int64_t width, rank;  // columns of x and of first
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

  // `totals`: [5, directions], the sums in their order above
  void add_to(double* totals, std::int64_t directions) {
    signed_sum = totals, absolute = totals + directions, squares = totals + 2 * directions;
    token_squares = totals + 3 * directions, open = totals + 4 * directions;
  }
};

// For many rows: vectors side by side, packed into places of 32 bits, `lanes` rows of them: the number of rows rounded up
// to whole groups of kGroup. Rows that are not there are zero. ManyRows::width says how many columns share a place:
//   2: two neighbouring 16-bit columns (the lower half comes first); place j of all rows lies together,
//      places[j * lanes + row]. The second half of an odd last pair is zero.
//   1: one column, widened to fp32, in an order of the instruction set's own, up to whole vectors of kGroup (filled with zeros).
//      A group's rows lie together, places[group * (columns, rounded up) * kGroup + j * kGroup + row]; or, where lanes are no
//      groups of kGroup (ManyRows::group), each row is by itself.
// Or for a few rows (Layout::kPlaces): `lanes` may be kHalfGroup then, and places 2 j and 2 j + 1 of a row are neighbours.
constexpr int kGroup = 16, kHalfGroup = 8;
struct Packing {
  const void* x;
  std::int64_t x_stride;
  std::int64_t rows, columns;
  std::uint32_t* places;
  std::int64_t lanes;
};

// t = x v^T + t for rows [begin, end) of v, begin a multiple of width; both vectors are packed, t rounded where two columns
// share a place. At most ManyRows::columns at a time: of more, sums wait in `partial` between calls.
struct ManyFirst {
  const std::uint32_t* x;
  std::int64_t lanes, in, rank;
  const void* v;
  std::int64_t v_stride;
  std::uint32_t* t;
  bool onto;      // whether t holds something to be added to
  float* partial;  // [rows of v, lanes], read and written where these are not the first columns, or not the last
  bool resumes, waits;
};

// What a SecondProduct does, from a packed t.
struct ManySecond {
  const std::uint32_t* t;
  std::int64_t lanes;
  SecondProduct product;  // its t and layout are not used
  float* partial;         // [rows of u, lanes], where the rank is larger than ManyRows::columns
};

// Kernels for many rows, and what they are good for.
struct ManyRows {
  int width;             // columns of a packed vector that share 32 bits
  std::int64_t columns;  // of packed vectors, that go through all weight rows together: the second cache holds them
  std::int64_t few;      // calls of more rows than this are for these kernels
  void (*pack)(const Packing&, std::int64_t begin, std::int64_t end);  // places [begin, end)
  void (*first)(const ManyFirst&, std::int64_t begin, std::int64_t end);
  void (*second)(const ManySecond&, std::int64_t begin, std::int64_t end);
  // How many columns go through together in a call of one group of rows, all in one order whatever their number; 0: `columns`
  std::int64_t group_columns = 0;
  std::int64_t group = kGroup;  // lanes are a multiple of it
  // Where packed columns come in whole vectors of kGroup: places beside those of each lane; else -1
  std::int64_t beside = -1;
  const ManyRows* fewer = nullptr;  // for the next fewer rows
  std::int64_t least_rank = 0;  // of the largest map of a call. With less, DtypeKernels' own, whose sums must be the same.

  // Places of each lane for so many columns
  std::int64_t places_of(std::int64_t columns) const {
    if (beside >= 0) return (columns + kGroup - 1) / kGroup * kGroup + beside;
    return (columns + width - 1) / width;
  }
};

// Those for a call of so many rows, whose largest map has such a rank; or null
inline const ManyRows* many_rows(const ManyRows* many, std::int64_t rows, std::int64_t rank) {
  while (many && (rows <= many->few || rank < many->least_rank)) many = many->fewer;
  return many;
}

// For factors of 8-bit integers and vectors of a dtype; see int8.inl.
struct Int8Kernels {
  void (*unpack)(const Int8Rows&, std::int64_t begin, std::int64_t end);  // rows [begin, end)
  void (*widen)(const void* row, float* out, std::int64_t n);  // to fp32, zeros behind up to a multiple of kStepMultiple
  void (*first)(const FirstInt8&, std::int64_t begin, std::int64_t end);
  void (*second)(const SecondProduct&, std::int64_t begin, std::int64_t end);  // its t lies in kRows
};

struct DtypeKernels {
  void (*first)(const FirstProduct&, std::int64_t begin, std::int64_t end);
  void (*second)(const SecondProduct&, std::int64_t begin, std::int64_t end);
  float (*sum_of_squares)(const void* x, std::int64_t n);
  void (*gating)(const Gating&, std::int64_t begin, std::int64_t end);
  void (*attribution)(const AttributionBlock&, std::int64_t begin, std::int64_t end);
  Int8Kernels int8;
  // Kinds of Layout beside kRows and kInOrder that `first` and `second` know: kGroups; kPlaces, and from how many rows on it is faster
  // (0: never; on two Zen 4 cores both fp32 and bf16, whose vector is rounded for it, break even at 5 or below).
  bool groups = false;
  std::int64_t places = 0;
  const ManyRows* many = nullptr;  // where the instruction set has something better for many rows than the others above
  // x into kPlaces, for `first`: places [begin, end). There where `places` is not 0.
  void (*pack)(const Packing&, std::int64_t begin, std::int64_t end) = nullptr;
};

// Layout::stride must be a multiple of this on every instruction set: two of the widest vectors.
constexpr std::int64_t kStepMultiple = 32;
// Results leave a sweep in runs of so many neighbours; ranges given to threads are multiples of it.
constexpr std::int64_t kTile = 16;
// Batch rows that go through a sweep together at most.
constexpr std::int64_t kRowBlock = 64;

struct CpuKernels {
  const char* name;
  DtypeKernels by_dtype[3];  // indexed by Dtype
  // Rows [begin, end), of elements of 2 and of 4 bytes; null where an instruction set has nothing better than a loop.
  void (*split_2)(const Split&, std::int64_t begin, std::int64_t end) = nullptr;
  void (*split_4)(const Split&, std::int64_t begin, std::int64_t end) = nullptr;
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
