"""Every published method on every architecture: compress, save, reload, generate, export; refusals with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from taco_svd import Plan, Structure, TacoError, UnsupportedModelError, apply_plan, compress, save_compressed
from taco_svd.architectures import Architecture
from taco_svd.baselines import BASELINES, Workspace
from taco_svd.baselines.modegpt import Widths, find_parts, layer_specs
from taco_svd.calibration import Calibration
from taco_svd.checkpoint import load_model
from taco_svd.export import dense_stand_in, to_dense
from taco_svd.model_size import parameter_count
from taco_svd.structure import NarrowSpec

from .tiny_models import CONFIGS, LAYERS, VOCABULARY, tiny_model

KEEP = 0.7
# Why a method cannot handle an architecture: what its message must name.
REFUSED = {
    ("modegpt", "phi3"): "separate",
    ("modegpt", "gpt_neox"): "separate",
    ("modegpt", "gpt2"): "separate",
    ("modegpt", "qwen3"): "q_norm",
    ("modegpt", "gemma3"): "q_norm",
    ("replaceme", "gemma2"): "residual stream",
    ("replaceme", "gemma3"): "residual stream",
}


def prompt() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 9))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_compresses_all_layers_or_says_why_not(
    name: str, calibration_tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny_model(name)
    calibration = Calibration(calibration_tokens, "tokens", 0)
    workspace = Workspace(model, calibration)
    dense_logits = model(ids := prompt()).logits
    for method, baseline in BASELINES.items():
        if (method, name) in REFUSED:
            with pytest.raises(UnsupportedModelError, match=REFUSED[method, name]):
                compress(model, method=method, keep=KEEP, calibration=calibration, workspace=workspace)
            continue
        small, plan = compress(model, method=method, keep=KEEP, calibration=calibration, workspace=workspace)
        assert plan.result["parameters"] == parameter_count(small) <= KEEP * parameter_count(model)
        if baseline.allocate is not None:  # no more than one rank of every layer's widest matrix is left unspent
            step = LAYERS * max(sum(module.shape) for module in model.parameters() if module.ndim == 2)
            assert parameter_count(small) > KEEP * parameter_count(model) - step
            assert small.config.num_hidden_layers == LAYERS
        save_compressed(small, plan, tmp_path / method, max_shard_size="20KB")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / method)
        with torch.no_grad():
            logits = small(ids).logits
            assert torch.isfinite(logits).all() and not torch.equal(logits, dense_logits)
            assert torch.equal(again(ids).logits, logits)
            how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
            assert torch.equal(again.generate(ids, **how), small.generate(ids, use_cache=False, **how))
            # the dense model is as it was
            assert torch.equal(model(ids).logits, dense_logits)
        # a plan carried out again, without what was kept in the workspace, gives the same model
        repeated, _ = compress(model, plan=Plan.load(tmp_path / method), calibration=calibration)
        for (parameter, here), (_, there) in zip(
            small.state_dict().items(), repeated.state_dict().items(), strict=True
        ):
            assert torch.equal(here, there), (method, parameter)


@pytest.mark.parametrize("method", [name for name, baseline in BASELINES.items() if baseline.allocate is not None])
def test_redundant_layers_only(method: str, calibration_tokens: torch.Tensor) -> None:
    """With --layers and a ratio, the parameters of paper mode in those layers, and all others untouched."""
    model = tiny_model("llama")
    _, paper = compress(model, method="paper", layers=[1, 3], compression_ratio=0.5, calibration=calibration_tokens)
    small, plan = compress(model, method=method, layers=[1, 3], compression_ratio=0.5, calibration=calibration_tokens)
    assert plan.redundant == (1, 3)
    assert {*plan.structure.low_rank, *plan.structure.narrow} <= {1, 3}
    assert plan.result["parameters"] <= paper.result["parameters"]
    # modegpt's head dimensions come in whole pairs, the rest is spent to within one hidden unit or rank
    assert plan.result["parameters"] > paper.result["parameters"] - 2 * 3 * 32 - 2 * (32 + 56)
    for layer in (0, 2, 4):
        for old, new in zip(
            model.model.layers[layer].parameters(), small.model.layers[layer].parameters(), strict=True
        ):
            assert old is new


def test_sleb_is_greedy_removal_and_replaceme_takes_one_run(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    _, plan = compress(model, method="sleb", layers=2, calibration=calibration_tokens)
    _, greedy = compress(model, method="removal", layers=2, importance="greedy", calibration=calibration_tokens)
    assert plan.structure == greedy.structure and plan.importance["measure"] == "greedy"
    _, plan = compress(model, method="replaceme", layers=2, calibration=calibration_tokens)
    first, last = plan.structure.removed
    assert last == first + 1 and first > 0
    scores = plan.importance["scores"]
    assert len(scores) == LAYERS - 1 and scores[first] == min(scores[1:])
    with pytest.raises(TacoError, match="one run"):
        compress(model, method="replaceme", layers=[1, 3], calibration=calibration_tokens)


def _redundant_dimensions(name: str, widths: Widths) -> torch.nn.Module:
    """A model in float64 whose attention and MLP lose nothing when they are cut to `widths`."""
    model = tiny_model(name, torch.float64)
    architecture = Architecture(model)
    parts = find_parts(architecture)
    generator = torch.Generator().manual_seed(5)
    size, per_group = parts.head_dim, parts.heads // parts.groups
    with torch.no_grad():
        for layer in architecture.layers:
            for group in range(parts.groups):
                if parts.rotary:
                    half = torch.randperm(size // 2, generator=generator)[: (size - widths.query_key) // 2]
                    gone = torch.cat([half, half + size // 2])
                else:
                    gone = torch.randperm(size, generator=generator)[: size - widths.query_key]
                for path, heads in ((parts.query, per_group), (parts.key, 1)):
                    module = layer.get_submodule(path)
                    for head in range(group * heads, (group + 1) * heads):
                        module.weight[head * size + gone] = 0
                        if module.bias is not None:
                            module.bias[head * size + gone] = 0
                # the output matrices of the group read a common subspace of the values
                basis = torch.linalg.qr(torch.randn(size, widths.value, generator=generator).double()).Q
                output = layer.get_submodule(parts.output).weight
                for head in range(group * per_group, (group + 1) * per_group):
                    inside = slice(head * size, (head + 1) * size)
                    output[:, inside] = output[:, inside] @ basis @ basis.T
            # hidden units that are never active
            idle = torch.randperm(layer.get_submodule(parts.down).in_features, generator=generator)[widths.units :]
            for path in parts.hidden_in:
                module = layer.get_submodule(path)
                module.weight[idle] = 0
                if module.bias is not None:
                    module.bias[idle] = 0
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2", "opt"])
def test_modegpt_loses_nothing_where_nothing_is_to_lose(name: str) -> None:
    """Grouped queries, biases, rotary pairs: dimensions that carry nothing are found and dropped without a trace."""
    widths = Widths(query_key=4, value=3, units=30)
    model = _redundant_dimensions(name, widths)
    architecture = Architecture(model)
    specs = layer_specs(find_parts(architecture), widths, 32, 56)
    structure = Structure(LAYERS, tuple(range(LAYERS)), narrow={1: specs, 3: specs})
    tokens = torch.randint(3, VOCABULARY, (32, 32), generator=torch.Generator().manual_seed(3))
    small = apply_plan(model, Plan("modegpt", structure, (1, 3)), Calibration(tokens, "tokens", 0))
    ids = prompt()
    with torch.no_grad():
        exact, found = model(ids).logits, small(ids).logits
        spread = float((exact - exact.mean()).abs().max())
        # the ridge of the Nystroem inverse (1e-6 of the moments) and statistics in float32 are what is left
        assert float((exact - found).abs().max()) < 1e-3 * spread
        fewer = layer_specs(find_parts(architecture), Widths(2, 2, 20), 32, 56)
        structure = Structure(LAYERS, structure.kept, narrow={1: fewer})
        broken = apply_plan(model, Plan("modegpt", structure, (1,)), Calibration(tokens, "tokens", 0))
        assert float((exact - broken(ids).logits).abs().max()) > 1e-2 * spread


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_narrow_models_export_dense_and_survive_a_reload(
    name: str, calibration_tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny_model(name)
    small, plan = compress(model, method="modegpt", keep=0.75, calibration=calibration_tokens)
    ids = prompt()
    ordinary = to_dense(small)
    assert type(ordinary) is type(model)
    with torch.no_grad():
        # sums over zeros that were put back come in another order
        torch.testing.assert_close(ordinary(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-4)
    assert [p.shape for p in ordinary.parameters()] == [p.shape for p in model.parameters()]
    assert parameter_count(dense_stand_in(small, plan.source["config"])) == parameter_count(model)
    for dtype in ("bfloat16", "float32"):
        save_compressed(small, plan, tmp_path / dtype)
        loaded, _ = load_model(tmp_path / dtype, dtype)
        for module, same in zip(small.modules(), loaded.modules(), strict=True):
            if getattr(module, "index", None) is not None:
                assert torch.equal(module.index, same.index) and same.index.dtype == torch.int64
        assert torch.isfinite(loaded(ids).logits).all()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"mlp.down_proj": NarrowSpec(33, 4)}, "33"),
        ({"mlp.nothing": NarrowSpec(3, 4)}, "mlp.nothing"),
    ],
)
def test_narrow_structures_that_do_not_fit_are_refused(change: dict, said: str, calibration_tokens, tmp_path) -> None:
    import json

    small, plan = compress(tiny_model("llama"), method="modegpt", keep=0.75, calibration=calibration_tokens)
    save_compressed(small, plan, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    narrow = Structure(LAYERS, tuple(range(LAYERS)), narrow={0: change}).to_dict()["narrow"]
    config["taco_svd"]["narrow"] = narrow
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TacoError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "narrow",
    [
        {0: {"mlp.down_proj": NarrowSpec(0, 4)}},
        {0: {"mlp.down_proj": NarrowSpec(4, 4, "sideways")}},
        {9: {"mlp.down_proj": NarrowSpec(4, 4)}},
    ],
)
def test_narrow_structures_out_of_range(narrow: dict) -> None:
    with pytest.raises(TacoError, match="structure"):
        Structure(LAYERS, tuple(range(LAYERS)), narrow=narrow)


def test_budgets_out_of_reach(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    for method in ("svd", "kfac", "modegpt", "zs-svd"):
        with pytest.raises(TacoError, match="rank 1 everywhere"):
            compress(model, method=method, keep=0.1, calibration=calibration_tokens)
        with pytest.raises(TacoError, match="--keep must be"):
            compress(model, method=method, keep=1.2, calibration=calibration_tokens)
        with pytest.raises(TacoError, match="not both"):
            compress(model, method=method, keep=0.5, layers=2, calibration=calibration_tokens)
        with pytest.raises(TacoError, match="--compression-ratio goes with"):
            compress(model, method=method, keep=0.5, compression_ratio=0.5, calibration=calibration_tokens)


def test_a_workspace_of_another_calibration_is_refused(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    workspace = Workspace(model, Calibration(calibration_tokens, "tokens", 0))
    with pytest.raises(TacoError, match="workspace"):
        compress(model, method="fwsvd", keep=0.8, calibration=calibration_tokens.flip(0), workspace=workspace)
