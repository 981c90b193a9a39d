"""Paper mode against the slow and obvious way: every singular value a parameter, and autograd through it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from taco_svd import compress
from taco_svd.architectures import Architecture, LinearSite, dense_weight
from taco_svd.attribution import SigmaGradients, top_directions
from taco_svd.budget import paper_rank
from taco_svd.decomposition import plain_svd
from taco_svd.loss import next_token_loss
from taco_svd.replacement import LowRankLinear
from taco_svd.suffix import SuffixRunner

from .tiny_models import LAYERS, tiny_model

# Llama with grouped queries and tied embeddings, Qwen2 with biases, GPT-2 with transposed weights.
NAMES = ("llama", "qwen2", "gpt2")
RATIO = 0.6


class SigmaLinear(nn.Module):
    """``y = U diag(sigma) Vh x + bias`` with a trainable sigma."""

    def __init__(self, left: torch.Tensor, sigma: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.left, self.right, self.bias = left, right, bias
        self.sigma = nn.Parameter(sigma.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ((x @ self.right.T) * self.sigma) @ self.left.T
        return y if self.bias is None else y + self.bias


def obvious_loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean over all windows of the cross-entropy of token t+1 given tokens up to t, one after another."""
    logits = model(input_ids=tokens, use_cache=False).logits
    total = torch.zeros((), dtype=logits.dtype)
    for row in range(tokens.shape[0]):
        for position in range(tokens.shape[1] - 1):
            total = total - functional.log_softmax(logits[row, position], dim=-1)[tokens[row, position + 1]]
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def obvious_gradients(
    architecture: Architecture, sites: list[LinearSite], tokens: torch.Tensor
) -> dict[LinearSite, torch.Tensor]:
    """dL/dsigma of each site by autograd; the model is put back together afterwards."""
    dense, made = {}, {}
    for site in sites:
        module = dense[site] = architecture.module(site)
        weight = dense_weight(module).detach()
        parts = plain_svd(weight)
        bias = getattr(module, "bias", None)
        made[site] = SigmaLinear(
            parts.left.to(weight.dtype),
            parts.sigma.to(weight.dtype),
            parts.right.to(weight.dtype),
            None if bias is None else bias.detach(),
        )
    for site in sites:
        architecture.replace(site, made[site])
    loss = obvious_loss(architecture.model, tokens)
    gradients = torch.autograd.grad(loss, [made[site].sigma for site in sites])
    for site in sites:
        architecture.replace(site, dense[site])
    return dict(zip(sites, gradients, strict=True))


