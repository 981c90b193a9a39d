"""The CUDA decode kernels, run on the CPU: the very source of csrc/cuda, every thread a fiber, under sanitizers.

``csrc/cuda/emulation`` replaces only the primitives of ``device.cuh`` (matrix unit, barriers, copies). Shared memory,
work space and output start as NaN, tensors are allocated without slack, and copies arrive no sooner than waited for.
"""

import dataclasses
import struct
import subprocess
from dataclasses import dataclass

import pytest
import torch
from emulation_programs import built

from taco_kernels import _cuda
from taco_kernels.low_rank_mlp import ACTIVATIONS

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HOPPER_SHARED = 232448  # bytes a block may have; less makes the kernels take their slower ways
# What of it the second kernel of a dependent launch does not get without a pivot (``beside_first_kernel`` in
# csrc/cuda/plan.h).
FIRST_KERNEL = 8 * 16 * 20 * 4 + 64 + 512 + 16 + 2048


@dataclass(frozen=True)
class Case:
    """One call. Tuples of ranks and sizes are several members, ``act`` the gated form of two. ``pad`` widens every row
    beyond its elements; ``shared`` is what the device gives a block; ``pivot`` is the dtype of one, or of each
    member's (None for a member without)."""

    rows: int
    in_size: int
    out_size: int | tuple[int, ...]
    rank: int | tuple[int, ...]
    dtype: torch.dtype
    norm: bool = False
    bias: bool = True
    residual: bool = True
    pad: int = 0
    processors: int = 3
    shared: int = HOPPER_SHARED
    scale: float = 1.0
    gain: float = 1.0  # what v has more and u less, so that only the intermediate is large
    act: str | None = None
    launch: str = "cooperative"
    pivot: torch.dtype | tuple[torch.dtype | None, ...] | None = None
    cancels: bool = False  # the residual is what the result rounds to, negated: what is left shows the sums' last bits

    @property
    def pivots(self) -> list[torch.dtype | None]:
        """of each member"""
        return list(self.pivot) if isinstance(self.pivot, tuple) else [self.pivot] * len(self.members)

    @property
    def members(self) -> list[tuple[int, int]]:
        """(rank, out) of each member; a bridge maps a space to itself."""
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        outs = self.out_size if isinstance(self.out_size, tuple) else (self.out_size,) * len(ranks)
        return [(rank, self.in_size if self.norm else out) for rank, out in zip(ranks, outs, strict=True)]


