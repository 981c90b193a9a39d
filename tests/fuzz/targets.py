"""What is fuzzed, as functions of bytes: hypothesis draws the bytes in the test suite, atheris steers them by coverage.

A target returns whether its input was accepted. It may raise the documented errors inside; anything else that comes
out of it is a finding.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import taco_kernels
from taco_kernels import native
from taco_kernels.low_rank_bridge import low_rank_bridge_reference
from taco_kernels.low_rank_linear import low_rank_linear_reference
from taco_kernels.low_rank_linear_concat import low_rank_linear_concat_reference
from taco_kernels.low_rank_linear_group import low_rank_linear_group_reference
from taco_kernels.low_rank_linear_int8 import low_rank_linear_int8_reference
from taco_kernels.low_rank_mlp import low_rank_mlp_reference
from taco_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear_reference
from taco_svd import Plan, Structure, TacoError
from taco_svd.calibration import tokenize
from taco_svd.checksums import read_checksums
from taco_svd.modeling import TacoSVDConfig
from taco_svd.texts import named_text
from taco_svd.untrusted import check_headers, parse_json, refuse_foreign_code

# What an op may raise for arguments that do not fit. RuntimeError: torch itself, for layouts and devices.
OP_ERRORS = (TypeError, ValueError, RuntimeError, IndexError)


class Source:
    """Draws choices from bytes; zeros once they are used up, so that every string of bytes is a case."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1] if self.position <= len(self.data) else 0

    def below(self, limit: int) -> int:
        return self.byte() % limit

    def pick(self, values: Any) -> Any:
        return values[self.below(len(values))]


# -- records -----------------------------------------------------------------------------------------------------


def json_text(data: bytes) -> bool:
    """The strict JSON reader: whatever it accepts, Python's reader reads the same way."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    try:
        value = parse_json(text, "the text")
    except TacoError:
        return False
    assert value == json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return True


def structure_text(data: bytes) -> bool:
    """A structure: refused, or read back from what it writes as the same structure."""
    try:
        found = Structure.from_dict(parse_json(data.decode("utf-8", "replace"), "the structure"))
    except TacoError:
        return False
    assert Structure.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    return True


def plan_text(data: bytes) -> bool:
    """A plan: refused, or shown and written without an error."""
    from rich.console import Console

    from taco_svd.report import info_table

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "taco_plan.json")
        path.write_bytes(data)
        try:
            plan = Plan.load(path)
        except TacoError:
            return False
        from taco_svd.checkpoint import describe

        with open("/dev/null", "w", encoding="utf-8") as sink:
            Console(file=sink, markup=False, width=140).print(info_table(describe(folder)))
        plan.save(Path(folder, "again.json"))
        assert Plan.load(Path(folder, "again.json")) == plan
    return True


def config_text(data: bytes) -> bool:
    """A compressed model's config: refused, or a config whose structure is sound."""
    try:
        values = parse_json(data.decode("utf-8", "replace"), "config.json", constants=True)
        if not isinstance(values, dict):
            return False
        refuse_foreign_code(values, "config.json")
        config = TacoSVDConfig.from_dict(values)
    except TacoError:
        return False
    assert isinstance(config.structure, Structure)
    return True


def shard_bytes(data: bytes) -> bool:
    """A weight file's header: refused, or a list of tensors no larger than the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(data)
        try:
            stored = check_headers([path], None)
        except TacoError:
            return False
    # the smallest dtypes of the format hold two numbers in a byte
    assert sum(math.prod(shape) for shape in stored.values()) <= 2 * len(data)
    return True


def shard_header(data: bytes) -> bool:
    """As `shard_bytes`, with the header's length put right, so that the fuzzer need not find it."""
    return shard_bytes(struct.pack("<Q", len(data)) + data + bytes(64))


