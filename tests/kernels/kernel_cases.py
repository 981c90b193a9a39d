"""Shapes, backends and error bounds shared by the kernel tests. One generator feeds them all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

import taco_kernels
from taco_kernels import native
from taco_kernels.low_rank_mlp import ACTIVATIONS, Projection
from taco_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear_reference

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)

# (in, rank, out): one element, odd sizes, exactly one vector step (32), just beside it, rank larger than in, no rank,
# no input, more panels than threads
SHAPES = [
    (1, 1, 1),
    (9, 5, 7),
    (31, 33, 30),
    (32, 32, 32),
    (33, 16, 65),
    (128, 24, 128),
    (257, 48, 131),
    (1000, 100, 3),
    (5, 0, 4),
    (0, 3, 4),
    (3, 70, 6),
]
# below, at and above every number of rows the kernels handle together, and more than one block of 64
ROWS = [0, 1, 2, 3, 4, 5, 7, 16, 17, 65, 130]


def cpu_backends() -> list[str]:
    """Every backend of CPU tensors, the C++ one once per instruction set that this CPU has."""
    names = ["reference", "library"]
    if native.module is not None:
        names += [f"cpp:{isa}" for isa in native.module.cpu_isas()]
    return names


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Forces a backend of :func:`cpu_backends`, instruction set included."""
    backend, _, isa = name.partition(":")
    if isa:
        native.module.set_cpu_isa(isa)
    try:
        with taco_kernels.use_backend(backend):
            yield
    finally:
        if isa:
            native.module.set_cpu_isa("auto")