def _cases() -> list[Case]:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    cases = [
        # matrix unit: one tile, ragged tiles, several tiles per block, both widths, norm with and without bias
        Case(1, 32, 16, 16, brain, bias=False, residual=False),
        Case(1, 8, 8, 8, half),
        Case(5, 328, 136, 40, brain, norm=True, pad=8),
        Case(8, 1096, 72, 24, half, norm=True, bias=False),
        Case(9, 264, 40, 72, brain, residual=False, pad=16),
        Case(16, 616, 264, 104, half, norm=True, pad=8),
        Case(16, 64, 648, 16, brain, processors=2),
        Case(2, 4200, 24, 8, brain, norm=True, processors=4),
        Case(3, 40, 1000, 200, brain, processors=1),
        Case(12, 48, 304, 136, half, processors=4, norm=True),
        # too little shared memory: u read from global memory, in part and wholly; the intermediate in pieces
        Case(3, 96, 304, 264, brain, shared=30_000),
        Case(13, 96, 304, 264, half, norm=True, shared=26_000),
        Case(1, 72, 200, 520, brain, shared=16_000),
        # massive activations: what is not scaled leaves float16's range
        Case(4, 512, 512, 32, half, norm=True, scale=3000.0),
        # an intermediate beyond float16's range, of a result within it
        Case(16, 328, 136, 40, half, scale=4000.0, gain=8.0),
        Case(3, 77, 51, 13, half, scale=4000.0, gain=8.0),
        # plain kernel: float32 aligned and not, half types whose rows are not 16-byte multiples
        Case(1, 300, 44, 20, single, norm=True),
        Case(1, 301, 43, 19, single, pad=1),
        Case(4, 517, 70, 33, single, norm=True, residual=False),
        Case(16, 256, 100, 64, single, norm=True),
        Case(11, 129, 40, 70, single, shared=15_000),
        Case(2, 77, 51, 13, half, norm=True),
        Case(16, 131, 64, 30, brain, pad=3),
        Case(1, 1, 1, 1, brain, norm=True),
        Case(1, 1, 1, 1, single, bias=False, residual=False),
        Case(7, 1, 300, 1, half),
    ]
    one = {"residual": False}
    cases += [
        # q, k and v; ranks that differ; more tiles than blocks and fewer; blocks with two members' tiles
        Case(1, 64, (128, 32, 32), (32, 16, 16), brain, **one),
        Case(9, 264, (40, 200, 8, 24), (72, 8, 40, 136), half, pad=8, processors=2, **one),
        Case(16, 96, (304, 64), (136, 264), brain, shared=26_000, **one),
        Case(3, 301, (43, 1, 70), (19, 1, 33), single, pad=1, **one),
        Case(16, 128, (40, 300), (70, 8), single, shared=15_000, **one),
        Case(2, 77, (51, 30), (13, 7), half, **one),
        Case(2, 1096, (24, 40), (8, 16), brain, processors=4, **one),
        Case(5, 1096, 40, (16, 8), half, act="silu", processors=4, **one),
        # the gated form: each activation, each kernel, ranks alike and not, intermediates whole and in pieces
        Case(1, 64, 96, (32, 16), brain, act="silu", **one),
        Case(16, 264, 200, (40, 72), half, act="gelu_tanh", processors=2, pad=8, **one),
        Case(5, 96, 304, (264, 136), brain, act="gelu", shared=30_000, processors=1, **one),
        Case(8, 72, 648, (24, 24), half, act="relu", bias=False, **one),
        Case(1, 300, 44, (20, 12), single, act="silu", **one),
        Case(11, 129, 40, (70, 30), single, act="gelu", shared=15_000, **one),
        Case(2, 131, 51, (13, 40), brain, act="gelu_tanh", **one),
        Case(16, 33, 37, (5, 3), single, act="relu", **one),
    ]
    # behind a pivot: matrix unit and plain, one split and several, intermediates in pieces, every dtype and index
    cases += [
        Case(1, 304, 200, 40, brain, pivot=torch.int32),
        Case(5, 4208, 24, 8, half, pivot=torch.int64, processors=4, bias=False),
        Case(16, 360, 304, 264, brain, pivot=torch.int64, shared=26_000),
        Case(9, 48, 16, 16, half, pivot=torch.int32, residual=False),
        Case(3, 320, 43, 19, single, pivot=torch.int32, pad=1),
        Case(16, 320, 100, 64, single, pivot=torch.int64, processors=4),
        Case(2, 90, 51, 13, half, pivot=torch.int64),
        Case(1, 2, 1, 1, brain, pivot=torch.int32),
        Case(4, 78, 300, 70, single, pivot=torch.int32, shared=15_000),
        Case(12, 161, 64, 30, brain, pivot=torch.int64, pad=3),
        # a slice gathered in several pieces, one that serves the next ranks too; rows of x that are not aligned
        Case(9, 1384, 40, 24, brain, pivot=torch.int32, processors=1, pad=1),
        Case(2, 424, 24, 72, half, pivot=torch.int64, processors=2),
    ]
    long, short = torch.int64, torch.int32
    cases += [
        # several members, each with a pivot of its own or none, and so of different widths
        Case(1, 304, (128, 32, 32), (40, 16, 24), brain, pivot=(short, short, short), **one),
        Case(9, 304, (40, 8, 24), (72, 8, 280), half, pad=8, processors=2, pivot=(short, None, long), **one),
        Case(2, 1104, (24, 40), (8, 16), brain, processors=4, pivot=(short, short), **one),
        Case(16, 264, (304, 64), (136, 200), brain, shared=26_000, pivot=(long, short), bias=False, **one),
        Case(3, 301, (43, 1, 70), (19, 300, 33), single, pad=1, pivot=(None, short, long), **one),
        Case(16, 128, (40, 300), (70, 8), single, shared=15_000, pivot=(short, None), **one),
        Case(2, 77, (51, 30), (13, 7), half, pivot=(long, long), **one),
        Case(5, 1096, 40, (16, 8), half, act="silu", processors=4, pivot=(short, short), **one),
    ]
    cases += [
        # tiles of several pieces, too few to go round: blocks take parts of two or three, which add up unequally many
        Case(3, 2240, 40, 64, brain, norm=True, processors=3),
        Case(16, 2264, 24, 72, half, processors=4, bias=False),
        Case(9, 2304, 40, 64, half, pivot=torch.int32, processors=3),
        Case(1, 2200, 24, 40, brain, pivot=torch.int64, processors=2, residual=False),
        Case(5, 2240, (40, 24, 8), (40, 16, 8), brain, processors=3, **one),
        Case(2, 2240, (24, 40), (40, 24), half, processors=3, pivot=(short, None), **one),
        Case(4, 2240, 40, (24, 40), brain, act="silu", processors=3, **one),
    ]
    generator = torch.Generator().manual_seed(0)

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def upto(most):
        return 1 + int(torch.randint(most, (1,), generator=generator))

    for _ in range(20):
        dtype = pick(half, brain, brain, single)
        step = pick(8, 8, 1)
        cases.append(
            Case(
                upto(16), step * upto(400 // step), step * upto(300 // step), step * upto(160 // step), dtype,
                norm=pick(True, False), bias=pick(True, False), residual=pick(True, False), pad=step * pick(0, 1),
                processors=upto(4), shared=pick(HOPPER_SHARED, 20_000, 40_000),
            )
        )  # fmt: skip
    # Both launches run the same sums in the same order.
    both = []
    for i, case in enumerate(cases):
        both.append(case)
        if i % 3 == 0 or case.act or case.pivot or isinstance(case.rank, tuple):
            both.append(dataclasses.replace(case, launch="dependent"))
    # The launcher gives the second kernel of a dependent launch less shared memory, so there is room for less of the
    # intermediate at a time; the sums must not be in another order for it.
    for case in [
        Case(9, 16, 48, 520, half, shared=74_400, cancels=True),
        Case(9, 16, 136, 520, brain, shared=74_400, cancels=True),
        Case(5, 16, 24, 520, single, shared=70_400, cancels=True),
    ]:
        both += [case, dataclasses.replace(case, launch="dependent", shared=case.shared - FIRST_KERNEL)]
    return both


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return built("low_rank_decode", tmp_path_factory.mktemp("emulation") / "decode")


def _tensor(rows, columns, pad, dtype, generator, factor=1.0):
    wide = torch.randn(rows, columns + pad, generator=generator) * factor
    return wide.to(dtype)[:, :columns]


def _bytes(tensor):
    """Bytes from the first to the last element of a row-strided matrix, and not one more."""
    rows, columns = tensor.shape
    flat = torch.as_strided(tensor, ((rows - 1) * tensor.stride(0) + columns,), (1,))
    return flat.contiguous().view(torch.uint8).numpy().tobytes()


def _draw(case: Case, seed: int):
    """x, (v, u, bias, pivot) of each member, residual"""
    generator = torch.Generator().manual_seed(seed)
    x = _tensor(case.rows, case.in_size, case.pad, case.dtype, generator, case.scale)
    members = []
    for (rank, out_size), index in zip(case.members, case.pivots, strict=True):
        # what v multiplies takes whole vectors of 16 bytes, whatever x's rows do
        pad = case.pad // 8 * 8 if index is not None and case.dtype != torch.float32 else case.pad
        columns = case.in_size - (rank if index is not None else 0)
        v = _tensor(rank, columns, pad, case.dtype, generator, case.gain * columns**-0.5)
        u = _tensor(out_size, rank, pad, case.dtype, generator, rank**-0.5 / case.gain)
        bias = _tensor(1, out_size, 0, case.dtype, generator) if case.bias else None
        pivot = None if index is None else torch.randperm(case.in_size, generator=generator).to(index)
        members.append((v, u, bias, pivot))
    residual = _tensor(case.rows, case.members[0][1], case.pad, case.dtype, generator) if case.residual else None
    if case.cancels:
        v, u, bias, _ = members[0]
        residual = -_exact(x, v, u, bias, None, None, case.dtype)[0].to(case.dtype)
    return x, members, residual


def _aligned(case: Case, tensors) -> bool:
    """What the launcher will find: rows of x, v and u that start and end on multiples of 16 bytes."""
    return all(
        (t.shape[1] * t.element_size()) % 16 == 0 and (t.stride(0) * t.element_size()) % 16 == 0 for t in tensors
    )


def _exact(x, v, u, bias, residual, eps, dtype, pivot=None):
    """float64 result and what roundoff explains before the result is rounded: float32 sums, an intermediate good to
    the square of the dtype's roundoff. The intermediate below float16's normal range loses its remainder; beyond its
    largest number it is that number and a remainder, rounded once."""
    info = torch.finfo(dtype)
    single = torch.finfo(torch.float32).eps
    middle_error = 0.0 if dtype == torch.float32 else (info.eps / 2) ** 2
    tiny = info.smallest_normal * info.eps / 2
    x, v, u, bias, residual = (None if t is None else t.double() for t in (x, v, u, bias, residual))
    if pivot is not None:  # the right factor whole, in the pivot's order
        x, v = x[:, pivot.long()], torch.cat([torch.eye(len(v), dtype=v.dtype), v], 1)
    scale = 1.0 if eps is None else torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps)
    middle = scale * (x @ v.T)
    exact = middle @ u.T
    largest = (scale * (x.abs() @ v.abs().T)) @ u.abs().T
    terms = x.shape[1] * (1 if eps is None else 2) + 2 * u.shape[1] + 16
    beyond = (middle.abs() - info.max).clamp_min(0)
    error = terms * single * largest + middle_error * (middle.abs() @ u.abs().T) + tiny * u.abs().sum(1)
    error = error + info.eps / 2 * (beyond @ u.abs().T)
    for extra in (bias, residual):
        if extra is not None:
            exact = exact + extra
            error = error + 2 * single * extra.abs()
    return exact, error