def checksums_text(data: bytes) -> bool:
    """A list of checksums: refused, or a map of names of files to texts."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "taco_checksums.json").write_bytes(data)
        try:
            found = read_checksums(Path(folder))
        except TacoError:
            return False
    assert all("/" not in name for name in found)
    return True


# -- ops ---------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WRONG_DTYPES = (torch.int64, torch.int32, torch.complex64, torch.bool, torch.uint8)
SIDES = (1, 2, 3, 0, 5, 7, 8, 15, 16, 17, 31, 33)


def _layout(source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of this shape, in one of many layouts, framed by NaNs where that is possible: reading beside it shows."""
    kind = source.below(9)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    seed = torch.Generator().manual_seed(source.byte())
    plain = torch.randn(shape, generator=seed, dtype=torch.float64).to(dtype)
    if kind == 1 and shape:  # a window of something larger
        frame = torch.full([side + 4 for side in shape], float("nan"), dtype=dtype)
        window = frame[tuple(slice(2, 2 + side) for side in shape)]
        window.copy_(plain)
        return window
    if kind == 2 and len(shape) >= 2:  # transposed in memory
        return plain.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == 3 and shape:  # one row for all
        return plain[..., :1].expand(shape) if shape[-1] else plain
    if kind == 4 and shape:  # every other element
        wide = torch.full((*shape[:-1], 2 * shape[-1]), float("nan"), dtype=dtype)
        wide[..., ::2] = plain
        return wide[..., ::2]
    if kind == 5 and dtype in (torch.float32, torch.float64):  # lazily negated
        return torch.complex(plain, -plain).conj().imag
    if kind == 6 and len(shape) == 2 and shape[0]:  # overlapping rows
        rows, columns = shape
        return plain.new_empty(rows + columns).normal_(generator=seed).as_strided(shape, (1, 1))
    if kind == 7:  # off any alignment
        flat = torch.empty(plain.numel() + 1, dtype=dtype)[1:]
        return flat.copy_(plain.reshape(-1)).view(shape)
    return plain


