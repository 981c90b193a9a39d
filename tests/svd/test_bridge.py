"""Bridges: find a map that is there, and never do worse than nothing on what they were fitted to."""

from __future__ import annotations

import pytest
import torch

from taco_svd import compress
from taco_svd.bridging import BridgeMoments, fit_bridge
from taco_svd.replacement import LowRankBridge

from .tiny_models import tiny_model

HIDDEN, EPS = 24, 1e-6


def bridge_of(moments: BridgeMoments, rank: int, gradients: torch.Tensor | None = None) -> LowRankBridge:
    u, v, bias = fit_bridge(moments, rank, gradients)
    made = LowRankBridge(HIDDEN, rank, True, EPS)
    with torch.no_grad():
        made.u.copy_(u)
        made.v.copy_(v)
        assert made.bias is not None
        made.bias.copy_(bias)
    return made


@pytest.mark.parametrize("weighted", [False, True])
def test_planted_map_is_recovered(weighted: bool) -> None:
    rank = 3
    planted = LowRankBridge(HIDDEN, rank, True, EPS)
    with torch.no_grad():
        for parameter in planted.parameters():
            parameter.normal_()
    gradients = torch.eye(HIDDEN, dtype=torch.float64) * torch.linspace(0.5, 2, HIDDEN) if weighted else None
    moments = BridgeMoments(EPS)
    with torch.no_grad():
        for _ in range(4):
            entering = torch.randn(5, 200, HIDDEN)
            moments.add(entering, planted(entering))
        assert moments.tokens == 4000
        found = bridge_of(moments, rank, gradients)
        fresh = torch.randn(50, HIDDEN)
        added, wanted = found(fresh) - fresh, planted(fresh) - fresh
    # the ridge of 1e-3 shrinks the map by about that share
    assert float((added - wanted).norm() / wanted.norm()) < 3e-3


@pytest.mark.parametrize("rank", [1, 4, HIDDEN])
def test_never_worse_than_bare_removal_on_its_own_tokens(rank: int) -> None:
    entering = torch.randn(300, HIDDEN) * torch.rand(300, 1)
    leaving = entering + torch.tanh(entering @ torch.randn(HIDDEN, HIDDEN)) + 0.3
    moments = BridgeMoments(EPS)
    moments.add(entering[:100], leaving[:100])
    moments.add(entering[100:], leaving[100:])
    with torch.no_grad():
        error = float((bridge_of(moments, rank)(entering) - leaving).double().pow(2).mean())
    constant = leaving - entering - (leaving - entering).mean(0)
    assert error < float((entering - leaving).double().pow(2).mean())
    assert error <= float(constant.double().pow(2).mean()) * (1 + 1e-6)


def test_higher_rank_is_never_worse() -> None:
    entering = torch.randn(300, HIDDEN)
    leaving = entering + torch.tanh(entering @ torch.randn(HIDDEN, HIDDEN))
    moments = BridgeMoments(EPS)
    moments.add(entering, leaving)
    with torch.no_grad():
        errors = [
            float((bridge_of(moments, rank)(entering) - leaving).double().pow(2).mean()) for rank in (1, 2, 5, 12, 24)
        ]
    assert errors == sorted(errors, reverse=True)


@torch.no_grad()
def test_bridge_in_a_model_brings_the_hidden_states_closer(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    with torch.enable_grad():
        how = {"layers": [2, 3], "calibration": calibration_tokens}
        bare, _ = compress(model, method="removal", **how)
        bridged, plan = compress(model, method="bridge", bridge_rank=8, **how)
    assert [(bridge.after, bridge.rank) for bridge in plan.structure.bridges] == [(1, 8)]
    wanted = model(calibration_tokens, output_hidden_states=True).hidden_states[4]  # what layer 3 puts out
    found = [
        small(calibration_tokens, output_hidden_states=True).hidden_states[2].sub(wanted).pow(2).mean()
        for small in (bare, bridged)
    ]
    assert float(found[1]) < float(found[0])
