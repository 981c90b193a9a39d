"""Types of the compiled extension. Tensors are passed as addresses (``Tensor.data_ptr()``), strides in elements."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

BUILD_INFO: str
HAS_CUDA: bool

def cpu_low_rank_linear(
    x: int,
    x_stride: int,
    v: int,
    v_stride: int,
    u: int,
    u_stride: int,
    bias: int,
    residual: int,
    residual_stride: int,
    y: int,
    rows: int,
    in_features: int,
    rank: int,
    out_features: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def cpu_low_rank_bridge(
    h: int,
    h_stride: int,
    v: int,
    v_stride: int,
    u: int,
    u_stride: int,
    bias: int,
    y: int,
    rows: int,
    hidden: int,
    rank: int,
    eps: float,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def cpu_low_rank_int8(
    x: int,
    x_stride: int,
    pivot: int,
    long_index: bool,
    v: int,
    v_stride: int,
    v_scale: int,
    u: int,
    u_stride: int,
    u_scale: int,
    bias: int,
    y: int,
    rows: int,
    in_features: int,
    rank: int,
    out_features: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def cpu_unpack_int8(
    integers: int,
    stride: int,
    rows: int,
    columns: int,
    scale: int,
    scale_of_rows: bool,
    out: int,
    out_stride: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def cpu_gather(
    x: int,
    x_stride: int,
    pivot: int,
    first: int,
    first_stride: int,
    rest: int,
    rest_stride: int,
    rows: int,
    width: int,
    rank: int,
    element: int,
    long_index: bool,
    threads: int,
    /,
) -> None: ...
def cpu_sketch(
    out: int,
    out_stride: int,
    first_row: int,
    rows: int,
    first_column: int,
    columns: int,
    seed: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...

# (v, v_stride, u, u_stride, bias or 0, y, rank, out); y is 0 for the gate and up of an MLP
_Map = tuple[int, int, int, int, int, int, int, int]

def cpu_low_rank_linear_group(
    x: int, x_stride: int, rows: int, in_features: int, members: tuple[_Map, ...], dtype: int, threads: int, /
) -> None: ...
def cpu_low_rank_mlp(
    x: int,
    x_stride: int,
    rows: int,
    in_features: int,
    gate: _Map,
    up: _Map,
    down: _Map,
    activation: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def cpu_attribution(
    a: int,
    a_stride: int,
    b: int,
    b_stride: int,
    totals: int,
    rows: int,
    directions: int,
    tokens: int,
    position: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def cpu_singular_attribution(
    x: int,
    x_stride: int,
    grad: int,
    grad_stride: int,
    v: int,
    v_stride: int,
    u: int,
    u_stride: int,
    totals: int,
    rows: int,
    in_features: int,
    out_features: int,
    directions: int,
    tokens: int,
    dtype: int,
    threads: int,
    /,
) -> bool: ...
def cpu_isas() -> list[str]: ...
def compiled_cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def cpu_is_amd() -> bool: ...
def set_cpu_isa(name: str, /) -> None: ...
def cpu_many_rows_from(dtype: int, /) -> int: ...
def omp_threads() -> int: ...
def read_memory(data: int, bytes: int, threads: int, /) -> int: ...

# Only where HAS_CUDA is true:
CUDA_MAX_ROWS: int
CUDA_MAX_MEMBERS: int

# v, v_stride, u, u_stride, bias, y, y_stride, rank, out, pivot, long_pivot
_CudaMember = tuple[int, int, int, int, int, int, int, int, int, int, bool]

def cuda_unusable() -> str: ...
def cuda_low_rank_workspace_bytes(
    members: Sequence[_CudaMember], rows: int, in_features: int, gate: int, dtype: int, /
) -> int: ...
def cuda_gather(
    x: int,
    x_stride: int,
    pivot: int,
    long_pivot: bool,
    y: int,
    y_stride: int,
    rows: int,
    width: int,
    element: int,
    stream: int,
    /,
) -> None: ...
def cuda_low_rank(
    x: int,
    x_stride: int,
    members: Sequence[_CudaMember],
    residual: int,
    residual_stride: int,
    rows: int,
    in_features: int,
    gate: int,
    dtype: int,
    norm: bool,
    eps: float,
    launch: int,
    workspace: int,
    workspace_bytes: int,
    stream: int,
    /,
) -> None: ...

# Direct calls (see taco_kernels.direct): the result, None (the ordinary way), or False (more rows than are served).
def direct_low_rank_linear(
    x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None, /
) -> Tensor | bool | None: ...
def direct_low_rank_bridge(
    h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, eps: float, /
) -> Tensor | bool | None: ...
def direct_pivoted_low_rank_linear(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None, residual: Tensor | None, /
) -> Tensor | bool | None: ...
def direct_low_rank_mlp(
    x: Tensor,
    gate_v: Tensor,
    gate_u: Tensor,
    gate_bias: Tensor | None,
    up_v: Tensor,
    up_u: Tensor,
    up_bias: Tensor | None,
    down_v: Tensor,
    down_u: Tensor,
    down_bias: Tensor | None,
    act: str,
    /,
) -> Tensor | None: ...
def direct_low_rank_linear_group(
    x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None], /
) -> list[Tensor] | bool | None: ...
def direct_setup(
    capsule: object,
    tensor: type,
    parameter: type,
    guards: tuple[Callable[[], object], ...],
    get_num_threads: Callable[[], int],
    forward_ad: dict[str, object],
    /,
) -> bool: ...
def direct_register(op: str, /) -> bool: ...
def direct_remember(op: str, launch: int, /, *args: Any) -> None: ...
def direct_forget() -> None: ...
def direct_enable(flag: bool, /) -> bool: ...
def direct_limit(op: str, dtype: int, limits: tuple[tuple[int, int, int], ...], /) -> None: ...