def _tensor(source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Mostly a tensor as wanted; now and then of another shape, dtype, device or layout, or no tensor at all."""
    wrong = source.below(24)
    if wrong == 1:
        shape = (*shape, source.pick(SIDES))
    elif wrong == 2:
        shape = shape[1:]
    elif wrong == 3:
        shape = tuple(source.pick(SIDES) for _ in shape)
    elif wrong == 4:
        dtype = source.pick(DTYPES)
    elif wrong == 5:
        dtype = source.pick(WRONG_DTYPES)
    elif wrong == 6:
        return torch.empty(shape, dtype=dtype, device="meta")
    elif wrong == 7:
        return torch.zeros(shape, dtype=dtype).to_sparse() if dtype.is_floating_point else None
    elif wrong == 8:
        return source.pick((None, 3, "x", [1.0], torch.tensor(1.0)))
    elif wrong == 9:  # larger than memory, without a byte of it
        return torch.zeros((), dtype=dtype).expand((1 << 40, *shape[1:]) if shape else ())
    return _layout(source, shape, dtype)


def _factors(source: Source, width: int, out: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    rank = source.pick(SIDES)
    bias = _tensor(source, (out,), dtype) if source.below(2) else None
    return _tensor(source, (rank, width), dtype), _tensor(source, (out, rank), dtype), bias


def _integers(source: Source, shape: tuple[int, ...]) -> Any:
    """A factor of 8-bit integers in one of several layouts; now and then of another shape or dtype."""
    wrong = source.below(16)
    if wrong == 1:
        return _tensor(source, shape, torch.int8)
    if wrong == 2:
        return _tensor(source, shape, torch.float32)
    if wrong == 3:
        shape = tuple(source.pick(SIDES) for _ in shape)
    plain = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(source.byte()), dtype=torch.int8)
    kind = source.below(4)
    if kind == 1:  # a window of something larger
        frame = torch.full([side + 4 for side in shape], 127, dtype=torch.int8)
        window = frame[2 : 2 + shape[0], 2 : 2 + shape[1]]
        window.copy_(plain)
        return window
    if kind == 2:  # transposed in memory
        return plain.T.contiguous().T
    if kind == 3:  # one column for all
        return plain[:, :1].expand(shape) if shape[1] else plain
    return plain


def _pivoted(source: Source, width: int, out: int, dtype: torch.dtype) -> tuple[Any, Any, Any, Any, bool]:
    """v, u, bias and pivot of a member, and whether the pivot is a permutation."""
    rank = min(source.pick(SIDES), width)
    v, u = _tensor(source, (rank, width - rank), dtype), _tensor(source, (out, rank), dtype)
    pivot = torch.randperm(width, generator=torch.Generator().manual_seed(source.byte()), dtype=torch.int32)
    wrong = source.below(6)
    if wrong == 1:
        pivot = pivot.long() + source.pick((1, -1, 1 << 40))
    elif wrong == 2:
        pivot = _tensor(source, (width,), torch.int32)
    bias = _tensor(source, (out,), dtype) if source.below(2) else None
    return v, u, bias, pivot, wrong not in (1, 2)


def _concat(source: Source, x: Any, width: int, dtype: torch.dtype) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    members, sound = [], True
    for _ in range(source.below(4)):
        if source.below(2):
            *member, is_permutation = _pivoted(source, width, source.pick(SIDES), dtype)
            sound = sound and is_permutation
        else:
            member = [*_factors(source, width, source.pick(SIDES), dtype), None]
        members.append(member)
    vs, us, biases, pivots = ([member[i] for member in members] for i in range(4))
    if source.below(8) == 1:
        us = us[1:]
    reference = low_rank_linear_concat_reference if sound else None
    return taco_kernels.low_rank_linear_concat, reference, (x, vs, us, biases, pivots)


def _leading(source: Source) -> tuple[int, ...]:
    return tuple(source.pick((1, 2, 0, 3, 6, 9, 17)) for _ in range(source.below(3)))


def _arguments(source: Source) -> tuple[Callable[..., Any], Callable[..., Any] | None, tuple[Any, ...]]:
    """(op, its reference or None, arguments)."""
    dtype = source.pick(DTYPES)
    width, out = source.pick(SIDES), source.pick(SIDES)
    lead = _leading(source)
    x = _tensor(source, (*lead, width), dtype)
    choice = source.byte()
    # the kept corpus goes on meaning what it meant: the ninth op has the upper end of the bytes
    op = 8 if choice >= 224 else choice % 8
    if op == 0:
        v, u, bias = _factors(source, width, out, dtype)
        residual = _tensor(source, (*lead, out), dtype) if source.below(2) else None
        return taco_kernels.low_rank_linear, low_rank_linear_reference, (x, v, u, bias, residual)
    if op == 1:
        v, u, bias = _factors(source, width, width, dtype)
        eps = source.pick((1e-6, 1e-6, 0.0, 1.0, -1.0, float("nan"), float("inf"), "x", None))
        return taco_kernels.low_rank_bridge, low_rank_bridge_reference, (x, v, u, bias, eps)
    if op == 2:
        members = [_factors(source, width, source.pick(SIDES), dtype) for _ in range(source.below(4))]
        vs, us, biases = ([member[i] for member in members] for i in range(3))
        if source.below(8) == 1:
            us = us[1:]
        return taco_kernels.low_rank_linear_group, low_rank_linear_group_reference, (x, vs, us, biases)
    if op == 3:
        middle = source.pick(SIDES)
        gate, up = (_factors(source, width, middle, dtype) for _ in range(2))
        down = _factors(source, middle, out, dtype)
        act = source.pick(("silu", "gelu", "gelu_tanh", "relu", "x", None))
        return taco_kernels.low_rank_mlp, low_rank_mlp_reference, (x, gate, up, down, act)
    if op == 4:
        v, u, bias, pivot, is_permutation = _pivoted(source, width, out, dtype)
        residual = _tensor(source, (*lead, out), dtype) if source.below(2) else None
        reference = pivoted_low_rank_linear_reference if is_permutation else None
        return taco_kernels.pivoted_low_rank_linear, reference, (x, v, u, pivot, bias, residual)
    if op == 5:
        directions = source.pick(SIDES)
        grad = _tensor(source, (*lead, out), dtype)
        u, v = _tensor(source, (out, directions), dtype), _tensor(source, (directions, width), dtype)
        return taco_kernels.singular_attribution, None, (x, grad, u, v)
    if op == 6:
        rank = min(source.pick(SIDES), width)
        pivoted = bool(source.below(2))
        v, u = _integers(source, (rank, width - rank if pivoted else width)), _integers(source, (out, rank))
        scales = [_tensor(source, (rank,), torch.float32) for _ in range(2)]
        pivot = torch.randperm(width, generator=torch.Generator().manual_seed(source.byte()))
        wrong = source.below(6)
        if wrong == 1:
            pivot = pivot + source.pick((1, -1, 1 << 40))
        bias = _tensor(source, (out,), dtype) if source.below(2) else None
        order = pivot.to(source.pick((torch.int32, torch.int64))) if pivoted else None
        reference = None if pivoted and wrong == 1 else low_rank_linear_int8_reference
        return taco_kernels.low_rank_linear_int8, reference, (x, v, scales[0], u, scales[1], bias, order)
    if op == 8:
        return _concat(source, x, width, dtype)
    rank = source.pick((1, 2, 0, 3, -1, 8, 1 << 40, None, "x"))
    left = _tensor(source, (source.pick(SIDES), out), dtype) if source.below(2) else None
    matrix = _tensor(source, (out, width), dtype)
    return taco_kernels.randomized_svd, None, (matrix, rank, source.pick((None, 0, 4, -1)), 1, left)


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.device.type == "cpu" and value.layout == torch.strided and bool(value.isfinite().all())
    if isinstance(value, (list, tuple)):
        return all(_finite(item) for item in value)
    # a root of what is negative or no number has no one answer
    return value is None or isinstance(value, str) or (isinstance(value, (int, float)) and 0 <= value < math.inf)


def _huge(value: Any) -> bool:
    """Whether an argument spans more than memory has: such a call may run out of memory, and that is its answer."""
    if isinstance(value, (list, tuple)):
        return any(_huge(item) for item in value)
    return isinstance(value, Tensor) and max([value.numel(), *value.shape]) > 1 << 24


def _absolute(value: Any) -> Any:
    """An argument with all signs taken away: what the op makes of these is what its rounding errors go by."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_absolute, value))
    return (
        value.abs() if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.int8) else value
    )


