"""The twins ``<op>_native`` that compiled code calls: the ordinary op's bits, and when they are called at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, random
from test_direct import arguments, call, tensors

import taco_kernels
from taco_kernels import direct, dispatch

OPS = ("low_rank_linear", "low_rank_bridge", "low_rank_linear_group", "pivoted_low_rank_linear")
needs_kernels = pytest.mark.skipif(
    not direct._registered, reason=f"no native kernels: {direct.reason or 'not offered by torch'}"
)


def native(op: str) -> Any:
    return getattr(torch.ops.taco_kernels, f"{op}_native").default


def ordinary(op: str) -> Any:
    return getattr(torch.ops.taco_kernels, op).default


def called_in(function: Callable[..., Any], *args: Any) -> list[str]:
    """Names of the ops in what `torch.compile` makes of a function."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target).split(".")[1] for node in graph.graph.nodes if "taco_kernels." in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return seen


@needs_kernels
def test_every_op_has_its_kernel() -> None:
    assert direct._registered == dict.fromkeys(OPS, True)
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"taco_kernels::{op}_native", "CPU")


@settings(deadline=None, max_examples=40)
@given(
    op=st.sampled_from(OPS),
    lead=st.sampled_from([(), (1,), (2, 3), (16,), (1, 1, 5), (700,), (2, 1, 1, 1, 1, 1, 1, 1), (0,), (3, 0)]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    optional=st.booleans(),
    rank=st.integers(1, 9),
)
def test_same_bits_as_the_ordinary_op(
    op: str, lead: tuple[int, ...], dtype: torch.dtype, optional: bool, rank: int
) -> None:
    """Many rows, no rows, more dimensions than are taken over, a dtype without kernels: the ordinary op then serves."""
    args = arguments(op, lead, dtype, optional, rank)
    with torch.no_grad():
        pairs = zip(tensors(native(op)(*args)), tensors(ordinary(op)(*args)), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs(op: str) -> None:
    x, *rest = arguments(op, (4, 3), torch.float32)
    wide = random((4, 6, 2 * x.shape[-1]), torch.float32)
    with torch.no_grad():
        for view in (wide[:, ::2, : x.shape[-1]], wide[:, :3, ::2], wide.transpose(0, 1)[:4, :3, : x.shape[-1]]):
            pairs = zip(tensors(native(op)(view, *rest)), tensors(ordinary(op)(view, *rest)), strict=True)
            for ours, theirs in pairs:
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(native(op), arguments(op, (2, 3), torch.float32))


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_compiled_code_calls_it_where_no_gradient_is_asked_for(op: str) -> None:
    args = arguments(op, (2, 3), torch.float32)

    def function(x: Any) -> Any:
        return call(op, x, *args[1:])

    with torch.no_grad():
        assert called_in(function, args[0]) == [f"{op}_native"]
        torch._dynamo.reset()
        results = tensors(torch.compile(function, fullgraph=True)(args[0]))
        for ours, plain in zip(results, tensors(function(args[0])), strict=True):
            assert torch.equal(ours, plain)
    assert called_in(function, args[0]) == [f"{op}_native"]  # gradients are enabled, but nothing asks for one
    assert called_in(function, args[0].clone().requires_grad_()) == [op]


@pytest.mark.parametrize("op", OPS)
def test_exported_programs_hold_the_ordinary_op(op: str) -> None:
    args = arguments(op, (2, 3), torch.float32)

    class Module(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return call(op, x, *args[1:])

    with torch.no_grad():
        graph = torch.export.export(Module(), (args[0],)).graph
    names = [str(node.target) for node in graph.nodes if "taco_kernels." in str(node.target)]
    assert names == [f"taco_kernels.{op}.default"]


@pytest.mark.parametrize("op", OPS)
def test_autocast_casts_in_compiled_code(op: str) -> None:
    args = arguments(op, (2, 3), torch.float32)
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = tensors(torch.compile(lambda x: call(op, x, *args[1:]), fullgraph=True)(args[0]))
        for ours, plain in zip(results, tensors(call(op, *args)), strict=True):
            assert ours.dtype == torch.bfloat16 and torch.equal(ours, plain)


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_a_forced_backend_is_asked(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *args: (asked.append(op), choose(*args))[1])
    args = arguments(op, (2, 3), torch.float32)
    with torch.no_grad():
        native(op)(*args)
        assert not asked
        with taco_kernels.use_backend("reference"):
            native(op)(*args)
    assert asked == [op]


@needs_kernels
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [(3,), (700,)])
def test_arguments_are_let_go(op: str, rows: tuple[int, ...]) -> None:
    args = arguments(op, rows, torch.float32)
    flat = [t for part in args for t in (part if isinstance(part, list) else [part]) if isinstance(t, torch.Tensor)]
    before = [t._use_count() for t in flat]  # C++ owners, beside which Python's references count as one
    with torch.no_grad():
        results = tensors(native(op)(*args))
    assert [t._use_count() for t in flat] == before
    assert all(t._use_count() == 1 for t in results)


@needs_kernels
def test_errors_are_errors() -> None:
    x, v, u, pivot, *rest = arguments("pivoted_low_rank_linear", (3,), torch.float32)
    wrong = pivot.clone()
    wrong[2] = 99
    with torch.no_grad():
        with pytest.raises(IndexError, match="pivot"):
            native("pivoted_low_rank_linear")(x, v, u, wrong, *rest)
        with pytest.raises(RuntimeError, match="low_rank_linear refused"):
            native("low_rank_linear")(x, v, u)


def test_without_direct_calls_it_is_the_ordinary_op() -> None:
    code = """
import torch, taco_kernels
from taco_kernels import direct
x, v, u = torch.randn(3, 8), torch.randn(2, 8), torch.randn(5, 2)
ops = torch.ops.taco_kernels
print(direct._registered, torch.equal(ops.low_rank_linear_native(x, v, u), ops.low_rank_linear(x, v, u)))
with torch.no_grad():
    compiled = torch.compile(lambda x: taco_kernels.low_rank_linear(x, v, u), backend="eager", fullgraph=True)
    print(torch.equal(compiled(x), ops.low_rank_linear(x, v, u)))
"""
    environment = {**os.environ, "TACO_DIRECT": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["{} True", "True"]
