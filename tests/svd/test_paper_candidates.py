"""Paper mode on a truncated SVD: the same directions as on a full one, or a full one after all."""

from __future__ import annotations

import pytest
import torch

from taco_svd import attributed, attribution, compress, decomposition, factorise
from taco_svd.architectures import Architecture, dense_weight
from taco_svd.attribution import expected_missing, top_directions

from .tiny_models import tiny_model

HOW = {"method": "paper", "layers": [1, 3], "compression_ratio": 0.9}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Sketches allowed for tiny matrices; how many decompositions were whole and how many truncated."""
    calls = {"full": 0, "sketched": 0}
    plain = factorise.plain_svd

    def count(weight: torch.Tensor, rank: int | None = None) -> decomposition.Decomposition:
        parts = plain(weight, rank)
        calls["full" if len(parts.sigma) == min(weight.shape) else "sketched"] += 1
        return parts

    monkeypatch.setattr(decomposition, "PLAIN_LEAST", 8)
    monkeypatch.setattr(decomposition, "PLAIN_SHARE", 0.7)
    for module in (attributed, attribution):
        monkeypatch.setattr(module, "plain_svd", count)
    return calls


def steep(rate: float) -> torch.nn.Module:
    """The tiny llama with singular values that fall by a factor exp(-rate) from one to the next."""
    model = tiny_model("llama")
    architecture = Architecture(model)
    with torch.no_grad():
        for site in architecture.sites([1, 3]):
            weight = dense_weight(architecture.module(site))
            left, _, right = torch.linalg.svd(weight, full_matrices=False)
            sigma = torch.exp(-rate * torch.arange(left.shape[1]))
            weight.copy_((left * sigma) @ right)
    return model


def products(model: torch.nn.Module, tokens: torch.Tensor, one_shot: bool) -> dict[str, torch.Tensor]:
    compressed, _ = compress(model, calibration=tokens, one_shot=one_shot, **HOW)
    architecture = Architecture(compressed)
    sites = architecture.sites([1, 3])
    return {site.name: architecture.module(site).u @ architecture.module(site).v for site in sites}


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("rate", [3.0, 0.02])
def test_same_directions_as_with_full_decompositions(
    rate: float, one_shot: bool, calibration_tokens: torch.Tensor, counted: dict[str, int]
) -> None:
    """Steep spectra are done with the candidates; flat ones are noticed, and every direction is looked at."""
    found = products(steep(rate), calibration_tokens, one_shot)
    # ranks of 1 and 2: three times that are candidates
    if rate > 1:
        assert counted["full"] == 0 and counted["sketched"] == 14
    else:
        assert counted["full"] > 0
    decomposition.PLAIN_LEAST = 10**6
    reference = products(steep(rate), calibration_tokens, one_shot)
    for name, product in reference.items():
        # each factor's columns come with the rounding of an iterative method in float32
        assert float((found[name] - product).detach().norm()) <= 1e-4 * float(product.detach().norm()), name


def test_the_estimate_errs_upwards_on_random_gradients() -> None:
    """Never below half a percent where more than five of a hundred are missing, over spectra of all kinds."""
    generator = torch.Generator().manual_seed(5)
    accepted = refused = 0
    for rate in (0.0, 0.5, 2.0, 6.0, 12.0, 20.0):
        for heavy in (False, True):
            for _ in range(20):
                n, rank = 400, 40
                sigma = torch.exp(-rate * torch.arange(n, dtype=torch.float64) / n)
                gradients = torch.randn(n, generator=generator, dtype=torch.float64)
                if heavy:  # products of two normals, as of an activation and a gradient
                    gradients = gradients * torch.randn(n, generator=generator, dtype=torch.float64)
                importance = (sigma * gradients).abs()
                missing = float((top_directions(importance, rank) >= 3 * rank).double().mean())
                estimate = expected_missing(importance[: 3 * rank], sigma[: 3 * rank], rank, n)
                if estimate <= factorise.MISSING_SHARE:
                    accepted += 1
                    assert missing <= 0.05, (rate, heavy, missing)
                else:
                    refused += 1
    assert accepted > 20 and refused > 20


def test_the_estimate_at_its_ends() -> None:
    ones = torch.ones(6, dtype=torch.float64)
    assert expected_missing(ones, ones, 3, 6) == 0  # nothing lies beyond
    assert expected_missing(ones, ones, 7, 10) == 1  # fewer candidates than are kept
    assert expected_missing(ones, ones, 3, 60) > 1  # all alike: what lies beyond is as good
    assert expected_missing(torch.zeros(6, dtype=torch.float64), ones, 3, 60) > 1  # no gradient tells nothing