def _same(found: Any, wanted: Any, magnitude: Any, dtype: torch.dtype) -> None:
    if isinstance(found, (list, tuple)):
        for parts in zip(found, wanted, magnitude, strict=True):
            _same(*parts, dtype)
        return
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if not bool(wanted.isfinite().all()):
        return
    # a coarse bound, for gross errors (a read beside the data): the ops' own tests have the derived one
    scale = (
        float(torch.maximum(wanted.abs(), magnitude.abs()).nan_to_num(nan=torch.inf).max()) if wanted.numel() else 0.0
    )
    slack = 1e-3 if dtype in (torch.float32, torch.float64) else 0.2
    assert bool(((found.double() - wanted.double()).abs() <= slack * (1 + scale)).all()), "result is off"


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    made.chat_template = "{{ bos_token }}{% for turn in messages %}{{ turn.role + turn.content + '</s>' }}{% endfor %}"
    return made


def documents_text(data: bytes) -> bool:
    """Lines of documents: refused in one printable sentence, or a text that the tokenizer takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.jsonl")
        path.write_bytes(data)
        try:
            text = named_text(path, _tokenizer(), test=False).text
        except TacoError as error:
            text, said = "", str(error)
    if not text:
        assert said.isprintable()
        return False
    assert text.strip() and tokenize(text, _tokenizer()).dtype == torch.int64
    return True


def op_call(data: bytes) -> bool:
    """One op with drawn arguments: the documented errors, or the reference's numbers."""
    source = Source(data)
    backends = ["library", "reference", *(["cpp"] if native.module is not None else [])]
    backend = source.pick(backends)
    op, reference, arguments = _arguments(source)
    if _huge(arguments):
        arguments = tuple(a.to("meta") if isinstance(a, Tensor) and a.layout == torch.strided else a for a in arguments)
        reference = None
    try:
        with taco_kernels.use_backend(backend), torch.no_grad():
            found = op(*arguments)
    except OP_ERRORS:
        return False
    if reference is not None and isinstance(arguments[0], Tensor) and _finite(arguments):
        signless = reference(*map(_absolute, arguments))
        _same(found, reference(*arguments), signless, arguments[0].dtype)
    return True


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "json": json_text,
    "structure": structure_text,
    "plan": plan_text,
    "config": config_text,
    "shard": shard_bytes,
    "header": shard_header,
    "checksums": checksums_text,
    "documents": documents_text,
    "ops": op_call,
}