@pytest.mark.parametrize("batch_tokens", [12, 36, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_autograd(name: str, batch_tokens: int, calibration_tokens: torch.Tensor) -> None:
    model = tiny_model(name)
    architecture = Architecture(model)
    sites = architecture.sites([1, 3])
    parts = {site: plain_svd(dense_weight(architecture.module(site)).detach()) for site in sites}
    fast = SigmaGradients(parts)
    loss = SuffixRunner(architecture, calibration_tokens, 1, batch_tokens).backward(sites, fast)
    # the reference runs in float64; the same float32 factors in both, so what is left is float32 rounding
    reference = tiny_model(name).double()
    reference_architecture = Architecture(reference)
    made = {}
    for site in sites:
        module = reference_architecture.module(site)
        bias = getattr(module, "bias", None)
        made[site] = SigmaLinear(
            parts[site].left.double(),
            parts[site].sigma.double(),
            parts[site].right.double(),
            None if bias is None else bias.detach(),
        )
    for site in sites:
        reference_architecture.replace(site, made[site])
    expected_loss = obvious_loss(reference, calibration_tokens)
    expected = torch.autograd.grad(expected_loss, [made[site].sigma for site in sites])
    eps = torch.finfo(torch.float32).eps
    assert abs(loss - float(expected_loss.detach())) <= 100 * eps * float(expected_loss.detach())
    for site, slow in zip(sites, expected, strict=True):
        # norm-wise: 5 layers of sums of up to 56 terms, forward and backward
        error = float((fast.gradient(site) - slow).norm() / slow.norm())
        assert error <= 2 * LAYERS * 56 * eps, (site.name, error)
        assert torch.equal(fast.importance(site), (fast.gradient(site) * parts[site].sigma.double()).abs())


def test_shifted_labels_once(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        logits = model(calibration_tokens).logits
        expected = float(obvious_loss(model.double(), calibration_tokens))
        ours = float(next_token_loss(logits, calibration_tokens))
        theirs = float(model(calibration_tokens, labels=calibration_tokens).loss)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert theirs == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_compressed_model_equals_the_plain_algorithm(name: str, calibration_tokens: torch.Tensor) -> None:
    """Algorithm 1 written out: from the top layer down, MLP before attention, each on the model compressed so far."""
    layers = [1, 3, 4]
    fast, plan = compress(
        tiny_model(name), method="paper", layers=layers, compression_ratio=RATIO, calibration=calibration_tokens
    )
    slow = tiny_model(name)
    for parameter in slow.parameters():
        parameter.requires_grad_(False)
    architecture = Architecture(slow)
    fast_architecture = Architecture(fast)
    checked = 0
    for layer in sorted(layers, reverse=True):
        for block in ("mlp", "attention"):
            sites = architecture.sites([layer], block)
            gradients = obvious_gradients(architecture, sites, calibration_tokens)
            for site in sites:
                module = architecture.module(site)
                weight = dense_weight(module)
                parts = plain_svd(weight)
                m, n = weight.shape
                rank = int((m * n * (100 - 100 * RATIO)) // (100 * (m + n)))
                assert plan.structure.low_rank[layer][site.path] == rank
                scores = (gradients[site] * parts.sigma).abs()
                order = scores.argsort(descending=True)
                kept = order[:rank]
                # the choice must be clear of rounding, or the two could rightly differ
                gap = float(scores[order[rank - 1]] - scores[order[rank]]) / float(scores.max())
                product = (parts.left[:, kept] * parts.sigma[kept]) @ parts.right[kept]
                installed = fast_architecture.module(site)
                assert isinstance(installed, LowRankLinear)
                found = installed.u @ installed.v
                if gap > 1e-4:
                    torch.testing.assert_close(found, product, rtol=0, atol=1e-5 * float(parts.sigma[0]))
                    checked += 1
                # go on from what the fast way installed: both then see the same model further down
                bias = getattr(module, "bias", None)
                architecture.replace(
                    site, SigmaLinear(installed.u.detach(), torch.ones(rank), installed.v.detach(), bias)
                )
            assert len(sites) >= 2
    total = len(layers) * len(Architecture(fast).paths)
    assert checked >= 0.9 * total
    with torch.no_grad():
        ours, theirs = fast(calibration_tokens).logits, slow(calibration_tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LAYERS * 56 * 1.2e-7 * float(theirs.abs().max()))


def test_paper_mode_is_not_plain_svd(calibration_tokens: torch.Tensor) -> None:
    how = {"layers": [1, 3], "compression_ratio": RATIO, "calibration": calibration_tokens}
    paper, _ = compress(tiny_model("llama"), method="paper", **how)
    plain, _ = compress(tiny_model("llama"), method="svd", **how)
    with torch.no_grad():
        assert not torch.allclose(paper(calibration_tokens).logits, plain(calibration_tokens).logits, atol=1e-3)


def test_top_directions() -> None:
    scores = torch.tensor([0.1, 3.0, 0.5, 2.0, 0.5], dtype=torch.float64)
    assert top_directions(scores, 2).tolist() == [1, 3]
    assert top_directions(scores, 3).tolist() == [1, 2, 3]  # the tie goes to the larger singular value
    assert top_directions(scores, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("percent", [1, 10, 29, 30, 50, 70, 71, 90, 99])
@pytest.mark.parametrize("shape", [(32, 32), (56, 32), (16, 32), (4096, 11008), (1, 7), (1000, 1)])
def test_paper_rank_in_whole_numbers(shape: tuple[int, int], percent: int) -> None:
    """k = floor(mn(1-c)/(m+n)) without any binary fractions."""
    m, n = shape
    assert paper_rank(m, n, percent / 100) == max(1, m * n * (100 - percent) // (100 * (m + n)))


# -- suffix runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 3, LAYERS - 1])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox", "opt"])
def test_suffix_runs_equal_full_runs_exactly(name: str, first: int, calibration_tokens: torch.Tensor) -> None:
    model = tiny_model(name)
    architecture = Architecture(model)
    full, suffix = (SuffixRunner(architecture, calibration_tokens, layer, 24) for layer in (0, first))
    with torch.no_grad():
        for index in range(2):
            assert torch.equal(suffix.logits(index), full.logits(index))
            assert torch.equal(full.logits(index), model(full.batches[index], use_cache=False).logits)
    assert suffix.mean_loss() == full.mean_loss()

    def gradients(runner: SuffixRunner) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        runner.backward(
            architecture.sites([LAYERS - 1]), lambda site, x, gradient: found.update({site.name: (x, gradient)})
        )
        return found

    one, other = gradients(suffix), gradients(full)
    assert one.keys() == other.keys() and len(one) == len(architecture.paths)
    for key in one:
        assert torch.equal(one[key][0], other[key][0]) and torch.equal(one[key][1], other[key][1])
    # and the layers above may change between runs while the kept hidden states stay right
    with torch.no_grad():
        for parameter in architecture.layers[LAYERS - 1].parameters():
            parameter.mul_(1.5)
        assert torch.equal(suffix.logits(0), model(full.batches[0], use_cache=False).logits)


def test_unequal_batches_weigh_by_their_size(calibration_tokens: torch.Tensor) -> None:
    architecture = Architecture(tiny_model("llama"))
    whole = SuffixRunner(architecture, calibration_tokens, 0).mean_loss()
    split = SuffixRunner(architecture, calibration_tokens, 0, 36)  # 3 windows and 1
    assert [len(batch) for batch in split.batches] == [3, 1]
    assert split.mean_loss() == pytest.approx(whole, rel=1e-6)
