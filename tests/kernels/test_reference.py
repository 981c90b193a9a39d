"""The references against formulas written out element by element, and singular_attribution against autograd."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from taco_kernels import singular_attribution
from taco_kernels.low_rank_bridge import low_rank_bridge_reference
from taco_kernels.low_rank_linear import low_rank_linear_reference


def test_linear_reference_is_the_definition():
    x, v, u = torch.randn(3, 5).double(), torch.randn(2, 5).double(), torch.randn(4, 2).double()
    bias, residual = torch.randn(4).double(), torch.randn(3, 4).double()
    y = low_rank_linear_reference(x, v, u, bias, residual)
    for i in range(3):
        for j in range(4):
            total = bias[j] + residual[i, j]
            for k in range(2):
                total += u[j, k] * sum(v[k, c] * x[i, c] for c in range(5))
            assert math.isclose(y[i, j].item(), total.item(), rel_tol=1e-12, abs_tol=1e-12)


def test_bridge_reference_is_the_definition():
    h, v, u, bias = torch.randn(3, 5).double(), torch.randn(2, 5).double(), torch.randn(5, 2).double(), torch.randn(5)
    bias, eps = bias.double(), 1e-3
    y = low_rank_bridge_reference(h, v, u, bias, eps)
    for i in range(3):
        root = math.sqrt(sum(h[i, c].item() ** 2 for c in range(5)) / 5 + eps)
        for j in range(5):
            total = h[i, j].item() + bias[j].item()
            for k in range(2):
                total += u[j, k].item() * sum(v[k, c].item() * h[i, c].item() / root for c in range(5))
            assert math.isclose(y[i, j].item(), total, rel_tol=1e-12, abs_tol=1e-12)


def test_references_round_once():
    # 1 + 2^-8 is lost when the intermediate is rounded to bf16, and must not be
    x = torch.tensor([[1.0, 2.0**-8]], dtype=torch.bfloat16)
    v = torch.ones(1, 2, dtype=torch.bfloat16)
    u = torch.ones(1, 1, dtype=torch.bfloat16)
    residual = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    assert low_rank_linear_reference(x, v, u, None, residual).item() == 2.0**-8


def factorised_gradients(x, y_of, u, sigma, v):
    """dL/dsigma per token by autograd through the factorised layer, and dL/dy; L is a sum over tokens."""
    tokens = x.shape[0]
    copies = sigma.expand(tokens, -1).clone().requires_grad_()
    y = ((x @ v.T) * copies) @ u.T
    y.retain_grad()
    y_of(y).backward()
    return copies.grad, y.grad


@pytest.mark.parametrize(("batch", "tokens", "inputs", "outputs"), [(1, 1, 3, 4), (3, 7, 9, 5), (2, 5, 4, 11)])
def test_attribution_equals_autograd(batch, tokens, inputs, outputs):
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    x = torch.randn(batch, tokens, inputs, dtype=torch.float64)
    target = torch.randn(batch * tokens, outputs, dtype=torch.float64)
    per_token, grad = factorised_gradients(
        x.view(-1, inputs), lambda y: (torch.nn.functional.gelu(y) - target).pow(3).sum(), u, sigma, v
    )
    result = singular_attribution(x, grad.view(batch, tokens, outputs), u, v)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(result.signed, per_token.sum(0), **close)
    torch.testing.assert_close(result.absolute, per_token.abs().sum(0), **close)
    torch.testing.assert_close(result.token_squares, per_token.square().sum(0), **close)
    per_sequence = per_token.view(batch, tokens, -1).sum(1)
    torch.testing.assert_close(result.squares, per_sequence.square().sum(0), **close)
    # and the definition through the weight gradient that is never formed
    weight_grad = grad.T @ x.view(-1, inputs)
    torch.testing.assert_close(result.signed, torch.diag(u.T @ weight_grad @ v.T), **close)


def test_attribution_without_sequences_counts_each_token():
    x, grad = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    u, v = torch.randn(3, 2).double(), torch.randn(2, 4).double()
    flat = singular_attribution(x, grad, u, v)
    torch.testing.assert_close(flat.squares, flat.token_squares)
    one_sequence = singular_attribution(x[None], grad[None], u, v)
    torch.testing.assert_close(one_sequence.squares, flat.signed.square())
    torch.testing.assert_close(one_sequence.signed, flat.signed)


def test_attribution_in_chunks_equals_one_piece(monkeypatch):
    x, grad = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 6).double()
    u, v = torch.randn(6, 2).double(), torch.randn(2, 4).double()
    whole = singular_attribution(x, grad, u, v)
    for rows in (1, 6, 7):
        monkeypatch.setattr(sys.modules["taco_kernels.singular_attribution"], "_CHUNK_ROWS", rows)
        for a, b in zip(whole, singular_attribution(x, grad, u, v), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attribution_accumulates_half_types_in_float32(dtype):
    x, grad = torch.randn(2, 300, 8).to(dtype), torch.randn(2, 300, 6).to(dtype)
    u, v = torch.randn(6, 5), torch.randn(5, 8)
    result = singular_attribution(x, grad, u, v)
    exact = singular_attribution(x.double(), grad.double(), u.double(), v.double())
    u32 = torch.finfo(torch.float32).eps / 2
    assert all(field.dtype == torch.float32 for field in result)
    # each product's error is relative to the sum of absolute products, then 600 tokens are added up
    size = ((grad.double().abs() @ u.double().abs()) * (x.double().abs() @ v.double().abs().T)).sum((0, 1))
    assert bool(((result.signed - exact.signed).abs() <= (600 + 8 + 6 + 4) * u32 * size).all())
    assert bool(((result.absolute - exact.absolute).abs() <= (600 + 8 + 6 + 4) * u32 * size).all())


def test_attribution_of_nothing_is_zero():
    for shape in ((0,), (0, 3), (2, 0)):
        result = singular_attribution(
            torch.zeros(*shape, 4), torch.zeros(*shape, 6), torch.ones(6, 2), torch.ones(2, 4)
        )
        assert all(field.shape == (2,) and not field.any() for field in result)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(4, 6)}, ValueError, "equal leading dimensions"),
        ({"u": torch.zeros(5, 2)}, ValueError, r"u \(5, 2\) must be \[out, k\] with out = 6"),
        ({"v": torch.zeros(4, 2)}, ValueError, r"v \(4, 2\) must be \[k, in\] = \(2, 4\)"),
        ({"x": torch.zeros(3, 4).int()}, TypeError, "x has dtype torch.int32"),
        ({"v": torch.zeros(2, 4, device="meta")}, ValueError, "v is on meta"),
    ],
)
def test_attribution_errors(change, error, message):
    arguments = {"x": torch.zeros(3, 4), "grad": torch.zeros(3, 6), "u": torch.zeros(6, 2), "v": torch.zeros(2, 4)}
    with pytest.raises(error, match=message):
        singular_attribution(**{**arguments, **change})
