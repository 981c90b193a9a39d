"""Paper mode in one shot: importance and attribution of one pass give what two give, whatever was guessed."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from taco_svd import one_shot, suffix
from taco_svd.architectures import Architecture
from taco_svd.baselines.workspace import Workspace
from taco_svd.calibration import Calibration
from taco_svd.importance import block_influence
from taco_svd.pipeline import compress
from taco_svd.plan import Plan
from taco_svd.suffix import SuffixRunner

from .tiny_models import LAYERS, tiny_model


def compressed(model: PreTrainedModel, tokens: torch.Tensor, **how: object) -> tuple[dict[str, torch.Tensor], Plan]:
    if "plan" not in how:
        how |= {"method": "paper", "compression_ratio": 0.5, "one_shot": True}
    made, plan = compress(model, calibration=tokens, **how)
    return made.state_dict(), plan


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_as_the_plan_carried_out_by_itself(name: str, dtype: torch.dtype, calibration_tokens: torch.Tensor) -> None:
    """The plan alone is attributed in a pass of its own."""
    model = tiny_model(name, dtype)
    ours, plan = compressed(model, calibration_tokens, layers=2)
    again, _ = compressed(model, calibration_tokens, plan=plan)
    assert same(ours, again)
    named, _ = compressed(model, calibration_tokens, layers=list(plan.redundant))
    assert same(ours, named)


def test_scores_are_block_influence(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    _, plan = compressed(model, calibration_tokens, layers=2)
    scores = block_influence(SuffixRunner(Architecture(model), calibration_tokens, 0))
    assert plan.importance["measure"] == "bi"
    torch.testing.assert_close(torch.tensor(plan.importance["scores"]), torch.tensor(scores), rtol=1e-5, atol=0)


@pytest.mark.parametrize("right", [0, 1])
def test_a_wrong_guess_changes_nothing(
    right: int, calibration_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    ours, plan = compressed(model, calibration_tokens, layers=2)
    wrong = [layer for layer in range(LAYERS) if layer not in plan.redundant]
    guessed = [*plan.redundant[:right], *wrong[right:]]
    monkeypatch.setattr(one_shot, "block_influence", lambda _: [float(layer not in guessed) for layer in range(LAYERS)])
    missed, other = compressed(model, calibration_tokens, layers=2)
    assert other.redundant == plan.redundant and same(missed, ours)


def test_one_pass_does_both(calibration_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "CPU_BATCH_TOKENS", calibration_tokens.shape[1])  # a pass is a batch for each window
    model = tiny_model("llama")
    calls = [0]
    model.model.layers[-1].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def count(**how: object) -> int:
        calls[0] = 0
        compressed(model, calibration_tokens, **how)
        return calls[0]

    _, plan = compressed(model, calibration_tokens, layers=2)
    # what a plan costs that is carried out, and one more small look at the model: the guess
    assert count(layers=2) <= count(plan=plan) + 1


def test_a_plan_of_another_size_is_not_given_these_attributions(calibration_tokens: torch.Tensor) -> None:
    """A workspace serves many calls: the last one's attributions are for its own structure only."""
    model, calibration = tiny_model("llama"), Calibration(calibration_tokens, "tokens", 0)
    workspace = Workspace(model, calibration)

    def run(ratio: float, plan: Plan | None = None, shared: Workspace | None = None) -> tuple[dict, Plan]:
        made, found = compress(
            model,
            calibration=calibration,
            plan=plan,
            workspace=shared,
            **({} if plan else {"method": "paper", "layers": 2, "compression_ratio": ratio, "one_shot": True}),
        )
        return made.state_dict(), found

    alone, plan = run(0.3)
    run(0.6, shared=workspace)
    after, _ = run(0.3, plan, workspace)
    assert same(alone, after)
