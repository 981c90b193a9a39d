"""Correctness of every op on every backend against float64, on fresh random inputs and poisoned outputs."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import shapes
from .capture import captured

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Factors(NamedTuple):
    """One factorised linear: v [rank, in], u [out, rank], bias [out] or None; with a pivot v is [rank, in - rank]."""

    v: Tensor
    u: Tensor
    bias: Tensor | None
    pivot: Tensor | None = None


class Inputs(NamedTuple):
    """Arguments of one call. ``members`` are the factors (low_rank_mlp: gate, up, down); ``eps`` only of a bridge."""

    op: str
    x: Tensor
    members: tuple[Factors, ...]
    residual: Tensor | None = None
    eps: float | None = None
    act: str = "silu"

    @property
    def behind_pivot(self) -> bool:
        return any(member.pivot is not None for member in self.members)

    @property
    def results(self) -> tuple[Factors, ...]:
        """The members whose results are returned."""
        return self.members[-1:] if self.op == "low_rank_mlp" else self.members

    @property
    def bytes(self) -> int:
        """The least that a call must move: every input read once, the output written once."""
        tensors = [self.x, self.residual, *(t for member in self.members for t in member[:3])]
        moved = sum(t.numel() for t in tensors if t is not None)
        return self.x.element_size() * (moved + self.x.shape[0] * sum(member.u.shape[0] for member in self.results))

    @property
    def flops(self) -> int:
        return 2 * self.x.shape[0] * sum(member.v.numel() + member.u.numel() for member in self.members)


@functools.cache
def generator(device: str) -> torch.Generator | None:
    """Where random inputs come from. On a GPU not torch's own generator: a graph whose capture fails leaves that one in
    the state of capturing, and every later draw of the process would raise."""
    if device == "cpu":
        return None
    made = torch.Generator(device)
    made.seed()
    return made


def draw(
    op: str, in_size: int, out_size: int | tuple[int, ...], rank: int, rows: int, dtype: str, device: str,
    *, bias: bool = True, residual: bool = False, pad: int = 0, scale: float = 1.0, act: str = "silu",
) -> Inputs:  # fmt: skip
    """Fresh random inputs; ``pad`` extra elements behind every row of x, v, u and residual make strides odd.

    Members that share x have first factors that are slices of one tensor, which is what torch's own calls do best on.
    """
    kind = DTYPES[dtype]

    def matrix(rows: int, columns: int, factor: float) -> Tensor:
        wide = torch.randn(rows, columns + pad, device=device, dtype=torch.float32, generator=generator(device))
        return wide.mul_(factor).to(kind)[:, :columns]

    def projections(columns: int, outs: tuple[int, ...]) -> list[Factors]:
        vs = matrix(len(outs) * rank, columns, columns**-0.5).split(rank)
        return [
            Factors(v, matrix(out, rank, rank**-0.5), matrix(1, out, 1.0)[0] if bias else None)
            for v, out in zip(vs, outs, strict=True)
        ]

    x = matrix(rows, in_size, scale)
    if op == "low_rank_mlp":
        assert isinstance(out_size, int)
        return Inputs(op, x, (*projections(in_size, (out_size, out_size)), *projections(out_size, (in_size,))), act=act)
    outs = out_size if isinstance(out_size, tuple) else (out_size,)
    if op in ("pivoted_low_rank_linear", "low_rank_linear_concat"):
        members = []
        for i, out in enumerate(outs):
            if i > 2:  # a layer may have both
                members += projections(in_size, (out,))
                continue
            kept = min(rank, in_size) if op == "pivoted_low_rank_linear" else min(rank, in_size, out)
            v, u = matrix(kept, in_size - kept, in_size**-0.5), matrix(out, kept, kept**-0.5)
            order = torch.randperm(in_size, device=device, generator=generator(device))
            # both parts ascending, as taco_svd makes them
            pivot = torch.cat([order[:kept].sort().values, order[kept:].sort().values]).to(torch.int32)
            members.append(Factors(v, u, matrix(1, out, 1.0)[0] if bias else None, pivot))
        added = matrix(rows, outs[0], 1.0) if residual and len(outs) == 1 else None
        return Inputs(op, x, tuple(members), added)
    bridge = op == "low_rank_bridge"
    if bridge and outs != (in_size,):
        raise ValueError(f"low_rank_bridge maps a space to itself, not {in_size} to {out_size}")
    rest = matrix(rows, outs[0], 1.0) if residual and op == "low_rank_linear" else None
    return Inputs(op, x, tuple(projections(in_size, outs)), rest, 1e-5 if bridge else None)


def call(inputs: Inputs) -> Tensor | list[Tensor]:
    """The public op on these inputs, with whatever backend is in force."""
    import taco_kernels

    x, members = inputs.x, inputs.members
    if inputs.op == "low_rank_mlp":
        return taco_kernels.low_rank_mlp(x, *(member[:3] for member in members), inputs.act)
    vs, us, biases, pivots = map(list, zip(*members, strict=True))
    if inputs.op == "low_rank_linear_group":
        return taco_kernels.low_rank_linear_group(x, vs, us, biases)
    if inputs.op == "low_rank_linear_concat":
        return taco_kernels.low_rank_linear_concat(x, vs, us, biases, pivots)
    v, u, bias, pivot = members[0]
    if inputs.op == "low_rank_bridge":
        assert inputs.eps is not None
        return taco_kernels.low_rank_bridge(x, v, u, bias, inputs.eps)
    if pivot is not None:
        return taco_kernels.pivoted_low_rank_linear(x, v, u, pivot, bias, inputs.residual)
    return taco_kernels.low_rank_linear(x, v, u, bias, inputs.residual)


def forced_reference(inputs: Inputs) -> Tensor | list[Tensor]:
    """The public op by its plain reference."""
    from taco_kernels import use_backend

    with use_backend("reference"):
        return call(inputs)


def parts(y: Tensor | list[Tensor]) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


# Activations that have a slope of at most 1.13.
_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
_SINGLE = torch.finfo(torch.float32).eps


def _linear_and_error(
    x: Tensor, x_error: Tensor | None, factors: Factors, dtype: torch.dtype, backend: str, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """Exact result (float64) for an x known to within ``x_error``, and its error before it is rounded.

    A float32 sum of n terms errs by at most n eps times the sum of absolute values. The rank-sized intermediate is
    rounded once to the dtype, except in the CUDA kernels, which carry what rounding took in a second number; two
    library calls round the normalised input of the bridge as well, and may add up partial sums in the dtype.
    """
    info = torch.finfo(dtype)
    half_step = info.eps / 2
    tiny = info.smallest_normal * half_step
    v, u, bias = (None if t is None else t.double() for t in factors[:3])
    assert v is not None and u is not None
    scale = x.new_ones(()) if eps is None else torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps)
    middle = scale * (x @ v.T)
    exact = middle @ u.T
    largest = (scale * (x.abs() @ v.abs().T)) @ u.abs().T
    terms = x.shape[1] * (1 if eps is None else 2) + 2 * u.shape[1] + 16
    middle_step = 0.0 if dtype == torch.float32 else half_step**2 if backend == "cuda" else half_step
    error = terms * _SINGLE * largest + middle_step * (middle.abs() @ u.abs().T) + tiny * u.abs().sum(1)
    if x_error is not None:
        error = error + (x_error @ v.abs().T) @ u.abs().T * (1 + half_step + terms * _SINGLE)
    if backend == "library":
        error = error + 2 * half_step * (middle.abs() @ u.abs().T)
        error = error + half_step * (exact.abs() + (0 if bias is None else bias.abs()))
        error = error + (0.0 if eps is None else 2 * half_step * largest)
    if bias is not None:
        exact, error = exact + bias, error + 2 * _SINGLE * bias.abs()
    return exact, error


def _unpivoted(member: Factors) -> Factors:
    """The member with its right factor in full, [rank, in]."""
    rank, pivot = member.v.shape[0], member.pivot
    if pivot is None:
        return member
    full = member.v.new_zeros(rank, len(pivot))
    full[:, pivot[:rank].long()] = torch.eye(rank, dtype=full.dtype, device=full.device)
    full[:, pivot[rank:].long()] = member.v
    return Factors(full, member.u, member.bias)


def _exact(inputs: Inputs, x: Tensor, residual: Tensor | None, backend: str) -> list[tuple[Tensor, Tensor]]:
    """Each result in float64 and its error before the last rounding."""
    dtype = inputs.x.dtype
    half_step = torch.finfo(dtype).eps / 2
    if inputs.op != "low_rank_mlp":
        members = map(_unpivoted, inputs.members)
        found = [_linear_and_error(x, None, member, dtype, backend, inputs.eps) for member in members]
        residual = x if inputs.eps is not None else residual
        if residual is not None:
            ((exact, error),) = found
            found = [(exact + residual, error + 2 * _SINGLE * residual.abs())]
        return found
    gate, up, down = inputs.members
    (opened, opened_error), (raised, raised_error) = (
        _linear_and_error(x, None, side, dtype, backend) for side in (gate, up)
    )
    activated = _ACTIVATIONS[inputs.act](opened)
    if backend == "library":  # each step's result is a tensor of the dtype
        opened_error = opened_error + half_step * opened.abs()
        raised_error = raised_error + half_step * raised.abs()
    error = 1.13 * opened_error + 8 * _SINGLE * (activated.abs() + opened.abs())
    error = error + (half_step * activated.abs() if backend == "library" else 0.0)
    hidden = activated * raised
    error = error * (raised.abs() + raised_error) + (activated.abs() + error) * raised_error
    error = error + half_step * (hidden.abs() + error) + torch.finfo(dtype).smallest_normal * half_step
    return [_linear_and_error(hidden, error, down, dtype, backend)]


def _results(y: Tensor | list[Tensor], inputs: Inputs) -> list[Tensor]:
    """Each member's result."""
    if inputs.op == "low_rank_linear_concat" and isinstance(y, Tensor):
        return list(y.split([member.u.shape[0] for member in inputs.members], dim=-1))
    return parts(y)


