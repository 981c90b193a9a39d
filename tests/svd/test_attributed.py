"""Attribution within a bound on memory: more passes and decompositions made twice, but the same factors."""

from __future__ import annotations

import pytest
import torch

from taco_svd import attributed, compress, decomposition
from taco_svd.architectures import Architecture, dense_weight
from taco_svd.attributed import Attributed
from taco_svd.attribution import CANDIDATES, candidate_directions, candidates_of
from taco_svd.decomposition import plain_svd

from .tiny_models import tiny_model


def factors(dtype: torch.dtype, tokens: torch.Tensor, one_shot: bool) -> dict[str, torch.Tensor]:
    model = tiny_model("llama", dtype)
    made, _ = compress(
        model, method="paper", layers=2, compression_ratio=0.5, calibration=tokens, one_shot=one_shot
    )  # fmt: skip
    return made.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("one_shot", [True, False])
@pytest.mark.parametrize("held, kept", [(0.0, 10**9), (0.2, 0), (1.0, 0), (1.0, 20_000)])
def test_memory_changes_nothing(
    held: float,
    kept: int,
    one_shot: bool,
    dtype: torch.dtype,
    calibration_tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = factors(dtype, calibration_tokens, one_shot)
    monkeypatch.setattr(attributed, "HELD_BYTES", 0)
    monkeypatch.setattr(attributed, "HELD_SHARE", held)
    monkeypatch.setattr(attributed, "KEPT_BYTES", kept)
    found = factors(dtype, calibration_tokens, one_shot)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_groups_keep_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = Architecture(tiny_model("llama"))
    sites = architecture.sites([1, 2])
    ranks = {layer: dict.fromkeys(architecture.paths, 2) for layer in (1, 2)}

    def needed(site: object) -> int:
        weight = dense_weight(architecture.module(site))
        return min(weight.shape) * sum(weight.shape) * 4

    largest = max(needed(site) for site in sites)
    size = sum(p.numel() * 4 for p in architecture.model.parameters())
    monkeypatch.setattr(attributed, "HELD_BYTES", 0)
    for bytes_ in (0, largest, 3 * largest, 10**9):
        monkeypatch.setattr(attributed, "HELD_SHARE", bytes_ / size)
        groups = Attributed(architecture, ranks).groups(sites)
        assert [site for group in groups for site in group] == sites
        assert all(sum(map(needed, group)) <= max(bytes_, needed(group[0])) for group in groups)
        assert len(groups) == {0: len(sites), 10**9: 1}.get(bytes_, len(groups))
        if 0 < bytes_ < 10**9:
            assert 1 < len(groups) < len(sites)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_candidates_of_a_large_matrix_are_the_leading_ones(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a sketch or, where that does not pay, cut from a full decomposition: nothing beyond them is held."""
    weight = torch.randn(40, 60)
    assert candidates_of(weight.shape, 5) == 40
    monkeypatch.setattr(decomposition, "PLAIN_LEAST", 40)
    monkeypatch.setattr(decomposition, "PLAIN_SHARE", share)
    assert candidates_of(weight.shape, 5) == CANDIDATES * 5 and candidates_of(weight.shape, 20) == 40
    parts, whole = candidate_directions(weight, 5), plain_svd(weight)
    assert parts.left.shape == (40, 15) and parts.right.shape == (15, 60)
    torch.testing.assert_close(parts.sigma, whole.sigma[:15], rtol=1e-3, atol=0)
    if not share:
        for tensor in (parts.left, parts.right):
            assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
