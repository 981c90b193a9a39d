"""The ops as torch sees them: opcheck, torch.compile, export, autograd, autocast, inference mode, torch.func."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any

import gradient_bounds
import pytest
import torch
from gradient_bounds import assert_gradients_within, known
from kernel_cases import DTYPES, random
from torch.autograd import forward_ad

import taco_kernels
from taco_kernels import (
    low_rank_bridge,
    low_rank_linear,
    low_rank_linear_concat,
    low_rank_linear_group,
    low_rank_mlp,
    native,
    pivoted_low_rank_linear,
)
from taco_kernels.low_rank_bridge import low_rank_bridge_reference
from taco_kernels.low_rank_linear import low_rank_linear_reference
from taco_kernels.low_rank_linear_group import low_rank_linear_group_reference
from taco_kernels.low_rank_mlp import ACTIVATIONS, low_rank_mlp_reference

needs_cpp = pytest.mark.skipif(native.module is None, reason=f"cpp backend: {native.reason}")


@dataclass(frozen=True)
class Op:
    """One op as these tests see it: a function of tensors, some of which may be None, with one tensor as result."""

    overload: Any
    function: Any
    reference: Any
    shapes: Any  # leading dimensions -> shapes of all tensors
    optional: tuple[int, ...]  # positions of tensors that may be None
    bias: int  # position of a bias that is added to the result as it is
    frozen: tuple[int, ...] = (1, 2)
    bounds: Any = None  # see gradient_bounds
    pack: Any = None  # the tensors as the overload takes them, where that is not one after the other
    roundings: int = 8  # what separates transforms in bfloat16 from exact ones, in units of the largest entry

    def make(self, dtype, requires_grad=False, lead=(2, 3)):
        return tuple(random(shape, dtype).requires_grad_(requires_grad) for shape in self.shapes(lead))

    def arguments(self, *tensors):
        return tensors if self.pack is None else self.pack(*tensors)

    def required(self, inputs):
        return tuple(None if i in self.optional else t for i, t in enumerate(inputs))


def _members(x, *tensors):
    return x, list(tensors[0::3]), list(tensors[1::3]), list(tensors[2::3])


def _group(x, *tensors):
    return torch.cat(low_rank_linear_group(*_members(x, *tensors)), dim=-1)


def _group_reference(x, *tensors):
    return torch.cat(low_rank_linear_group_reference(*_members(x, *tensors)), dim=-1)


# of the members of a concat: the first without a pivot, the second with one
_PIVOTS = (None, torch.tensor([3, 8, 0, 1, 2, 4, 5, 6, 7]))


def _members_and_pivots(x, *tensors):
    return *_members(x, *tensors), [None, _PIVOTS[1].to(x.device)]


def _concat(x, *tensors):
    return low_rank_linear_concat(*_members_and_pivots(x, *tensors))


def _concat_reference(x, *tensors):
    # the pivoted member's right factor written out: the op's own reference fills it in place, which vmap does not know
    x, vs, us, biases, (_, pivot) = _members_and_pivots(x, *tensors)
    whole = torch.cat([torch.eye(2, dtype=vs[1].dtype, device=x.device), vs[1]], 1)[:, pivot.argsort()]
    return torch.cat(low_rank_linear_group_reference(x, [vs[0], whole], us, biases), dim=-1)


def _mlp(*tensors, act="silu", function=low_rank_mlp):
    x, *factors = tensors
    return function(x, tuple(factors[:3]), tuple(factors[3:6]), tuple(factors[6:]), act)


def _mlp_with(act):
    return Op(
        torch.ops.taco_kernels.low_rank_mlp.default,
        functools.partial(_mlp, act=act),
        functools.partial(_mlp, act=act, function=low_rank_mlp_reference),
        lambda lead: [(*lead, 9), (4, 9), (8, 4), (8,), (3, 9), (8, 3), (8,), (5, 8), (7, 5), (7,)],
        optional=(3, 6, 9), bias=9, frozen=(1, 2, 5, 7), pack=lambda *tensors: (*tensors, act),
        bounds=functools.partial(gradient_bounds.mlp, act=act),
        # three products in a row where the others have one, and a product of two rounded factors
        roundings=24,
    )  # fmt: skip


OPS = {
    "linear": Op(
        torch.ops.taco_kernels.low_rank_linear.default, low_rank_linear, low_rank_linear_reference,
        lambda lead: [(*lead, 9), (4, 9), (7, 4), (7,), (*lead, 7)], optional=(3, 4), bias=3,
        bounds=gradient_bounds.linear,
    ),
    "bridge": Op(
        torch.ops.taco_kernels.low_rank_bridge.default, low_rank_bridge, low_rank_bridge_reference,
        lambda lead: [(*lead, 9), (4, 9), (9, 4), (9,)], optional=(3,), bias=3,
        bounds=gradient_bounds.bridge,
    ),
    "group": Op(
        torch.ops.taco_kernels.low_rank_linear_group.default, _group, _group_reference,
        lambda lead: [(*lead, 9), (4, 9), (7, 4), (7,), (2, 9), (5, 2), (5,)], optional=(3, 6), bias=3,
        bounds=gradient_bounds.group, pack=_members,
    ),
    "concat": Op(
        torch.ops.taco_kernels.low_rank_linear_concat.default, _concat, _concat_reference,
        lambda lead: [(*lead, 9), (4, 9), (7, 4), (7,), (2, 7), (5, 2), (5,)], optional=(3, 6), bias=3,
        bounds=functools.partial(gradient_bounds.group, pivots=_PIVOTS), pack=_members_and_pivots,
    ),
    "mlp": _mlp_with("silu"),
}  # fmt: skip
# What differs between activations is their gradient alone.
WITH_GRADIENTS = OPS | {f"mlp-{act}": _mlp_with(act) for act in ACTIVATIONS if act != "silu"}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype, requires_grad):
    op = OPS[name]
    inputs = op.make(dtype, requires_grad)
    # half-precision gradients of the eager and the traced graph differ by their roundings
    tolerances = {} if dtype in (torch.float32, torch.float64) else {"rtol": 2e-2, "atol": 2e-2}
    torch.library.opcheck(op.overload, op.arguments(*inputs), **tolerances)
    x, *others = op.required(inputs)
    for rows in (x, x[:0], x[:, ::2]):
        torch.library.opcheck(op.overload, op.arguments(rows, *others), **tolerances)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradcheck(name):
    op = WITH_GRADIENTS[name]
    inputs = op.make(torch.float64, True)
    assert torch.autograd.gradcheck(op.function, inputs)
    assert torch.autograd.gradgradcheck(op.function, inputs)
    assert torch.autograd.gradcheck(op.function, op.required(inputs))
    # only some gradients asked for, each alone and all but each
    for i in range(len(inputs)):
        alone = tuple(t if j == i else t.detach() for j, t in enumerate(inputs))
        assert torch.autograd.gradcheck(op.function, alone)
    frozen = tuple(t.detach() if i in op.frozen else t for i, t in enumerate(inputs))
    assert torch.autograd.gradcheck(op.function, frozen)


def test_group_gradients_of_unused_outputs():
    x, v, u, w, t = (random(s, torch.float64).requires_grad_() for s in ((3, 9), (4, 9), (7, 4), (2, 9), (5, 2)))
    used, _ = low_rank_linear_group(x, [v, w], [u, t])
    grads = torch.autograd.grad(used.sum(), (x, v, u, w, t), allow_unused=True)
    expected = torch.autograd.grad(low_rank_linear(x, v, u).sum(), (x, v, u))
    for a, e in zip(grads, expected, strict=False):
        torch.testing.assert_close(a, e)
    assert grads[3:] == (None, None)


@needs_cpp
@pytest.mark.parametrize("name", OPS)
def test_gradients_with_the_cpp_forward(name):
    """The backward pass recomputes from the inputs, so that it must not depend on who computed the forward pass."""
    op = OPS[name]
    function, inputs = op.function, op.make(torch.float32, True)
    with taco_kernels.use_backend("cpp"):
        actual = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact = torch.autograd.grad(function(*wide).square().sum(), wide)
    y, pull = op.bounds(*map(known, inputs))
    assert_gradients_within(actual, exact, pull(y + y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_half_precision_gradients(name, dtype):
    op = WITH_GRADIENTS[name]
    function, inputs = op.function, op.make(dtype, True)
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    weight = random(function(*inputs).shape, dtype)
    actual = torch.autograd.grad(function(*inputs), inputs, weight)
    exact = torch.autograd.grad(op.reference(*wide), wide, weight.double())
    assert all(a.dtype == dtype for a in actual)
    _, pull = op.bounds(*map(known, inputs))
    assert_gradients_within(actual, exact, pull(known(weight)))


@pytest.mark.parametrize("name", OPS)
def test_compiles_whole_forward_and_backward(name):
    op = OPS[name]
    function = op.function
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: function(*a).square(), fullgraph=True)
    for lead in ((2, 3), (5, 3), (1, 1)):
        inputs = op.make(torch.float64, True, lead)
        eager = function(*inputs).square()
        torch.testing.assert_close(compiled(*inputs), eager)
        expected = torch.autograd.grad(eager.sum(), inputs)
        actual = torch.autograd.grad(compiled(*inputs).sum(), inputs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*inputs), eager.detach())
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), eager.detach())


@pytest.mark.parametrize("name", OPS)
def test_exports(name):
    op = OPS[name]
    x, *factors = op.required(op.make(torch.float32))

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            kept = [t for t in factors if t is not None]
            self.factors = torch.nn.ParameterList(torch.nn.Parameter(t) for t in kept)

        def forward(self, x):
            kept = iter(self.factors)
            return op.function(x, *(None if t is None else next(kept) for t in factors))

    module = Module()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert any(node.target == op.overload for node in program.graph.nodes)
    longer = op.make(torch.float32, lead=(6, 3))[0]
    torch.testing.assert_close(program.module()(longer), module(longer))


@pytest.mark.parametrize("name", OPS)
def test_grad_modes(name):
    op = OPS[name]
    function, inputs = op.function, op.make(torch.float32, True)

    def raw():
        result = op.overload(*op.arguments(*inputs))
        return result[0] if isinstance(result, (list, tuple)) else result

    assert function(*inputs).grad_fn is not None
    assert raw().grad_fn is not None
    with torch.no_grad():
        assert not function(*inputs).requires_grad
        assert not raw().requires_grad
    with torch.inference_mode():
        assert function(*inputs).is_inference()
    assert not function(*(t.detach() for t in inputs)).requires_grad
    only_bias = [t.detach() for t in inputs]
    only_bias[op.bias].requires_grad_()
    (grad,) = torch.autograd.grad(function(*only_bias).sum(), only_bias[op.bias])
    torch.testing.assert_close(grad, torch.full_like(grad, 6.0))


_PIVOT = torch.tensor([5, 0, 7, 3, 1, 8, 2, 6, 4])


def _pivoted(x, v, u, bias, residual):
    return pivoted_low_rank_linear(x, v, u, _PIVOT, bias, residual)


def _pivoted_plainly(x, v, u, bias, residual):
    return (x[..., _PIVOT[:4]] + x[..., _PIVOT[4:]] @ v.T) @ u.T + bias + residual


# What differs between activations is torch's own here.
TRANSFORMED = OPS | {
    "pivoted": Op(
        torch.ops.taco_kernels.pivoted_low_rank_linear.default, _pivoted, _pivoted_plainly,
        lambda lead: [(*lead, 9), (4, 5), (7, 4), (7,), (*lead, 7)], optional=(3, 4), bias=3,
        pack=lambda x, v, u, *others: (x, v, u, _PIVOT, *others),
    )
}  # fmt: skip


def _with_tangents(function, tensors):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.flip(0)) for t in tensors]
        return forward_ad.unpack_dual(function(*duals)).tangent


def _gradient(function, tensors):
    return torch.func.grad(lambda *ts: function(*ts).square().sum(), tuple(range(len(tensors))))


# name -> (function of tensors, the tensors) -> what the transform gives
TRANSFORMS = {
    "forward mode": _with_tangents,
    "jvp": lambda f, ts: torch.func.jvp(f, ts, tuple(t.flip(0) for t in ts))[1],
    "grad": lambda f, ts: _gradient(f, ts)(*ts),
    "vmap over rows": lambda f, ts: torch.vmap(f, tuple(0 if t.dim() == 3 else None for t in ts))(*ts),
    "vmap over all": lambda f, ts: torch.vmap(f)(*(torch.stack([t, t.flip(0)]) for t in ts)),
    "gradients of each row": lambda f, ts: torch.vmap(_gradient(f, ts), tuple(0 if t.dim() == 3 else None for t in ts))(
        *ts
    ),
    "forward over reverse": lambda f, ts: torch.func.jvp(_gradient(f, ts), ts, ts)[1],
    "reverse over reverse": lambda f, ts: torch.func.vjp(lambda *t: _gradient(f, ts)(*t), *ts)[1](ts),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms(name, transform, mode):
    """Forward-mode derivatives and torch.func's transforms, one in another, against the reference's."""
    op, apply = TRANSFORMED[name], TRANSFORMS[transform]
    # float32: plain tensors of it are what direct calls and compiled code's kernels are for
    tensors = op.make(torch.float32)
    exact = apply(op.reference, tuple(t.double() for t in tensors))

    def by_the_op(*tensors):
        found = op.overload(*op.arguments(*tensors))
        return found if isinstance(found, torch.Tensor) else torch.cat(found, dim=-1)

    torch.compiler.reset()
    functions = [op.function, by_the_op]
    if transform in ("grad", "jvp", "vmap over rows"):  # the others add nothing that is traced differently
        functions.append(None)
    for function in functions:
        with mode():
            if function is None:
                compiled = torch.compile(lambda *ts: apply(op.function, ts), fullgraph=True, backend="aot_eager")
                found = compiled(*tensors)
            else:
                found = apply(function, tensors)
        for a, e in zip(*((t,) if torch.is_tensor(t) else t for t in (found, exact)), strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))


@pytest.mark.parametrize("name", TRANSFORMED)
def test_compiled_code_and_forward_mode(name):
    """What was compiled without tangents is not used for tensors that have some."""
    op = TRANSFORMED[name]
    tensors = op.make(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(op.function, backend="aot_eager")
    with torch.no_grad():
        compiled(*tensors)
        exact = _with_tangents(op.reference, tuple(t.double() for t in tensors))
        found = _with_tangents(compiled, tensors)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("transform", ["jvp", "vmap over rows", "vmap over all"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_under_autocast(name, transform):
    """Autocast's casts come first; it may then round what torch's operations have in between, as of F.linear."""
    op, apply = TRANSFORMED[name], TRANSFORMS[transform]
    tensors = op.make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = apply(op.function, tensors)
        mixed = apply(op.function, (tensors[0].bfloat16(), *tensors[1:]))
    assert found.dtype == torch.bfloat16
    exact = apply(op.reference, tuple(t.bfloat16().double() for t in tensors))
    for actual in (found, mixed):
        assert (actual.double() - exact).abs().max() <= op.roundings * torch.finfo(
            torch.bfloat16
        ).eps * exact.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_vmap_of_tensors_whose_device_knows_no_autocast(autocast):
    x, v, u = (torch.zeros(shape, device="meta") for shape in ((5, 2, 9), (4, 9), (7, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = torch.vmap(lambda rows: low_rank_linear(rows, v, u))(x)
    assert y.shape == (5, 2, 7) and y.dtype == torch.float32


@pytest.mark.parametrize("name", OPS)
def test_autocast_casts_as_linear_does(name):
    op = OPS[name]
    function, inputs = op.function, op.make(torch.float32, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(*inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, function(*(t.to(torch.bfloat16) for t in inputs)))
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = (inputs[0].bfloat16(), *inputs[1:])
        torch.testing.assert_close(function(*mixed), y)


@pytest.mark.parametrize("name", OPS)
def test_a_trace_of_trained_factors_holds_the_op(name):
    """It can be saved, and runs again, with gradients: a bare autograd.Function in it could not."""
    op = OPS[name]
    inputs = op.make(torch.float32, True)
    traced = torch.jit.trace(lambda *tensors: op.function(*tensors), inputs)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    # of several members their own ops: no trace holds lists of optional tensors
    held = op.overload if name not in ("group", "concat") else OPS["linear"].overload
    assert f"taco_kernels::{held._opname}(" in str(loaded.inlined_graph)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), op.function(*inputs))
        torch.jit.trace(lambda *tensors: op.function(*tensors), inputs)
    expected = torch.autograd.grad(op.function(*inputs).square().sum(), inputs)
    for a, e in zip(torch.autograd.grad(loaded(*inputs).square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_works_on_fake_and_meta_tensors():
    x, v, u = (torch.zeros(shape, device="meta") for shape in ((5, 0, 9), (4, 9), (7, 4)))
    assert low_rank_linear(x, v, u).shape == (5, 0, 7)
    with torch._subclasses.FakeTensorMode():
        y = low_rank_bridge(torch.zeros(2, 9), torch.zeros(4, 9), torch.zeros(9, 4))
    assert type(y).__name__ == "FakeTensor"
    assert y.shape == (2, 9)
