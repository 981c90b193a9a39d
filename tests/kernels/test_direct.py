"""Direct calls: the same bits as the ordinary way, and the ordinary way whenever anything asks for the dispatcher."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_within, bound, linear_exact, random

import taco_kernels
from taco_kernels import direct, dispatch, native
from taco_kernels.low_rank_bridge import low_rank_bridge
from taco_kernels.low_rank_linear import low_rank_linear
from taco_kernels.low_rank_linear_group import low_rank_linear_group
from taco_kernels.low_rank_mlp import _fused_rows, low_rank_mlp
from taco_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear

pytestmark = pytest.mark.skipif(not direct.usable, reason=f"direct calls: {direct.reason}")

OPS = ("low_rank_linear", "low_rank_bridge", "low_rank_linear_group", "low_rank_mlp", "pivoted_low_rank_linear")


def entry(op: str) -> Any:
    return importlib.import_module(f"taco_kernels.{op}")._direct


def arguments(op: str, lead: tuple[int, ...], dtype: torch.dtype, optional: bool = True, rank: int = 5) -> tuple:
    """What `entry(op)` takes, of small odd sizes."""

    def some(*shape: int) -> Any:
        return random(shape, dtype) if optional else None

    width, out = 23, 19
    x = random((*lead, width), dtype)
    if op == "low_rank_linear":
        return x, random((rank, width), dtype), random((out, rank), dtype), some(out), some(*lead, out)
    if op == "low_rank_bridge":
        return x, random((rank, width), dtype), random((width, rank), dtype), some(width), 1e-5
    if op == "pivoted_low_rank_linear":
        pivot = torch.randperm(width).to(torch.int32 if optional else torch.int64)
        factors = random((rank, width - rank), dtype), random((out, rank), dtype)
        return x, *factors, pivot, some(out), some(*lead, out)
    if op == "low_rank_linear_group":
        ranks, outs = (rank, 1, 2 * rank), (out, 7, 1)
        vs = [random((r, width), dtype) for r in ranks]
        us = [random((o, r), dtype) for r, o in zip(ranks, outs, strict=True)]
        return x, vs, us, [some(o) for o in outs]
    gate, up = ((random((rank, width), dtype), random((out, rank), dtype), some(out)) for _ in range(2))
    down = random((rank, out), dtype), random((11, rank), dtype), some(11)
    return x, *gate, *up, *down, "gelu" if optional else "silu"


def call(op: str, *args: Any) -> Any:
    """The public function on the same arguments."""
    if op == "low_rank_mlp":
        x, *flat, act = args
        return low_rank_mlp(x, tuple(flat[:3]), tuple(flat[3:6]), tuple(flat[6:]), act)
    functions = {
        "low_rank_linear": low_rank_linear,
        "low_rank_bridge": low_rank_bridge,
        "low_rank_linear_group": low_rank_linear_group,
        "pivoted_low_rank_linear": pivoted_low_rank_linear,
    }
    return functions[op](*args)


def tensors(result: Any) -> list[torch.Tensor]:
    return result if isinstance(result, list) else [result]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("optional", [True, False], ids=["everything", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@settings(max_examples=8, deadline=None)
@given(lead=st.sampled_from([(), (1,), (4,), (1, 1), (2, 3), (1, 2, 2, 1)]), rank=st.integers(1, 9))
def test_the_bits_of_the_ordinary_way(
    op: str, dtype: torch.dtype, optional: bool, lead: tuple[int, ...], rank: int
) -> None:
    args = arguments(op, lead, dtype, optional, rank)
    ours = entry(op)(*args)
    if op == "low_rank_mlp" and not dispatch.within(_fused_rows(dtype), 2 * rank, math.prod(lead)):
        assert ours is None  # so many are for other kernels, whose calls are not direct
        return
    with taco_kernels.use_backend("cpp"):
        ordinary = call(op, *args)
    assert isinstance(ours, list if op == "low_rank_linear_group" else torch.Tensor)
    for a, b in zip(tensors(ours), tensors(ordinary), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        assert a.is_contiguous() and not a.requires_grad
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype) -> None:
    args = arguments("low_rank_linear", (3, 2), dtype)
    exact, magnitude = linear_exact(*args)
    assert_within(entry("low_rank_linear")(*args), exact, bound(exact, magnitude, 23 + 5, dtype, "cpp"))


@pytest.mark.parametrize("op", OPS)
def test_the_public_function_and_the_op_take_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(op, (2,), torch.float32)
    marks: list[str] = []

    def marked(*given: Any) -> Any:
        marks.append(op)
        return function(*given)

    function = entry(op)
    monkeypatch.setattr(importlib.import_module(f"taco_kernels.{op}"), "_direct", marked)
    call(op, *args)
    assert marks == [op]
    getattr(torch.ops.taco_kernels, op).default(*args)
    assert marks == [op, op]


@pytest.mark.parametrize("rows", ["few", "many"])
def test_rows_as_the_dispatcher_counts_them(rows: str) -> None:
    for op in OPS:
        limit = dispatch.CPU_MAX_ROWS[torch.float32]
        if op == "low_rank_mlp":
            limit = _fused_rows(torch.float32)[-1][1]
        found = entry(op)(*arguments(op, (limit + (rows == "many"),), torch.float32))
        many = None if op == "low_rank_mlp" else False  # an MLP of many rows is composed of its maps
        assert found is many if rows == "many" else isinstance(found, list | torch.Tensor)


@pytest.mark.parametrize("way", ["object", "handle"])
def test_rows_count_by_the_thread(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit they are ours again where each thread has enough; asked from Python and from compiled code."""
    if way == "handle" and not direct._registered.get("low_rank_linear"):
        pytest.skip("this torch does not offer what kernels registered from C++ need")
    limits = dispatch.cpu_rows(torch.float32)
    handed_on: list[torch.Tensor] = []  # by the kernel that compiled code calls, to the ordinary one
    module = importlib.import_module("taco_kernels.low_rank_linear")
    monkeypatch.setattr(module, "_direct", lambda x, *_: handed_on.append(x))
    code, before = dispatch.CPP_DTYPES[torch.float32], torch.get_num_threads()
    try:
        native.module.direct_limit("low_rank_linear", code, ((6, 4, 10), (0, 2, dispatch.ANY)))
        for threads, rows, rank in itertools.product((1, 2, 3), (4, 5, 9, 10, 19, 20, 29, 30, 31), (5, 6)):
            torch.set_num_threads(threads)
            ours = rank == 6 and (rows <= 4 or rows >= 10 * threads)
            args = arguments("low_rank_linear", (rows,), torch.float32, rank=rank)
            if way == "object":
                found = native.module.direct_low_rank_linear(*args)
                assert isinstance(found, torch.Tensor) if ours else found is False
            else:
                torch.ops.taco_kernels.low_rank_linear_native(*args)
                assert len(handed_on) == (0 if ours else 1)
                handed_on.clear()
    finally:
        torch.set_num_threads(before)
        native.module.direct_limit("low_rank_linear", code, limits)


