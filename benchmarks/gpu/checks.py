"""Correctness of every op on every backend against float64, on fresh random inputs and poisoned outputs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Inputs(NamedTuple):
    """Arguments of one call; ``eps`` is None for low_rank_linear, and for low_rank_bridge ``residual`` is None."""

    x: Tensor
    v: Tensor
    u: Tensor
    bias: Tensor | None
    residual: Tensor | None
    eps: float | None

    @property
    def bytes(self) -> int:
        """The least that a call must move: every input read once, the output written once."""
        size = self.x.element_size()
        rows, out_size = self.x.shape[0], self.u.shape[0]
        tensors = [t.numel() for t in (self.x, self.v, self.u, self.bias, self.residual) if t is not None]
        return size * (sum(tensors) + rows * out_size)

    @property
    def flops(self) -> int:
        rows, in_size = self.x.shape
        out_size, rank = self.u.shape
        return 2 * rows * rank * (in_size + out_size)


def draw(
    op: str, in_size: int, out_size: int, rank: int, rows: int, dtype: str, device: str,
    *, bias: bool = True, residual: bool = False, pad: int = 0, scale: float = 1.0,
) -> Inputs:  # fmt: skip
    """Fresh random inputs; ``pad`` extra elements behind every row of x, v, u and residual make strides odd."""
    kind = DTYPES[dtype]

    def matrix(rows: int, columns: int, factor: float) -> Tensor:
        wide = torch.randn(rows, columns + pad, device=device, dtype=torch.float32).mul_(factor).to(kind)
        return wide[:, :columns]

    bridge = op == "low_rank_bridge"
    if bridge and in_size != out_size:
        raise ValueError(f"low_rank_bridge maps a space to itself, not {in_size} to {out_size}")
    return Inputs(
        matrix(rows, in_size, scale),
        matrix(rank, in_size, in_size**-0.5),
        matrix(out_size, rank, rank**-0.5),
        matrix(1, out_size, 1.0)[0] if bias else None,
        matrix(rows, out_size, 1.0) if residual and not bridge else None,
        1e-5 if bridge else None,
    )


def call(inputs: Inputs) -> Tensor:
    """The public op on these inputs, with whatever backend is in force."""
    import taco_kernels

    x, v, u, bias, residual, eps = inputs
    if eps is not None:
        return taco_kernels.low_rank_bridge(x, v, u, bias, eps)
    return taco_kernels.low_rank_linear(x, v, u, bias, residual)


def forced_reference(inputs: Inputs) -> Tensor:
    """The public op by its plain reference."""
    from taco_kernels import use_backend

    with use_backend("reference"):
        return call(inputs)


def worst_error(y: Tensor, inputs: Inputs, backend: str) -> float:
    """Largest elementwise error over the largest that roundoff alone explains; above 1 (or NaN) is wrong.

    A float32 sum of n terms errs by at most n eps times the sum of absolute values. The result is rounded once to the
    dtype; the rank-sized intermediate too, except in the CUDA kernels, which carry what rounding took in a second
    number; two library calls round the normalised input of the bridge as well.
    """
    info = torch.finfo(y.dtype)
    single = torch.finfo(torch.float32).eps
    half_step = info.eps / 2
    tiny = info.smallest_normal * info.eps / 2
    x, v, u, bias, residual = (None if t is None else t.double() for t in inputs[:5])
    assert x is not None and v is not None and u is not None
    residual = x if inputs.eps is not None else residual
    scale = x.new_ones(()) if inputs.eps is None else torch.rsqrt(x.pow(2).mean(1, keepdim=True) + inputs.eps)
    middle = scale * (x @ v.T)
    exact = middle @ u.T
    largest = (scale * (x.abs() @ v.abs().T)) @ u.abs().T
    terms = x.shape[1] * (1 if inputs.eps is None else 2) + 2 * u.shape[1] + 16
    middle_step = 0.0 if y.dtype == torch.float32 else half_step**2 if backend == "cuda" else half_step
    error = terms * single * largest + middle_step * (middle.abs() @ u.abs().T) + tiny * u.abs().sum(1)
    if backend in ("library", "compiled", "norm+linear+linear+add"):
        # Each of the separate steps rounds what it hands on: normed input, intermediate, product before the add.
        error = error + 2 * half_step * largest + half_step * (exact.abs() + (0 if bias is None else bias.abs()))
    for extra in (bias, residual):
        if extra is not None:
            exact = exact + extra
            error = error + 2 * single * extra.abs()
    error = error + half_step * (exact.abs() + error) + 2 * single * exact.abs() + tiny
    if y.numel() == 0:
        return 0.0
    ratio = ((y.double() - exact).abs() / error).max().item()
    return ratio if ratio == ratio else float("inf")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Whatever ``torch.empty`` returns inside is full of NaN: an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Case(NamedTuple):
    """Arguments of :func:`draw` for one check."""

    op: str
    in_size: int
    out_size: int
    rank: int
    rows: int
    dtype: str
    bias: bool = True
    residual: bool = False
    pad: int = 0
    scale: float = 1.0

    @property
    def key(self) -> str:
        flags = "".join(letter for letter, on in (("b", self.bias), ("r", self.residual)) if on)
        scale = "" if self.scale == 1.0 else f"/x{self.scale:g}"
        base = f"{self.op}/{self.dtype}/{self.in_size}x{self.out_size}/r{self.rank}/m{self.rows}"
        return f"{base}/{flags or '-'}/p{self.pad}{scale}"


def cases(small: bool, tiny: bool) -> list[Case]:
    """``tiny`` for a CPU, ``small`` for compute-sanitizer, else everything: odd sizes, many rows, strides."""
    if tiny:
        sizes, rows = [(40, 24, 8), (33, 17, 5)], [0, 1, 3, 18]
    elif small:
        sizes, rows = [(264, 136, 40), (131, 70, 19)], [1, 5, 16]
    else:
        sizes = [(4096, 4096, 512), (4096, 1000, 64), (1000, 4096, 1024), (264, 136, 40), (131, 71, 19), (1, 1, 1)]
        sizes += [(11008, 4096, 410), (4096, 11008, 2048)]
        rows = [0, 1, 2, 7, 8, 9, 16, 17, 64, 300, 2048]
    found = []
    for dtype in ("bfloat16", "float16", "float32"):
        for in_size, out_size, rank in sizes:
            for m in rows:
                for pad in (0, 8) if m in (1, 16) else (0,):
                    found.append(Case("low_rank_linear", in_size, out_size, rank, m, dtype, True, True, pad))
                    found.append(Case("low_rank_bridge", in_size, in_size, rank, m, dtype, True, False, pad))
        found.append(Case("low_rank_linear", *sizes[0], 1, dtype, False, False, 1))
        # Massive activations: the product leaves float16's range before the scale brings it back.
        found.append(Case("low_rank_bridge", sizes[0][0], sizes[0][0], 32, 4, dtype, True, False, 0, 2000.0))
    return found


def check(case: Case, backend: str, device: str) -> dict[str, Any]:
    """Runs one case on one backend, twice; ``ok`` also needs the same bits from both runs."""
    from taco_kernels import use_backend

    inputs = draw(*case[:6], device, bias=case.bias, residual=case.residual, pad=case.pad, scale=case.scale)
    try:
        with use_backend(backend), poisoned_memory():
            first, second = call(inputs), call(inputs)
    except Exception as error:  # one broken case must not cost the others their run
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
    worst = worst_error(first, inputs, backend)
    same = bool(torch.equal(first, second))
    return {"ok": worst <= 1.0 and same, "worst": round(worst, 4) if worst < 1e9 else "inf", "same_bits": same}


def check_streams(backend: str) -> dict[str, Any]:
    """On a GPU: on a side stream, and replayed from a CUDA graph with new input values, results must be the same."""
    from taco_kernels import use_backend

    inputs = draw("low_rank_bridge", 1024, 1024, 128, 4, "bfloat16", "cuda")
    try:
        with use_backend(backend):
            expected = call(inputs)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                aside = call(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = call(inputs)
            same = bool(torch.equal(aside, expected))
            for _ in range(3):
                inputs.x.normal_()
                graph.replay()
                same = same and bool(torch.equal(replayed, call(inputs)))
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
    return {"ok": same}