def _gated(parts, act):
    """Exact result and error of act(gate) * up: a slope of at most 1.13, a few units of float32 for the function."""
    (gate, gate_error), (up, up_error) = parts
    single = torch.finfo(torch.float32).eps
    activated = ACTIVATIONS[act](gate)
    activated_error = 1.13 * gate_error + 8 * single * (activated.abs() + gate.abs())
    exact = activated * up
    return exact, activated_error * (up.abs() + up_error) + (activated.abs() + activated_error) * up_error


def _check(y, exact, error):
    """Elementwise, with one rounding of the result."""
    info = torch.finfo(y.dtype)
    half_step = info.eps / 2
    error = error + half_step * (exact.abs() + error) + torch.finfo(torch.float32).eps * 2 * exact.abs()
    error = error + info.smallest_normal * half_step
    assert torch.isfinite(y).all(), "an element was not written, or came out of memory that nothing had written"
    worst = ((y.double() - exact).abs() / error).max().item()
    assert worst <= 1.0, f"error is {worst:.2f} times what roundoff explains"


def test_kernels_against_float64(program, tmp_path):
    eps = 1e-5
    cases = _cases()
    drawn = []
    for seed, case in enumerate(cases):
        drawn.append(drawn[-1] if case.launch == "dependent" else _draw(case, seed))
    with open(tmp_path / "calls", "wb") as file:
        for case, (x, members, residual) in zip(cases, drawn, strict=True):
            factors = [t for member in members for t in member[:2]]
            read_whole = factors if all(case.pivots) else (x, *factors)  # what is gathered need not be aligned
            header = (
                case.rows, case.in_size, CODES[case.dtype], case.norm, _cuda.GATES[case.act],
                _cuda.LAUNCHES[case.launch], _aligned(case, read_whole), case.residual, case.processors,
                case.shared, len(members), x.stride(0), residual.stride(0) if case.residual else 0,
            )  # fmt: skip
            file.write(struct.pack("<13qd", *header, eps))
            file.write(_bytes(x))
            for v, u, bias, pivot in members:
                strides = v.stride(0), u.stride(0), u.shape[0] + case.pad
                index = 0 if pivot is None else pivot.element_size()
                file.write(struct.pack("<7q", u.shape[1], u.shape[0], bias is not None, *strides, index))
                pivot = None if pivot is None else pivot[None]
                file.write(b"".join(_bytes(tensor) for tensor in (v, u, bias, pivot) if tensor is not None))
            if residual is not None:
                file.write(_bytes(residual))
    command = [str(program), str(tmp_path / "calls"), str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]

    seen = set()
    data = bytearray((tmp_path / "results").read_bytes())
    at = 0
    before = None
    for case, (x, members, residual) in zip(cases, drawn, strict=True):
        matrix_unit, splits, prefetched, capacity, tile_warps, uneven = struct.unpack_from("<6q", data, at)
        at += 48
        results = [
            _exact(x, v, u, bias, residual, eps if case.norm else None, case.dtype, pivot)
            for v, u, bias, pivot in members
        ]
        if case.act is not None:
            results = [_gated(results, case.act)]
        ys = []
        for exact, error in results:
            rows, width = exact.shape
            stride = width + case.pad
            flat = torch.frombuffer(data, dtype=case.dtype, count=(rows - 1) * stride + width, offset=at)
            at += flat.numel() * flat.element_size()
            y = flat.as_strided((rows, width), (stride, 1))
            ys.append(y)
            try:
                _check(y, exact, error)
                between = flat.as_strided((rows - 1, case.pad), (stride, 1), width)
                assert between.isnan().all(), "written beside a row"
            except AssertionError as failure:
                raise AssertionError(f"{case}: {failure}") from None
        if case.launch == "dependent":
            assert all(torch.equal(a, b) for a, b in zip(ys, before, strict=True)), f"{case}: the launches differ"
        before = ys
        several = "gated" if case.act else "group" if len(members) > 1 else "single"
        form = "pivoted " * (case.pivot is not None) + several
        seen.update(
            {
                ("matrix unit", bool(matrix_unit), form),
                ("several splits", splits > 1, form),
                ("u prefetched", prefetched > 0, form),
                ("intermediate in pieces", capacity < max(rank for rank, _ in case.members), form),
                ("tiles at a time", tile_warps),
                ("blocks that begin inside of a tile", bool(uneven), form),
            }
        )
    assert at == len(data)
    # The cases must have reached every way through the kernels.
    ways = ("matrix unit", "several splits", "u prefetched", "intermediate in pieces")
    ways += ("blocks that begin inside of a tile",)
    forms = ("single", "group", "gated", "pivoted single", "pivoted group")
    missing = {(way, value, form) for way in ways for value in (True, False) for form in forms} - seen
    missing |= {("tiles at a time", n) for n in (1, 2, 4, 8)} - seen
    assert not missing, f"no case covers {missing}"