# Beyond this many rows only some are compared: float64 copies of everything would fill the GPU.
MOST_ROWS = 512


def worst_error(y: Tensor | list[Tensor], inputs: Inputs, backend: str) -> float:
    """Largest elementwise error over the largest that roundoff alone explains; above 1 (or NaN) is wrong.

    Of very many rows the first, the last and some in between, drawn anew each time, are compared; all must be finite.
    """
    x, residual = inputs.x, inputs.residual
    rows = x.shape[0]
    chosen: Tensor | slice = slice(None)
    if rows > MOST_ROWS:
        ends = [torch.arange(64), torch.arange(rows - 64, rows), torch.randint(rows, (MOST_ROWS // 2 - 128,))]
        chosen = torch.cat(ends).to(x.device)
    x = x[chosen].double()
    exact = _exact(inputs, x, None if residual is None else residual[chosen].double(), backend)
    info = torch.finfo(inputs.x.dtype)
    half_step = info.eps / 2
    worst = 0.0
    for result, (right, error) in zip(_results(y, inputs), exact, strict=True):
        if result.numel() == 0:
            continue
        error = error + half_step * (right.abs() + error) + 2 * _SINGLE * right.abs()
        error = error + info.smallest_normal * half_step
        ratio = ((result[chosen].double() - right).abs() / error).max().item()
        whole = bool(torch.isfinite(result).all())
        worst = max(worst, ratio if ratio == ratio and whole else float("inf"))
    return worst


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
    out_size: int | tuple[int, ...]
    rank: int
    rows: int
    dtype: str
    bias: bool = True
    residual: bool = False
    pad: int = 0
    scale: float = 1.0
    act: str = "silu"
    turned: bool = False  # factors are transposed views, as in the gradient towards x

    @property
    def key(self) -> str:
        flags = "".join(letter for letter, on in (("b", self.bias), ("r", self.residual)) if on)
        scale = "" if self.scale == 1.0 else f"/x{self.scale:g}"
        act = f"/{self.act}" if self.op == "low_rank_mlp" else ""
        outs = "+".join(map(str, self.out_size if isinstance(self.out_size, tuple) else (self.out_size,)))
        base = f"{self.op}/{self.dtype}/{self.in_size}x{outs}/r{self.rank}/m{self.rows}"
        return f"{base}/{flags or '-'}/p{self.pad}{act}{scale}{'/turned' if self.turned else ''}"


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
            for m in rows if dtype == "bfloat16" or not tiny else rows[1::2]:
                for pad in (0, 8) if m in (1, 16) else (0,):
                    found.append(Case("low_rank_linear", in_size, out_size, rank, m, dtype, True, True, pad))
                    found.append(Case("low_rank_bridge", in_size, in_size, rank, m, dtype, True, False, pad))
                    found.append(Case("pivoted_low_rank_linear", in_size, out_size, rank, m, dtype, True, True, pad))
                # q, k and v; five members, more than one launch takes; gate and up
                act = ("silu", "gelu_tanh", "gelu", "relu")[(m + rank) % 4]
                found.append(Case("low_rank_mlp", in_size, out_size, rank, m, dtype, m % 2 == 0, act=act))
                third = max(1, out_size // 3)
                outs = (out_size, third, third) if m % 2 else (out_size, third, 1, 17, third)
                found.append(Case("low_rank_linear_group", in_size, outs, rank, m, dtype, m % 4 < 2))
                found.append(Case("low_rank_linear_concat", in_size, outs, rank, m, dtype, m % 4 < 2))
        found.append(Case("low_rank_linear", *sizes[0], 1, dtype, False, False, 1))
        in_size, out_size, rank = sizes[0]
        for m in (1, 7, 64):
            found.append(Case("low_rank_linear", in_size, out_size, rank, m, dtype, turned=True))
            found.append(Case("low_rank_linear_group", in_size, (out_size, 17), rank, m, dtype, turned=True))
        # Massive activations: the product leaves float16's range before the scale brings it back.
        found.append(Case("low_rank_bridge", sizes[0][0], sizes[0][0], 32, 4, dtype, True, False, 0, 2000.0))
    return found


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Forces a backend; "cuda dependent" is the CUDA kernels' other launch."""
    from taco_kernels import _cuda, use_backend

    backend, _, launch = name.partition(" ")
    _cuda.set_launch(launch or ("cooperative" if backend == "cuda" else None))
    try:
        with use_backend(backend):
            yield
    finally:
        _cuda.set_launch(None)


def drawn(case: Case, device: str) -> Inputs:
    """Fresh random inputs of a case."""
    inputs = draw(
        *case[:6], device, bias=case.bias, residual=case.residual, pad=case.pad, scale=case.scale, act=case.act
    )
    if not case.turned:
        return inputs
    members = (m._replace(v=m.v.T.contiguous().T, u=m.u.T.contiguous().T) for m in inputs.members)
    return inputs._replace(members=tuple(members))


def equal(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> bool:
    """Whether two results are the same bits."""
    return all(torch.equal(one, other) for one, other in zip(parts(a), parts(b), strict=True))


def compared(
    first: Tensor | list[Tensor], second: Tensor | list[Tensor], inputs: Inputs, backend: str
) -> dict[str, Any]:
    """What is kept of a check: ``ok`` for a result within the backend's bound, and the same bits at the second time."""
    worst, same = worst_error(first, inputs, backend), equal(first, second)
    return {"ok": worst <= 1.0 and same, "worst": round(worst, 4) if worst < 1e9 else "inf", "same_bits": same}


def check(case: Case, backend: str, device: str, twin: str | None = None) -> dict[str, Any]:
    """Runs one case on one backend, twice; ``ok`` also needs the same bits from both runs, and from ``twin``, another
    launch of the same kernels."""
    inputs = drawn(case, device)
    with using(backend), poisoned_memory():
        first, second = call(inputs), call(inputs)
    computed = backend.partition(" ")[0]
    if inputs.behind_pivot:
        # Behind a pivot Triton's kernels are for few rows, and where the identity is all of v there is one product.
        few = case.rows <= 16 or computed != "triton"
        computed = computed if few and all(member.v.numel() for member in inputs.members) else "library"
    found = compared(first, second, inputs, computed)
    if twin is None:
        return found
    with using(twin), poisoned_memory():
        same = equal(first, call(inputs))
    return {**found, "ok": found["ok"] and same, f"bits_of_{twin}": same}


# Sizes of the statistics' kernels: (rows, columns), and (sequences, tokens, in, out, directions). Of whole tiles, of
# none, and with a few rows more than a tile.
MOMENTS = ((3000, 4096), (500, 300), (70, 131))
ATTRIBUTIONS = ((4, 512, 4096, 4096, 512), (300, 1, 264, 136, 40), (3, 65, 131, 71, 19))
TINY_MOMENTS, TINY_ATTRIBUTIONS = ((70, 40),), ((2, 5, 12, 9, 7),)


# (in, out, rank) of maps with 8-bit factors, each with and without a pivot and of 1, 7, 16 and 40 rows
INTEGERS, TINY_INTEGERS = ((4096, 4096, 512), (4096, 1000, 64), (1000, 4096, 900), (131, 71, 19)), ((40, 24, 8),)


def check_int8(in_size: int, out_size: int, rank: int, pivoted: bool, dtype: str, device: str) -> dict[str, Any]:
    """``low_rank_linear_int8`` by the Triton kernels, and beyond their rows by the library's, each twice."""
    from taco_kernels import low_rank_linear_int8

    kind, drawn = DTYPES[dtype], generator(device)
    columns = in_size - rank if pivoted else in_size
    v, u = (
        torch.randint(-127, 128, shape, device=device, dtype=torch.int8, generator=drawn)
        for shape in ((rank, columns), (out_size, rank))
    )
    scales = [2.0**-9 * (0.5 + torch.rand(rank, device=device, generator=drawn)) for _ in range(2)]
    order = torch.randperm(in_size, device=device, generator=drawn).int() if pivoted else None
    bias = torch.randn(out_size, device=device, generator=drawn).to(kind)
    worst, same = 0.0, True
    for rows in (1, 7, 16, 40):
        x = torch.randn(rows, in_size, device=device, generator=drawn).to(kind)
        with using("triton"), poisoned_memory():
            found = [low_rank_linear_int8(x, v, scales[0], u, scales[1], bias, order) for _ in range(2)]
        full = Factors(v.double() * scales[0].double()[:, None], u.double() * scales[1].double(), bias, order)
        member = _unpivoted(full)
        exact, error = _linear_and_error(x.double(), None, member, kind, "library" if rows > 16 else "triton")
        half_step = torch.finfo(kind).eps / 2
        if rows > 16:  # both factors are rounded as they are written out
            error = error + 3 * half_step * (x.double().abs() @ member.v.abs().T) @ member.u.abs().T
        error = error + half_step * (exact.abs() + error) + torch.finfo(kind).smallest_normal * half_step
        ratio = ((found[0].double() - exact).abs() / error).max().item()
        worst = max(worst, ratio if ratio == ratio else float("inf"))
        same &= bool(torch.equal(*found))
    return {"ok": worst <= 1.0 and same, "worst": round(worst, 4) if worst < 1e9 else "inf", "same_bits": same}


def check_moment(rows: int, columns: int, dtype: str, device: str) -> dict[str, Any]:
    """Second moments by the Triton kernel, in two calls of which the second adds to the first, twice."""
    from taco_kernels import second_moment_, second_moment_dense, second_moment_zeros

    x = torch.randn(rows, columns, device=device, generator=generator(device)).to(DTYPES[dtype])
    found = [second_moment_zeros(columns, device=device) for _ in range(2)]
    with using("triton"):
        for moment in found:
            for part in (x[: rows // 3], x[rows // 3 :]):
                second_moment_(moment, part)
    wide = x.double()
    error = (second_moment_dense(found[0]).double() - wide.T @ wide).abs()
    worst = (error / ((rows + 16) * _SINGLE * (wide.abs().T @ wide.abs()))).max().item()
    same = bool(torch.equal(*found))
    return {"ok": worst <= 1.0 and same, "worst": round(worst, 4), "same_bits": same}


def check_attribution(
    sequences: int, tokens: int, in_size: int, out_size: int, directions: int, dtype: str, device: str
) -> dict[str, Any]:
    """The four sums by the Triton kernel, twice, each within what roundoff explains (see test_singular_attribution)."""
    from taco_kernels import singular_attribution

    shapes = (sequences, tokens, in_size), (sequences, tokens, out_size), (out_size, directions), (directions, in_size)
    inputs = [torch.randn(shape, device=device, generator=generator(device)).to(DTYPES[dtype]) for shape in shapes]
    with using("triton"):
        found, again = singular_attribution(*inputs), singular_attribution(*inputs)
    x, grad, u, v = (t.double() for t in inputs)
    terms = (grad @ u) * (x @ v.T)
    off = (in_size + out_size + 4) * _SINGLE * (grad.abs() @ u.abs()) * (x.abs() @ v.abs().T)
    added = (sequences * tokens + 4) * _SINGLE
    of_sequence, error = terms.sum(1), off.sum(1) + added * terms.abs().sum(1)
    exact = (of_sequence.sum(0), terms.abs().sum((0, 1)), of_sequence.square().sum(0), terms.square().sum((0, 1)))
    squares = ((2 * of_sequence.abs() + error) * error).sum(0) + added * exact[2]
    token_squares = ((2 * terms.abs() + off) * off).sum((0, 1)) + added * exact[3]
    bounds = (error.sum(0), error.sum(0), squares, token_squares)
    ratios = [(got.double() - want).abs() / bound for got, want, bound in zip(found, exact, bounds, strict=True)]
    worst = torch.stack(ratios).max().item()
    same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return {"ok": worst <= 1.0 and same, "worst": round(worst, 4), "same_bits": same}


def joined(*sets: Inputs) -> Tensor:
    """All results of a call with each set of inputs, one after the other."""
    return torch.cat([part.flatten() for inputs in sets for part in parts(call(inputs))])


def on_streams(*sets: Inputs) -> tuple[Tensor, Tensor, torch.cuda.CUDAGraph]:
    """What `joined` gives on a side stream, what it will give when the graph is replayed, and that graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = joined(*sets)
    torch.cuda.current_stream().wait_stream(stream)
    with captured() as graph:
        replayed = joined(*sets)
    return aside, replayed, graph


def _small(op: str) -> Case:
    outs = (1024, 256, 256) if op in ("low_rank_linear_group", "low_rank_linear_concat") else 1024
    return Case(op, 1024, outs, 128, 4, "bfloat16")


_WIDE = Case("low_rank_linear", 4096, 11008, 1024, 4, "bfloat16")
_BEHIND_PIVOT = Case("pivoted_low_rank_linear", 4096, 4096, 2256, 16, "bfloat16")
# What is run on streams, by name: one small call of each op; and those that fill the GPU, with many blocks to wait for
# at a barrier, alone and beside each other.
CALLS: dict[str, tuple[Case, ...]] = {op: (_small(op),) for op in shapes.OPS}
LARGE_CALLS = {
    "4096x11008 r1024": (_WIDE,),
    "4096x4096 r2256 behind a pivot": (_BEHIND_PIVOT,),
    "both": (_WIDE, _BEHIND_PIVOT),
}


def check_streams(backend: str, cases: tuple[Case, ...]) -> dict[str, Any]:
    """On a GPU: on a side stream, and replayed from a CUDA graph with new input values, results must be the same."""
    sets = [drawn(case, "cuda") for case in cases]
    with using(backend):
        expected = joined(*sets)
        aside, replayed, graph = on_streams(*sets)
        same = bool(torch.equal(aside, expected))
        for _ in range(3):
            for inputs in sets:
                inputs.x.normal_(generator=generator(inputs.x.device.type))
            graph.replay()
            same = same and bool(torch.equal(replayed, joined(*sets)))
    return {"ok": same}


def check_together(backend: str, cases: tuple[Case, ...]) -> dict[str, Any]:
    """On a GPU: what streams compute at the same time, each call right behind another, is what each gives alone.

    A grid-wide barrier needs all of its blocks on the GPU at once: none may wait there for half of another's. Three
    streams take the cases in turn.
    """
    sets = [drawn(cases[i % len(cases)], "cuda") for i in range(3)]
    graphs, found = [], []
    with using(backend):
        expected = [joined(inputs) for inputs in sets]
        for inputs in sets:
            with captured() as graph:
                found.append([joined(inputs) for _ in range(50)])
            graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in sets]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    pairs = zip(found, expected, strict=True)
    return {"ok": all(torch.equal(result, right) for results, right in pairs for result in results)}


def kept_for_stream(result: Callable[[], Tensor]) -> bool:
    """Whether a result that a busy side stream still reads (`record_stream`) keeps its memory once it is let go."""
    y = result()
    expected, shape = y.clone(), y.shape
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some ten milliseconds
        read = y.clone()
    y.record_stream(stream)
    del y
    for _ in range(8):  # whoever is given the block writes over it
        torch.full(shape, 777.0, dtype=expected.dtype, device=expected.device)
    torch.cuda.synchronize()
    return bool(torch.equal(read, expected))


def check_direct(op: str) -> dict[str, Any]:
    """On a GPU, no backend forced: calls of sizes that the CUDA kernels have served are direct, and give the same bits,
    on a side stream and captured into a graph too; their results are blocks that torch's allocator knows."""
    import importlib

    from taco_kernels import direct

    if not direct.usable:
        return {"ok": True, "skipped": direct.reason}
    inputs = drawn(_small(op), "cuda")
    entry = importlib.import_module(f"taco_kernels.{op}")._direct
    x, (v, u, bias, pivot) = inputs.x, inputs.members[0]
    arguments: tuple[Any, ...] = {
        "low_rank_linear": (x, v, u, bias, inputs.residual),
        "low_rank_bridge": (x, v, u, bias, inputs.eps),
        "low_rank_linear_group": (x, *map(list, list(zip(*inputs.members, strict=True))[:3])),
        "pivoted_low_rank_linear": (x, v, u, pivot, bias, inputs.residual),
    }[op]
    with using("cuda"):
        expected = joined(inputs)
    with torch.inference_mode():
        direct.served(op, "cuda", *arguments)  # whatever a table of this GPU prefers
        found = entry(*arguments)
        if found is None or found is False:
            return {"ok": False, "error": "the call was not direct"}
        direct_results = torch.cat([part.flatten() for part in parts(found)])
        aside, replayed, graph = on_streams(inputs)
        graph.replay()
        same = all(torch.equal(results, expected) for results in (direct_results, aside, replayed))
        if same and not kept_for_stream(lambda: parts(entry(*arguments))[0]):
            return {"ok": False, "error": "a result's memory was given away while a recorded stream read it"}
    return {"ok": same}
