"""The ops as torch sees them: opcheck, torch.compile, export, autograd, autocast, inference mode, torch.func."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, random

import taco_kernels
from taco_kernels import low_rank_bridge, low_rank_linear, native
from taco_kernels.low_rank_bridge import low_rank_bridge_reference
from taco_kernels.low_rank_linear import low_rank_linear_reference

needs_cpp = pytest.mark.skipif(native.module is None, reason=f"cpp backend: {native.reason}")


def linear_inputs(dtype, requires_grad=False, lead=(2, 3)):
    shapes = ((*lead, 9), (4, 9), (7, 4), (7,), (*lead, 7))
    return tuple(random(shape, dtype).requires_grad_(requires_grad) for shape in shapes)


def bridge_inputs(dtype, requires_grad=False, lead=(2, 3)):
    return tuple(random(shape, dtype).requires_grad_(requires_grad) for shape in ((*lead, 9), (4, 9), (9, 4), (9,)))


OPS = {
    "linear": (torch.ops.taco_kernels.low_rank_linear.default, low_rank_linear, linear_inputs),
    "bridge": (torch.ops.taco_kernels.low_rank_bridge.default, low_rank_bridge, bridge_inputs),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype, requires_grad):
    op, _, make = OPS[name]
    inputs = make(dtype, requires_grad)
    # half-precision gradients of the eager and the traced graph differ by their roundings
    tolerances = {} if dtype in (torch.float32, torch.float64) else {"rtol": 2e-2, "atol": 2e-2}
    torch.library.opcheck(op, inputs, **tolerances)
    torch.library.opcheck(op, inputs[:3], **tolerances)
    torch.library.opcheck(op, (inputs[0][:0], *inputs[1:3]), **tolerances)
    torch.library.opcheck(op, (inputs[0][:, ::2], *inputs[1:3]), **tolerances)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    _, function, make = OPS[name]
    inputs = make(torch.float64, True)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradcheck(function, inputs[:3])
    frozen = tuple(t.detach() if i in (1, 2) else t for i, t in enumerate(inputs))
    assert torch.autograd.gradcheck(function, frozen)


@needs_cpp
@pytest.mark.parametrize("name", OPS)
def test_gradients_with_the_cpp_forward(name):
    """The backward pass recomputes from the inputs, so that it must not depend on who computed the forward pass."""
    _, function, make = OPS[name]
    inputs = make(torch.float32, True)
    with taco_kernels.use_backend("cpp"):
        actual = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact = torch.autograd.grad(function(*wide).square().sum(), wide)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_half_precision_gradients(name, dtype):
    _, function, make = OPS[name]
    inputs = make(dtype, True)
    reference = low_rank_linear_reference if name == "linear" else low_rank_bridge_reference
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    weight = random(function(*inputs).shape, dtype)
    actual = torch.autograd.grad(function(*inputs), inputs, weight)
    exact = torch.autograd.grad(reference(*wide), wide, weight.double())
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == dtype
        # two products with a rounded intermediate: a few units of the largest entry
        assert (a.double() - e).abs().max() <= 8 * torch.finfo(dtype).eps * e.abs().max()


@pytest.mark.parametrize("name", OPS)
def test_compiles_whole_forward_and_backward(name):
    _, function, make = OPS[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: function(*a).square(), fullgraph=True)
    for lead in ((2, 3), (5, 3), (1, 1)):
        inputs = make(torch.float64, True, lead)
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
    op, function, make = OPS[name]

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.u = (torch.nn.Parameter(t) for t in make(torch.float32)[1:3])

        def forward(self, x):
            return function(x, self.v, self.u)

    module, x = Module(), make(torch.float32)[0]
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert any(node.target == op for node in program.graph.nodes)
    longer = make(torch.float32, lead=(6, 3))[0]
    torch.testing.assert_close(program.module()(longer), module(longer))


@pytest.mark.parametrize("name", OPS)
def test_grad_modes(name):
    op, function, make = OPS[name]
    inputs = make(torch.float32, True)
    assert function(*inputs).grad_fn is not None
    assert op(*inputs).grad_fn is not None
    with torch.no_grad():
        assert not function(*inputs).requires_grad
        assert not op(*inputs).requires_grad
    with torch.inference_mode():
        assert function(*inputs).is_inference()
    assert not function(*(t.detach() for t in inputs)).requires_grad
    only_bias = [t.detach() for t in inputs]
    only_bias[3].requires_grad_()
    (grad,) = torch.autograd.grad(function(*only_bias).sum(), only_bias[3])
    torch.testing.assert_close(grad, torch.full_like(grad, 6.0))


@pytest.mark.parametrize("name", OPS)
def test_func_transforms(name):
    _, function, make = OPS[name]
    x, v, u = make(torch.float64)[:3]

    def loss(x, v, u):
        return function(x, v, u).square().sum()

    actual = torch.func.grad(loss, argnums=(0, 1, 2))(x, v, u)
    leaves = tuple(t.clone().requires_grad_() for t in (x, v, u))
    for a, e in zip(actual, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", OPS)
def test_autocast_casts_as_linear_does(name):
    _, function, make = OPS[name]
    inputs = make(torch.float32, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(*inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, function(*(t.to(torch.bfloat16) for t in inputs)))
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = (inputs[0].bfloat16(), *inputs[1:])
        torch.testing.assert_close(function(*mixed), y)


def test_works_on_fake_and_meta_tensors():
    x, v, u = (torch.zeros(shape, device="meta") for shape in ((5, 0, 9), (4, 9), (7, 4)))
    assert low_rank_linear(x, v, u).shape == (5, 0, 7)
    with torch._subclasses.FakeTensorMode():
        y = low_rank_bridge(torch.zeros(2, 9), torch.zeros(4, 9), torch.zeros(9, 4))
    assert type(y).__name__ == "FakeTensor"
    assert y.shape == (2, 9)
