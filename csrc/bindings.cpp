// The extension taco_kernels._C. The only file that includes pybind11; everything it calls takes raw pointers.
// No torch headers: the same binary works with every torch version. Pointers come as integers (Tensor.data_ptr()),
// and taco_kernels' op files, which checked shapes and dtypes, are the only callers. direct/ reads tensors itself,
// through DLPack.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/gather.h"
#include "cpu/isa.h"
#include "cpu/sketch.h"
#include "cpu/taco_cpu.h"
#include "direct/direct.h"
#ifdef TACO_WITH_CUDA
#include "cuda/taco_cuda.h"
#endif

namespace py = pybind11;

namespace {

template <class T = const void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

taco::Dtype dtype_of(int code) {
  if (code < 0 || code > 2) throw py::value_error("dtype code must be 0 (float32), 1 (float16) or 2 (bfloat16)");
  return static_cast<taco::Dtype>(code);
}

void cpu_low_rank_linear(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t v, std::int64_t v_stride,
                         std::uintptr_t u, std::int64_t u_stride, std::uintptr_t bias, std::uintptr_t residual,
                         std::int64_t residual_stride, std::uintptr_t y, std::int64_t rows, std::int64_t in,
                         std::int64_t rank, std::int64_t out, int dtype, int threads) {
  const taco::LowRankInput input = {dtype_of(dtype), pointer(x), x_stride, rows, in, false, 0.0f};
  const taco::LowRankMap map = {pointer(v), v_stride, pointer(u), u_stride, pointer(bias), pointer<void>(y), rank, out,
                                pointer(residual), residual_stride};
  py::gil_scoped_release released;
  taco::low_rank(input, &map, 1, threads);
}

void cpu_low_rank_bridge(std::uintptr_t h, std::int64_t h_stride, std::uintptr_t v, std::int64_t v_stride,
                         std::uintptr_t u, std::int64_t u_stride, std::uintptr_t bias, std::uintptr_t y,
                         std::int64_t rows, std::int64_t hidden, std::int64_t rank, float eps, int dtype,
                         int threads) {
  const taco::LowRankInput input = {dtype_of(dtype), pointer(h), h_stride, rows, hidden, true, eps};
  const taco::LowRankMap map = {pointer(v), v_stride, pointer(u), u_stride, pointer(bias), pointer<void>(y), rank,
                                hidden, pointer(h), h_stride};
  py::gil_scoped_release released;
  taco::low_rank(input, &map, 1, threads);
}

// (v, v_stride, u, u_stride, bias, y, rank, out): one map of a group
taco::LowRankMap map_of(const py::handle& numbers) {
  const py::tuple t = py::reinterpret_borrow<py::tuple>(numbers);
  if (!PyTuple_Check(numbers.ptr()) || t.size() != 8)
    throw py::value_error("a map is a tuple of 8 integers: v, v_stride, u, u_stride, bias, y, rank, out");
  const auto address = [&](int i) { return t[static_cast<py::size_t>(i)].cast<std::uintptr_t>(); };
  const auto number = [&](int i) { return t[static_cast<py::size_t>(i)].cast<std::int64_t>(); };
  return {pointer(address(0)), number(1), pointer(address(2)), number(3), pointer(address(4)),
          pointer<void>(address(5)), number(6), number(7), nullptr, 0};
}

void cpu_pivoted_low_rank_linear(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t pivot, bool long_index,
                                 std::uintptr_t v, std::int64_t v_stride, std::uintptr_t u, std::int64_t u_stride,
                                 std::uintptr_t bias, std::uintptr_t residual, std::int64_t residual_stride,
                                 std::uintptr_t y, std::int64_t rows, std::int64_t in, std::int64_t rank,
                                 std::int64_t out, int dtype, int threads) {
  const taco::LowRankInput input = {dtype_of(dtype), pointer(x), x_stride, rows, in, false, 0.0f};
  const taco::LowRankMap map = {pointer(v), v_stride, pointer(u), u_stride, pointer(bias), pointer<void>(y), rank, out,
                                pointer(residual), residual_stride};
  py::gil_scoped_release released;
  taco::pivoted_low_rank(input, pointer(pivot), long_index, map, threads);
}

void cpu_low_rank_int8(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t pivot, bool long_index, std::uintptr_t v,
                       std::int64_t v_stride, std::uintptr_t v_scale, std::uintptr_t u, std::int64_t u_stride,
                       std::uintptr_t u_scale, std::uintptr_t bias, std::uintptr_t y, std::int64_t rows, std::int64_t in,
                       std::int64_t rank, std::int64_t out, int dtype, int threads) {
  const taco::LowRankInput input = {dtype_of(dtype), pointer(x), x_stride, rows, in, false, 0.0f};
  const taco::Int8Map map = {pointer<const std::int8_t>(v), v_stride, pointer<const float>(v_scale),
                             pointer<const std::int8_t>(u), u_stride, pointer<const float>(u_scale),
                             pointer(bias), pointer<void>(y), rank, out};
  py::gil_scoped_release released;
  taco::low_rank_int8(input, pointer(pivot), long_index, map, threads);
}

void cpu_unpack_int8(std::uintptr_t integers, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                     std::uintptr_t scale, bool scale_of_rows, std::uintptr_t out, std::int64_t out_stride, int dtype,
                     int threads) {
  const taco::Dtype kind = dtype_of(dtype);
  py::gil_scoped_release released;
  taco::unpack_int8(kind, {pointer<const std::int8_t>(integers), stride, rows, columns, pointer<const float>(scale),
                           scale_of_rows, pointer<void>(out), out_stride}, threads);
}

void cpu_gather(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t pivot, std::uintptr_t first,
                std::int64_t first_stride, std::uintptr_t rest, std::int64_t rest_stride, std::int64_t rows,
                std::int64_t width, std::int64_t rank, std::int64_t element, bool long_index, int threads) {
  if (element != 2 && element != 4) throw py::value_error("elements have 2 or 4 bytes");
  py::gil_scoped_release released;
  const taco::Gatherer gatherer(pointer(pivot), long_index, width, rank, element, rows);
  gatherer.all({pointer(x), x_stride, pointer<void>(first), first_stride, pointer<void>(rest), rest_stride}, rows, threads);
}

void cpu_low_rank_linear_group(std::uintptr_t x, std::int64_t x_stride, std::int64_t rows, std::int64_t in,
                               const py::tuple& members, int dtype, int threads) {
  const taco::LowRankInput input = {dtype_of(dtype), pointer(x), x_stride, rows, in, false, 0.0f};
  std::vector<taco::LowRankMap> maps;
  maps.reserve(members.size());
  for (const py::handle& member : members) maps.push_back(map_of(member));
  py::gil_scoped_release released;
  taco::low_rank(input, maps.data(), static_cast<int>(maps.size()), threads);
}

void cpu_low_rank_mlp(std::uintptr_t x, std::int64_t x_stride, std::int64_t rows, std::int64_t in,
                      const py::tuple& gate, const py::tuple& up, const py::tuple& down, int activation, int dtype,
                      int threads) {
  if (activation < 0 || activation > 3)
    throw py::value_error("activation must be 0 (silu), 1 (gelu_tanh), 2 (gelu) or 3 (relu)");
  const taco::LowRankInput input = {dtype_of(dtype), pointer(x), x_stride, rows, in, false, 0.0f};
  const taco::LowRankMap maps[3] = {map_of(gate), map_of(up), map_of(down)};
  if (maps[0].out != maps[1].out) throw py::value_error("gate and up must have the same number of outputs");
  py::gil_scoped_release released;
  taco::low_rank_mlp(input, maps[0], maps[1], maps[2], static_cast<taco::Activation>(activation), threads);
}

void cpu_sketch(std::uintptr_t out, std::int64_t out_stride, std::int64_t first_row, std::int64_t rows,
                std::int64_t first_column, std::int64_t columns, std::uint64_t seed, int dtype, int threads) {
  const taco::Dtype kind = dtype_of(dtype);
  if (kind == taco::Dtype::kF16) throw py::value_error("the sketch is written as float32 or bfloat16");
  if (first_column % taco::kSketchBlock) throw py::value_error("first_column must be a multiple of the sketch's block");
  py::gil_scoped_release released;
  taco::sketch({pointer<void>(out), out_stride, first_row, rows, first_column, columns, seed,
                kind == taco::Dtype::kBF16}, threads);
}

// totals: five rows of `directions` doubles (signed, absolute, squares, token squares, the open sequence's sum)
void cpu_attribution(std::uintptr_t a, std::int64_t a_stride, std::uintptr_t b, std::int64_t b_stride,
                     std::uintptr_t totals, std::int64_t rows, std::int64_t directions, std::int64_t tokens,
                     std::int64_t position, int dtype, int threads) {
  if (tokens < 1 || position < 0 || position >= tokens) throw py::value_error("0 <= position < tokens must hold");
  taco::AttributionBlock block = {pointer(a), a_stride, pointer(b), b_stride, rows, tokens, position};
  block.add_to(pointer<double>(totals), directions);
  const taco::AttributionArgs args = {dtype_of(dtype), block, rows, directions};
  py::gil_scoped_release released;
  taco::attribution(args, threads);
}

// totals as for cpu_attribution; whether this CPU has products of its own for it
bool cpu_singular_attribution(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t grad, std::int64_t grad_stride,
                              std::uintptr_t v, std::int64_t v_stride, std::uintptr_t u, std::int64_t u_stride,
                              std::uintptr_t totals, std::int64_t rows, std::int64_t in, std::int64_t out,
                              std::int64_t directions, std::int64_t tokens, int dtype, int threads) {
  if (tokens < 1) throw py::value_error("a sequence has at least one token");
  const taco::SingularAttribution call = {dtype_of(dtype), pointer(x), x_stride, pointer(grad), grad_stride, pointer(v),
                                          v_stride, pointer(u), u_stride, rows, in, out, directions, tokens,
                                          pointer<double>(totals)};
  py::gil_scoped_release released;
  return taco::singular_attribution(call, threads);
}

#ifdef TACO_WITH_CUDA
// v, v_stride, u, u_stride, bias, y, y_stride, rank, out, pivot, long_pivot
using CudaMember = std::tuple<std::uintptr_t, std::int64_t, std::uintptr_t, std::int64_t, std::uintptr_t,
                              std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, std::uintptr_t, bool>;

taco::cuda::LowRankCall cuda_call(const std::vector<CudaMember>& members, std::int64_t rows, std::int64_t in, int gate,
                                  int dtype) {
  taco::cuda::LowRankCall call = {};
  if (members.empty() || members.size() > std::size_t(taco::cuda::kMaxMembers)) {
    throw py::value_error("a call has 1 to " + std::to_string(taco::cuda::kMaxMembers) + " members");
  }
  call.rows = rows, call.in = in, call.gate = gate, call.dtype = dtype, call.count = int(members.size());
  for (std::size_t i = 0; i < members.size(); ++i) {
    const auto& [v, v_stride, u, u_stride, bias, y, y_stride, rank, out, pivot, long_pivot] = members[i];
    call.members[i] = {pointer(v), v_stride, pointer(u), u_stride,       pointer(bias), pointer<void>(y),
                       y_stride,   rank,     out,        pointer(pivot), long_pivot};
  }
  return call;
}

std::int64_t cuda_low_rank_workspace_bytes(const std::vector<CudaMember>& members, std::int64_t rows, std::int64_t in,
                                           int gate, int dtype) {
  const auto call = cuda_call(members, rows, in, gate, dtype);
  const std::int64_t bytes = taco::cuda::low_rank_decode_workspace_bytes(call);
  if (bytes < 0) throw std::runtime_error(std::string("cuda: ") + taco::cuda::error_string(int(-bytes)));
  return bytes;
}

void cuda_low_rank(std::uintptr_t x, std::int64_t x_stride, const std::vector<CudaMember>& members,
                   std::uintptr_t residual, std::int64_t residual_stride, std::int64_t rows, std::int64_t in, int gate,
                   int dtype, bool norm, float eps, int launch, std::uintptr_t workspace, std::int64_t workspace_bytes,
                   std::uintptr_t stream) {
  taco::cuda::LowRankCall call = cuda_call(members, rows, in, gate, dtype);
  call.x = pointer(x), call.x_stride = x_stride, call.residual = pointer(residual);
  call.residual_stride = residual_stride, call.norm = norm, call.eps = eps;
  int error = 0;
  {
    py::gil_scoped_release released;
    error = taco::cuda::low_rank_decode(call, taco::cuda::Launch(launch), pointer<void>(workspace),
                                        std::size_t(workspace_bytes), pointer<void>(stream));
  }
  if (error != 0) throw std::runtime_error(std::string("cuda: ") + taco::cuda::error_string(error));
}

void cuda_gather(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t pivot, bool long_pivot, std::uintptr_t y,
                 std::int64_t y_stride, std::int64_t rows, std::int64_t width, int element, std::uintptr_t stream) {
  const taco::cuda::GatherCall call = {pointer(x), x_stride, pointer(pivot), long_pivot, pointer<void>(y),
                                       y_stride,   rows,     width,          element};
  const int error = taco::cuda::gather(call, pointer<void>(stream));
  if (error != 0) throw std::runtime_error(std::string("cuda: ") + taco::cuda::error_string(error));
}
#endif

void set_cpu_isa(const std::string& name) {
  if (taco::set_cpu_isa(name)) return;
  std::string known = "auto";
  for (const std::string& isa : taco::cpu_isas()) known += ", " + isa;
  throw py::value_error("cpu instruction set '" + name + "' is not available here; choose one of " + known);
}

std::uint64_t read_memory(std::uintptr_t data, std::int64_t bytes, int threads) {
  py::gil_scoped_release released;
  return taco::read_memory(pointer(data), bytes, threads);
}

}  // namespace

