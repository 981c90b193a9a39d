"""Second moments gathered during a backward pass, in one group or in several."""

from __future__ import annotations

import json

import pytest
import torch

from taco_svd.architectures import Architecture, LinearSite
from taco_svd.statistics import SecondMoments
from taco_svd.suffix import SuffixRunner

from .tiny_models import tiny_model


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_moments_equal_those_of_the_collected_rows(name: str, calibration_tokens: torch.Tensor) -> None:
    architecture = Architecture(tiny_model(name))
    sites = architecture.sites([1, 2])
    moments = SecondMoments()
    rows: dict[LinearSite, list[tuple[torch.Tensor, torch.Tensor]]] = {site: [] for site in sites}

    def both(site: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
        moments(site, x, gradient)
        rows[site].append((x.double().flatten(0, 1), gradient.double().flatten(0, 1)))

    SuffixRunner(architecture, calibration_tokens, 1, 24).backward(sites, both)
    moments.finish()
    for site in sites:
        x, gradient = (torch.cat(parts) for parts in zip(*rows[site], strict=True))
        eps = torch.finfo(torch.float32).eps
        for found, exact in (
            (moments.inputs(site), x.T @ x / len(x)),
            (moments.gradients(site), gradient.T @ gradient / len(x)),
        ):
            assert float((found.double() - exact).norm()) <= len(x) * eps * float(exact.norm()), site.name


def test_maps_of_one_input_share_its_moment(calibration_tokens: torch.Tensor) -> None:
    architecture = Architecture(tiny_model("llama"))
    moments = SecondMoments()
    SuffixRunner(architecture, calibration_tokens, 1, 24).backward(architecture.sites([1]), moments)
    assert len(moments._inputs) == 4  # q = k = v, o, gate = up, down


def test_moments_come_back_from_their_state(calibration_tokens: torch.Tensor) -> None:
    """Also for some of the maps only, when the one that gathered the shared inputs is not among them."""
    architecture = Architecture(tiny_model("llama"))
    sites = architecture.sites([1])
    moments = SecondMoments()
    SuffixRunner(architecture, calibration_tokens, 1, 24).backward(sites, moments)
    tensors, note = moments.state()
    note = json.loads(json.dumps(note))
    for some in (sites, sites[:1], sites[1:3], sites[-1:]):
        again = SecondMoments.of_state(some, tensors, note)
        for site in some:
            assert torch.equal(again.inputs(site), moments.inputs(site))
            assert torch.equal(again.gradients(site), moments.gradients(site))
