"""Factors as they are stored: the product is what the decomposition says, and both have entries of one size."""

from __future__ import annotations

import pytest
import torch

from taco_svd import compress
from taco_svd.decomposition import Decomposition, plain_svd, weighted_svd
from taco_svd.replacement import LowRankLinear

from .tiny_models import tiny_model


def moments(size: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    root = torch.randn(size, size, generator=generator, dtype=torch.float64) * scale
    return root @ root.T


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-6, 1.0), (1.0, 1e-7), (1e4, 1e-5)])
def test_both_sides_of_a_direction_are_as_long(scales: tuple[float, float]) -> None:
    """Whatever the sizes of the moments: gradients are often a million times smaller than inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 17, generator=generator)
    parts = weighted_svd(weight, moments(17, scales[0], generator), moments(12, scales[1], generator))
    u, v = parts.factors(torch.arange(12))
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(u @ v, weight, rtol=0, atol=1e-4)


def test_those_of_a_plain_svd_share_the_root_of_sigma() -> None:
    parts = plain_svd(torch.randn(9, 5, generator=torch.Generator().manual_seed(1)))
    u, v = parts.factors(torch.tensor([0, 3]))
    root = parts.sigma[[0, 3]].sqrt()
    torch.testing.assert_close(u, parts.left[:, [0, 3]] * root)
    torch.testing.assert_close(v, root[:, None] * parts.right[[0, 3]])


def test_directions_of_nothing_stay_nothing() -> None:
    left, right = torch.eye(4)[:, :3], torch.eye(5)[:3]
    left[:, 2] = 0
    u, v = Decomposition(left, torch.tensor([2.0, 0.0, 0.0]), right).factors(torch.arange(3))
    assert bool(torch.isfinite(u).all() and torch.isfinite(v).all())
    assert float(u[:, 1:].abs().max()) == float(v[1:].abs().max()) == 0


def test_a_taco_model_trains_like_any_other() -> None:
    """A step of Adam is as large for every entry: of factors of one size none is thrown out by it."""
    tokens = torch.randint(3, 90, (16, 16), generator=torch.Generator().manual_seed(2))
    compressed, plan = compress(tiny_model("llama"), method="taco", keep=0.8, calibration=tokens)
    plain = [m for m in compressed.modules() if isinstance(m, LowRankLinear) and m.pivot is None]
    pivoted = [m for m in compressed.modules() if isinstance(m, LowRankLinear) and m.pivot is not None]
    assert pivoted, plan.structure
    plain += [m for m in compress(tiny_model("llama"), method="svd", keep=0.8, calibration=tokens)[0].modules()
              if isinstance(m, LowRankLinear)]  # fmt: skip
    for module in plain:
        torch.testing.assert_close(module.u.norm(dim=0), module.v.norm(dim=1), rtol=1e-4, atol=0)
    optimizer = torch.optim.AdamW(compressed.parameters(), lr=1e-4)
    given = {module: (module.u.clone(), module.v.clone()) for module in pivoted}
    losses = []
    for _ in range(6):
        loss = compressed(tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    for module, (u, v) in given.items():
        assert not torch.equal(module.u, u) and not torch.equal(module.v, v)