def random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def bound(exact: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Largest error that rounding explains, elementwise.

    ``magnitude`` is the same expression with every factor replaced by its absolute value; a sum of n fp32 products in
    any order is off by at most n u32 of it (u: unit roundoff). One rounding to ``dtype`` at the end; two library calls
    round the input's norm, the intermediate, the second product and each addition as well, the CPU kernels for more
    than four rows of bfloat16 only the intermediate.
    """
    u32 = torch.finfo(torch.float32).eps / 2
    u = torch.finfo(dtype).eps / 2
    limits = torch.finfo(dtype)
    smallest = limits.tiny * limits.eps + torch.finfo(torch.float32).tiny * terms
    error = (terms + 8) * u32 * magnitude + u * exact.abs() * (1 + u) + smallest
    if backend == "library":
        error = error + 4 * u * magnitude * (1 + u)
    if rounds_intermediate(backend, dtype, exact.shape[:-1].numel()):
        error = error + u * magnitude * (1 + u)
    return error


def rounds_intermediate(backend: str, dtype: torch.dtype, rows: int) -> bool:
    """Whether a backend of :func:`cpu_backends` rounds the intermediate of so many rows (csrc/cpu/taco_cpu.h)."""
    has = backend == "cpp:avx512bf16" or (backend == "cpp" and native.module.cpu_isa() == "avx512bf16")
    return has and dtype == torch.bfloat16 and rows > 4


def assert_within(actual: Tensor, exact: Tensor, limit: Tensor) -> None:
    """Fails with the worst element's error as a multiple of what is allowed."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs()
    # written so that a nan fails
    good = error <= limit
    assert bool(good.all()), f"error up to {(error / limit).max().item():.2f} times the bound"


def linear_exact(
    x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """float64 result of low_rank_linear and the magnitude for :func:`bound`."""

    def formula(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = x @ v.T @ u.T
        y = y if bias is None else y + bias
        return y if residual is None else y + residual

    wide = [None if t is None else t.double() for t in (x, v, u, bias, residual)]
    return formula(*wide), formula(*[None if t is None else t.abs() for t in wide])


def bridge_exact(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """float64 result of low_rank_bridge and the magnitude for :func:`bound`."""
    h, v, u = h.double(), v.double(), u.double()
    scale = 1 / torch.sqrt(h.square().mean(-1, keepdim=True) + eps)
    y = h + (h * scale) @ v.T @ u.T
    magnitude = h.abs() + (h.abs() * scale) @ v.abs().T @ u.abs().T
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return y, magnitude


def mlp_exact(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str) -> Tensor:
    """float64 result of low_rank_mlp."""
    opened, raised = (linear_exact(x, *member, None)[0] for member in (gate, up))
    return linear_exact(ACTIVATIONS[act](opened) * raised, *down, None)[0]


def _linear_and_error(
    x: Tensor, x_error: Tensor | float, v: Tensor, u: Tensor, bias: Tensor | None, middle_step: float, step: float
) -> tuple[Tensor, Tensor]:
    """A factorised linear of ``x`` (float64) known to within ``x_error``: its exact result and how far off it may be.

    ``middle_step`` and ``step`` are the unit roundoffs of what the intermediate and the result are stored in.
    """
    u32 = torch.finfo(torch.float32).eps / 2
    v, u = v.double(), u.double()
    middle = x @ v.T
    middle_error = (x.shape[-1] + 4) * u32 * (x.abs() @ v.abs().T) + middle_step * middle.abs()
    if isinstance(x_error, Tensor):
        middle_error = middle_error + x_error @ v.abs().T * (1 + middle_step)
    y = middle @ u.T
    error = middle_error @ u.abs().T + (v.shape[0] + 4) * u32 * ((middle.abs() + middle_error) @ u.abs().T)
    if bias is not None:
        y = y + bias.double()
    return y, error * (1 + step) + (step + 2 * u32) * y.abs()


def mlp_bound(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str, backend: str) -> Tensor:
    """Largest error of low_rank_mlp that rounding explains, elementwise, carried through step by step.

    The activations have a slope of at most 1.13 and are computed to a few units of their value or, near their zero,
    of their argument. The product of both sides is rounded once (not by ``reference``); ``library`` and ``triton`` also
    round either side, the activation's result and each rank-sized intermediate.
    """
    kind = torch.finfo(x.dtype)
    u32, u = torch.finfo(torch.float32).eps / 2, kind.eps / 2
    step = u32 if backend == "reference" else u
    # of gate, up and activation, which stay in float32 elsewhere
    stored = u if backend in ("library", "triton") else u32
    middle_step = u if backend in ("library", "triton") else u32
    (opened, opened_error), (raised, raised_error) = (
        _linear_and_error(x.double(), 0.0, *member, middle_step, stored) for member in (gate, up)
    )
    activated = ACTIVATIONS[act](opened)
    activated_error = 1.13 * opened_error + stored * activated.abs() + 16 * u32 * (activated.abs() + opened.abs())
    hidden = activated * raised
    hidden_error = activated_error * (raised.abs() + raised_error) + (activated.abs() + activated_error) * raised_error
    hidden_error = hidden_error + step * (hidden.abs() + hidden_error) + kind.tiny * kind.eps
    _, error = _linear_and_error(hidden, hidden_error, *down, middle_step, u)
    reach = 1 + down[1].double().abs().sum(-1) * (1 + down[0].double().abs().sum(-1).amax() if down[0].numel() else 1)
    return error + u * error + kind.tiny * kind.eps * reach


def pivoted_exact(x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """float64 result of pivoted_low_rank_linear and the magnitude for :func:`bound`."""
    wide = [t.double() for t in (x, v, u)]
    exact = pivoted_low_rank_linear_reference(*wide, pivot, None, residual.double())
    return exact, pivoted_low_rank_linear_reference(*[t.abs() for t in wide], pivot, None, residual.double().abs())


def window(height: int, across: int, dtype: torch.dtype) -> Tensor:
    """[height, across] within a larger tensor that is NaN everywhere else: whatever of it comes in shows."""
    whole = torch.full((height + 2, across + 5), float("nan"), dtype=dtype)
    whole[1:-1, 2 : 2 + across] = random((height, across), dtype)
    return whole[1:-1, 2 : 2 + across]


def ascending(pivot: torch.Tensor, rank: int) -> torch.Tensor:
    """The same split of the inputs with both parts in their order, as checkpoints have it."""
    return torch.cat([pivot[:rank].sort().values, pivot[rank:].sort().values])