#if __has_include("taco_build_info.h")
#include "taco_build_info.h"  // written by setup.py
#endif
#ifndef TACO_BUILD_INFO
#define TACO_BUILD_INFO "{}"
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of taco_kernels (raw pointers; use taco_kernels' functions instead)";
  m.attr("BUILD_INFO") = TACO_BUILD_INFO;  // JSON: compilers and architectures

  m.def("cpu_low_rank_linear", &cpu_low_rank_linear, "y = (x v^T) u^T + bias + residual");
  m.def("cpu_low_rank_bridge", &cpu_low_rank_bridge, "y = h + (rmsnorm(h) v^T) u^T + bias");
  m.def("cpu_sketch", &cpu_sketch, "rows of the randomized SVD's test matrix, out of Philox");
  m.def("cpu_pivoted_low_rank_linear", &cpu_pivoted_low_rank_linear,
        "y = (x[:, pivot[:rank]] + x[:, pivot[rank:]] v^T) u^T + bias + residual; IndexError");
  m.def("cpu_low_rank_int8", &cpu_low_rank_int8,
        "y = ((x v^T * v_scale) * u_scale) u^T + bias of 8-bit factors, with or without a pivot; IndexError");
  m.def("cpu_unpack_int8", &cpu_unpack_int8, "8-bit integers times their scales, one of rows or of columns");
  m.def("cpu_gather", &cpu_gather, "x[:, pivot] of elements of 2 or 4 bytes in two pieces; IndexError");
  m.def("cpu_low_rank_linear_group", &cpu_low_rank_linear_group, "several low-rank linears of one x");
  m.def("cpu_low_rank_mlp", &cpu_low_rank_mlp, "down(act(gate(x)) * up(x)), three low-rank linears");
  m.def("cpu_attribution", &cpu_attribution, "per-direction sums of a * b: signed, absolute, squares");
  m.def("cpu_singular_attribution", &cpu_singular_attribution, "cpu_attribution of (grad u^T) and (x v^T), if there");
  m.def("cpu_isas", &taco::cpu_isas, "instruction sets usable here, best first");
  m.def("compiled_cpu_isas", &taco::compiled_cpu_isas, "instruction sets in this binary, best first");
  m.def("cpu_isa", &taco::cpu_isa, "the instruction set in use");
  m.def("cpu_is_amd", &taco::cpu_is_amd, "whether AMD made this CPU, for which torch's MKL has slower kernels");
  m.def("set_cpu_isa", &set_cpu_isa, "chooses an instruction set, for tests; \"auto\" is the best");
  m.def(
      "cpu_many_rows_from",
      [](int dtype) { return taco::many_rows_from(dtype_of(dtype)); },
      "from how many rows on there are kernels for many rows");
  m.def("omp_threads", &taco::omp_threads, "threads of the OpenMP runtime; 0 when built without OpenMP");
  m.def("read_memory", &read_memory, "reads memory as fast as it goes, for benchmarks");

  if (!taco::direct::add_to(m.ptr())) throw py::error_already_set();

  // --- CUDA (section of the CUDA kernels' owner) ---
#ifdef TACO_WITH_CUDA
  m.attr("HAS_CUDA") = true;
  m.attr("CUDA_MAX_ROWS") = taco::cuda::kMaxDecodeRows;
  m.attr("CUDA_MAX_MEMBERS") = taco::cuda::kMaxMembers;
  m.def("cuda_unusable", &taco::cuda::why_unusable, "why the current device cannot run the kernels; empty if it can",
        py::call_guard<py::gil_scoped_release>());
  m.def("cuda_low_rank_workspace_bytes", &cuda_low_rank_workspace_bytes,
        "bytes for (members, rows, in, gate, dtype)");
  m.def("cuda_gather", &cuda_gather, "x[:, pivot] of elements of 2 or 4 bytes");
  m.def("cuda_low_rank", &cuda_low_rank,
        "y = scale * (x v^T) u^T + bias + residual of every member, gated, or behind a pivot");
#else
  m.attr("HAS_CUDA") = false;
#endif
  // --- end of the CUDA section ---
}