@pytest.mark.parametrize("op", OPS)
def test_many_rows_are_the_librarys(op: str) -> None:
    args = arguments(op, (dispatch.CPU_MAX_ROWS[torch.float32] + 3,), torch.float32)
    with taco_kernels.use_backend("library"):
        expected = call(op, *args)
    for a, b in zip(tensors(call(op, *args)), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, rows twice as far apart."""
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def test_strides() -> None:
    x, v, u, bias, residual = arguments("low_rank_linear", (2, 3), torch.float32)
    function = entry("low_rank_linear")
    expected = function(x, v, u, bias, residual)
    for args in (
        (strided(x), v, u, bias, residual),
        (x, strided(v), strided(u), bias, residual),
        (x, v, u, bias, strided(residual)),
    ):
        torch.testing.assert_close(function(*args), expected, rtol=0, atol=0)
    one = x[:1].expand(4, 3, 23)  # rows that lie on top of each other, but evenly only within a window
    assert function(one, v, u, None, None) is None
    assert function(x.transpose(0, 1), v, u, None, None) is None
    assert function(x, v.T.contiguous().T, u, None, None) is None
    assert function(x, v, u.T.contiguous().T, None, None) is None
    assert function(x, v, u, random((2 * 19,), torch.float32)[::2], None) is None
    # and all of them come out right
    for args in ((one, v, u), (x.transpose(0, 1), v, u), (x, v.T.contiguous().T, u)):
        exact, magnitude = linear_exact(*args, None, None)
        limit = bound(exact, magnitude, 28, torch.float32, "library")
        assert_within(low_rank_linear(*args), exact, limit)


class Sub(torch.Tensor):
    """A subclass that does nothing."""


@contextlib.contextmanager
def profiling() -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        yield


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


CONTEXTS = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Mode,
    "function mode": FunctionMode,
    "default device": lambda: torch.device("cpu"),
    "profiler": profiling,
    "forward mode": torch.autograd.forward_ad.dual_level,
    "forced backend": lambda: taco_kernels.use_backend("reference"),
    "fake tensors": lambda: torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CONTEXTS)
def test_what_asks_for_the_dispatcher(name: str, op: str) -> None:
    args = arguments(op, (2,), torch.float32)
    assert entry(op)(*args) is not None
    with CONTEXTS[name]():
        assert entry(op)(*args) is None
    assert entry(op)(*args) is not None


def test_a_dispatch_mode_sees_the_op() -> None:
    args = arguments("low_rank_linear", (2,), torch.float32)
    with Mode() as mode:
        low_rank_linear(*args)
    assert mode.seen == ["taco_kernels.low_rank_linear.default"]


def test_a_profiler_sees_the_op() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        low_rank_linear(*arguments("low_rank_linear", (2,), torch.float32))
    assert "taco_kernels::low_rank_linear" in [event.key for event in profiler.key_averages()]


def test_a_trace_holds_the_op() -> None:
    x, v, u, _, _ = arguments("low_rank_linear", (2,), torch.float32)
    traced = torch.jit.trace(lambda rows: low_rank_linear(rows, v, u), x)
    assert "taco_kernels::low_rank_linear" in str(traced.graph)
    other = random((2, 23), torch.float32)
    torch.testing.assert_close(traced(other), low_rank_linear(other, v, u))


def test_transforms() -> None:
    x, v, u, _, _ = arguments("low_rank_linear", (4, 2), torch.float32)
    seen = []
    rows = torch.func.vmap(lambda part: (seen.append(entry("low_rank_linear")(part, v, u, None, None)), part)[1])(x)
    assert seen == [None] and rows is not None
    torch.testing.assert_close(torch.func.vmap(lambda part: low_rank_linear(part, v, u))(x), low_rank_linear(x, v, u))


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4])
def test_tensors_that_are_not_plain(position: int) -> None:
    args = arguments("low_rank_linear", (2,), torch.float32)
    function = entry("low_rank_linear")
    freed = args[position].clone()
    freed.untyped_storage().resize_(0)
    for other in (
        args[position].as_subclass(Sub),
        args[position].to("meta"),
        args[position].to_sparse(),
        args[position].double(),
        args[position].half(),
        args[position].int(),
        args[position][..., None],
        args[position][..., :0],
        torch.complex(args[position], args[position]).conj().imag,  # its data have the other sign
        freed,
        args[position].tolist(),
        None if position < 3 else 1.0,
    ):
        assert function(*args[:position], other, *args[position + 1 :]) is None
    parameter = torch.nn.Parameter(args[position])
    assert function(*args[:position], parameter, *args[position + 1 :]) is not None


def test_conjugates_come_out_right() -> None:
    x, v, u, _, _ = arguments("low_rank_linear", (2,), torch.float32)
    complex_x = torch.complex(x, x)
    torch.testing.assert_close(low_rank_linear(complex_x.conj().imag, v, u), low_rank_linear(-x, v, u))


def test_conjugates_with_a_dimension_added_come_out_right() -> None:
    """Of one element, its stride is 1 whatever lies between the data's elements."""

    def negated(t: torch.Tensor) -> torch.Tensor:
        view = torch.complex(t, t).squeeze(-1).conj().imag.unsqueeze(-1)
        assert view.is_neg() and view.stride(-1) == 1
        return view

    column, one = random((6, 1), torch.float32), random((1,), torch.float32)
    x, v = random((3, 5), torch.float32), random((1, 5), torch.float32)
    function = entry("low_rank_linear")
    torch.testing.assert_close(low_rank_linear(negated(column), one[None], column), -column @ one[None] @ column.T)
    torch.testing.assert_close(low_rank_linear(x, v, negated(column)), -x @ v.T @ column.T)
    torch.testing.assert_close(low_rank_linear(x, v, one[None], negated(one)), x @ v.T * one - one)
    assert function(x, v, column, None, None) is not None and function(x, v, negated(column), None, None) is None


@pytest.mark.parametrize("op", OPS)
def test_wrong_calls_are_nobodys(op: str) -> None:
    args = arguments(op, (2,), torch.float32)
    function = entry(op)
    assert function(*args[:-1]) is None and function() is None and function(*args, None) is None
    assert function(random((2, 22), torch.float32), *args[1:]) is None
    if op == "low_rank_mlp":
        assert function(*args[:-1], "swish") is None and function(*args[:-1], 3) is None
    elif op == "low_rank_bridge":
        assert function(*args[:-1], 1) is None and function(*args[:-1], None) is None
    elif op == "low_rank_linear_group":
        assert function(args[0], args[1][:-1], *args[2:]) is None and function(args[0], [], [], []) is None
        assert function(args[0], *(9 * part for part in args[1:])) is None  # more members than it counts
        assert function(args[0], args[0], *args[2:]) is None
        assert torch.equal(function(args[0], *map(tuple, args[1:]))[0], function(*args)[0])
    else:
        assert function(*args[:-1], random((3, 19), torch.float32)) is None


@pytest.mark.parametrize("bad", [-1, 23, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_pivot_out_of_range_is_an_index_error(dtype: torch.dtype, bad: int) -> None:
    x, v, u, pivot, bias, residual = arguments("pivoted_low_rank_linear", (2,), torch.float32)
    pivot = pivot.to(dtype)
    pivot[4] = bad
    with pytest.raises(IndexError, match="pivot"):
        pivoted_low_rank_linear(x, v, u, pivot, bias, residual)
    assert entry("pivoted_low_rank_linear")(x, v, u, pivot.short(), bias, residual) is None


def test_no_memory_is_torchs_error() -> None:
    x, v, _, _, _ = arguments("low_rank_linear", (2,), torch.float32)
    with pytest.raises(RuntimeError, match="memory|overflow|storage"):
        low_rank_linear(x, v, torch.zeros(1, 5).expand(2**60, 5))


def test_results_are_inference_tensors_where_such_are_made() -> None:
    args = arguments("low_rank_linear", (2,), torch.float32)
    with torch.inference_mode():
        assert entry("low_rank_linear")(*args).is_inference()
    result = entry("low_rank_linear")(*args)
    assert not result.is_inference()
    result.add_(1)
    assert result._version == 1 and result.numpy().shape == (2, 19)


def test_results_take_part_in_later_gradients() -> None:
    result = entry("low_rank_linear")(*arguments("low_rank_linear", (2,), torch.float32))
    with torch.enable_grad():
        weight = torch.ones(19, requires_grad=True)
        (result * weight).sum().backward()
    torch.testing.assert_close(weight.grad, result.sum(0))


def test_forcing_and_releasing_a_backend() -> None:
    args = arguments("low_rank_linear", (2,), torch.float32)
    before = taco_kernels.get_backend()
    taco_kernels.set_backend("cpp")
    try:
        assert entry("low_rank_linear")(*args) is None
    finally:
        taco_kernels.set_backend(before)
    assert entry("low_rank_linear")(*args) is not None


def test_nothing_is_leaked() -> None:
    for op in OPS:
        args = arguments(op, (2,), torch.float32)
        held = [t for t in args if isinstance(t, torch.Tensor)]
        counts = [sys.getrefcount(t) for t in held]
        results = [weakref.ref(result) for _ in range(20) for result in tensors(entry(op)(*args))]
        assert [sys.getrefcount(t) for t in held] == counts
        # the last one is the loop's own
        assert not any(result() is not None for result in results[:-1])


def test_many_threads_at_once() -> None:
    args = arguments("pivoted_low_rank_linear", (3,), torch.bfloat16)
    with torch.no_grad():
        expected = pivoted_low_rank_linear(*args)
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():  # per thread
            for number in range(200):
                if not torch.equal(entry("pivoted_low_rank_linear")(*args), expected):
                    wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def _no_switching() -> Iterator[None]:
    """A thread keeps the interpreter's lock until it gives it up itself, which the calls under test do in a kernel."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(600)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_no_switching")
def test_lists_that_change_while_a_group_is_computed() -> None:
    """Without the interpreter's lock another thread may empty them; what was in them must outlive the kernel."""
    x, call = torch.randn(64, 2048), entry("low_rank_linear_group")
    for _ in range(20):  # on a busy machine a kernel may be over before this thread gets a turn
        factors = [[torch.randn(256, 2048) for _ in range(4)], [torch.randn(2048, 256) for _ in range(4)]]
        tensors = [weakref.ref(t) for part in factors for t in part]
        begun, results = threading.Event(), []

        def work(
            factors: list[list[torch.Tensor]] = factors, begun: threading.Event = begun, results: list[Any] = results
        ) -> None:
            with torch.no_grad():
                begun.set()
                results.append(call(x, *factors, [None] * 4))

        thread = threading.Thread(target=work)
        thread.start()
        if begun.is_set():
            for part in factors:
                part.clear()
        alive = [t() is not None for t in tensors]
        begun_and_not_over = begun.is_set() and not results
        thread.join()
        if begun_and_not_over and results[0] is not None:
            assert all(alive)
            return
    pytest.fail("no call was met while its kernel ran")


def test_setup_refuses_nonsense() -> None:
    with pytest.raises(TypeError):
        native.module.direct_setup(1, 2, 3)
    with pytest.raises(ValueError, match="no such op"):
        native.module.direct_limit("low_rank", 0, ())
    with pytest.raises(ValueError, match="no such op"):
        native.module.direct_limit("low_rank_mlp", 3, ())
    with pytest.raises(TypeError):
        native.module.direct_limit("low_rank_linear", 0, (1,))
    with pytest.raises(TypeError):
        native.module.direct_limit("low_rank_linear", 0, ((1, 2),))


def test_without_the_extension_or_the_interface_everything_is_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "usable", False)
    assert direct.entry("low_rank_linear", dispatch.cpu_rows)(1, 2, 3) is None
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "extension was not built (test)")
    assert direct._setup() == "extension was not built (test)"


def test_a_torch_without_the_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_GUARDS", ("is_grad_enabled", "no_such_function"))
    assert "does not offer" in direct._setup()
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert "does not offer" in direct._setup()


@pytest.mark.parametrize("form", [12345, "text"])
def test_another_form_of_the_interface_is_named(form: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", form)
    assert "in another form" in direct._setup()


def test_the_switch() -> None:
    code = """
import torch, taco_kernels
from taco_kernels import direct, env
with torch.no_grad():
    y = taco_kernels.low_rank_linear(torch.ones(1, 4), torch.ones(2, 4), torch.ones(3, 2))
print(direct.usable, y.tolist(), env.report()["direct_calls"])
"""
    environment = {**os.environ, "TACO_DIRECT": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False [[8.0, 8.0, 8.0]] turned off by TACO_DIRECT=0"
