"""PEFT and TRL on compressed models, each where it is installed; and how PEFT is told of them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from taco_svd import TacoError, adapter_hook, compress, save_compressed, with_lora_support
from taco_svd.model_size import parameter_count
from taco_svd.modeling import CompressedConfig
from taco_svd.plan import Plan
from taco_svd.quantisation import quantise
from taco_svd.replacement import LowRankLinear

from .conftest import METHODS, ROOT, needs
from .test_calibration import tokenizer
from .test_mixture_of_experts import build
from .tiny_models import tiny_model

# frozen factors take another backend than trained ones, which rounds elsewhere: a few roundings of float32
ROUNDINGS = {"rtol": 1e-4, "atol": 1e-5}


def lora(**options: object):
    import peft

    return peft.LoraConfig(**{"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def give_weights(adapted: torch.nn.Module) -> None:
    """Left factors start at zero, and then an adapter does nothing."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    adapted.eval()


def adapted_names(model: torch.nn.Module, adapter: str = "default") -> set[str]:
    found = {name for name, module in model.named_modules() if adapter in getattr(module, "lora_A", ())}
    return {name.removeprefix("base_model.model.") for name in found}


def map_names(model: torch.nn.Module) -> set[str]:
    kinds = (torch.nn.Linear, LowRankLinear)
    return {name for name, module in model.named_modules() if isinstance(module, kinds) and "layers" in name}


def test_lora_on_factorised_maps(saved: tuple[PreTrainedModel, Path], ids: torch.Tensor, tmp_path: Path) -> None:
    needs("peft")
    import peft

    model, directory = saved
    targets = ["q_proj", "o_proj", "down_proj"]
    config = with_lora_support(peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    before = model(ids).logits
    # B starts at zero; frozen factors take another backend, which rounds elsewhere: a few roundings of float32
    torch.testing.assert_close(adapted(ids).logits, before, rtol=1e-4, atol=1e-5)
    adapted.train()
    adapted(ids, labels=ids).loss.backward()
    touched = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(touched) == len(targets) * len(model.model.layers)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    adapted.eval()
    changed = adapted(ids).logits
    assert (changed - before).abs().max() > 1e-3
    # one factorised map against its definition
    for module in adapted.modules():
        if isinstance(getattr(module, "base_layer", None), LowRankLinear):
            x = torch.randn(4, module.base_layer.in_features)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            reference = module.base_layer(x).double() + 2.0 * (x.double() @ a.double().T @ b.double().T)
            torch.testing.assert_close(module(x).double(), reference, rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(ids).logits, before, rtol=1e-4, atol=1e-5)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(directory)
    again = with_lora_support(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=again)
    # loaded adapters are frozen: their maps may take another backend too
    torch.testing.assert_close(loaded(ids).logits, changed, rtol=1e-4, atol=1e-5)


def test_all_linear_means_factorised_maps_too(saved: tuple[PreTrainedModel, Path], ids: torch.Tensor) -> None:
    needs("peft")
    import peft

    model = copy.deepcopy(saved[0])

    def config() -> peft.LoraConfig:
        return peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")

    with pytest.raises(TacoError, match="all-linear"):  # PEFT alone would adapt the dense maps and say nothing
        with_lora_support(config())
    adapted = peft.get_peft_model(model, with_lora_support(config(), model))
    wanted = {
        f"base_model.model.{name}"
        for name, module in saved[0].named_modules()
        if isinstance(module, (torch.nn.Linear, LowRankLinear)) and "layers" in name
    }
    assert {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")} == wanted
    assert len(wanted) == 7 * len(model.model.layers)
    assert torch.isfinite(adapted(ids).logits).all()


def test_lora_support_wants_a_lora_config() -> None:
    with pytest.raises(TacoError, match="LoraConfig"):
        with_lora_support(object())


def test_a_saved_adapter_loads_by_every_call(
    saved: tuple[PreTrainedModel, Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    needs("peft")
    import peft

    model, directory = saved
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), lora())
    assert adapted_names(adapted) == map_names(model)
    give_weights(adapted)
    expected = adapted(ids).logits
    assert (expected - model(ids).logits).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(directory)
    native = AutoModelForCausalLM.from_pretrained(directory)
    native.load_adapter(str(tmp_path / "adapter"))
    for loaded in (
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        native,
    ):
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, **ROUNDINGS)


def test_targets_need_not_be_named(saved: tuple[PreTrainedModel, Path]) -> None:
    """PEFT's default targets go by model type, and a compressed model's own is none that it knows."""
    needs("peft")
    import peft

    adapted = peft.get_peft_model(copy.deepcopy(saved[0]), lora(target_modules=None))
    assert {name.rpartition(".")[2] for name in adapted_names(adapted)} == {"q_proj", "v_proj"}
    assert len(adapted_names(adapted)) == 2 * len(saved[0].model.layers)


def test_ordinary_models_are_not_touched() -> None:
    needs("peft")
    import peft

    config = lora(target_modules=["q_proj"])
    adapted = peft.get_peft_model(tiny_model("llama"), config)
    assert config._custom_modules is None
    merged = adapted.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM" and not hasattr(merged.config, "taco_svd")


@pytest.mark.parametrize("method", ["taco", "paper"])
def test_several_adapters(method: str, compressed_tiny: Callable, ids: torch.Tensor) -> None:
    """One after the other, both at once, by rows of a batch; a second "all-linear" means the same maps."""
    needs("peft")
    import peft

    model = compressed_tiny("llama", method)[1]
    adapted = peft.get_peft_model(copy.deepcopy(model), lora(target_modules=["q_proj", "down_proj"]))
    adapted.add_adapter("second", lora(r=2, use_rslora=True))
    assert adapted_names(adapted, "second") == map_names(model)
    give_weights(adapted)
    rows = []
    for name in ("default", "second"):
        adapted.set_adapter(name)
        rows.append(adapted(ids[:1]).logits)
    rows.append(model(ids[:1]).logits)
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    names = ["default", "second", "__base__"]
    mixed = adapted(ids[:1].repeat(3, 1), adapter_names=names).logits
    torch.testing.assert_close(mixed, torch.cat(rows), **ROUNDINGS)

    adapted.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=5)
    adapted.set_adapter("sum")
    summed = adapted(ids).logits
    adapted.base_model.set_adapter(["default", "second"])
    both = adapted(ids).logits
    torch.testing.assert_close(summed, both, **ROUNDINGS)  # rank 3 and rank 2 fit in rank 5

    factors = {name: p for name, p in adapted.named_parameters() if name.endswith((".u", ".v"))}
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(ids).logits, both, **ROUNDINGS)
    adapted.unmerge_adapter()
    for name, p in factors.items():  # to the bit, unlike a dense map's
        assert torch.equal(adapted.get_parameter(name), p), name
    torch.testing.assert_close(adapted(ids).logits, both, **ROUNDINGS)
    adapted.merge_adapter()
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(ids[:1]).logits, rows[2], **ROUNDINGS)
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="merged"):  # last: PEFT leaves its hooks where a forward pass has failed
        adapted(ids, adapter_names=["default", "second"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_is_a_compressed_model(
    name: str, method: str, compressed_tiny: Callable, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Its config says the ranks that it has now: saved and loaded it answers the same."""
    needs("peft")
    import peft

    model = compressed_tiny(name, method)[1]
    adapted = peft.get_peft_model(copy.deepcopy(model), lora(lora_dropout=0.1))
    give_weights(adapted)
    expected = adapted(ids).logits
    assert torch.equal(pickle.loads(pickle.dumps(adapted))(ids).logits, expected)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(ids).logits, expected, **ROUNDINGS)
    before, after = model.structure, merged.structure
    assert after.low_rank == {
        layer: {path: rank + 3 for path, rank in ranks.items()} for layer, ranks in before.low_rank.items()
    }
    assert not after.pivoted and bool(before.pivoted) == (method == "taco" and name != "gpt2")
    assert (after.kept, after.bridges, after.narrow) == (before.kept, before.bridges, before.narrow)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.structure == after
    # its plan tells of the ranks and the size that it has now, and keeps what was decided before
    plan = Plan.load(tmp_path / "merged")
    assert plan == again.taco_plan and plan.structure == after
    assert plan.result["parameters"] == parameter_count(again)
    assert plan.result["share"] == plan.result["parameters"] / plan.source["parameters"]
    if before.low_rank:
        assert plan.result["parameters"] > model.taco_plan.result["parameters"]
        assert plan.result["merged_adapters"] and not {"measured_loss", "consistency"} & set(plan.result)
    assert (plan.method, plan.calibration) == (method, model.taco_plan.calibration)
    torch.testing.assert_close(again(ids).logits, expected, **ROUNDINGS)
    # an adapter of what was merged, and so on
    assert adapted_names(peft.get_peft_model(again, lora()))


def test_merging_a_part_keeps_the_other_maps_pivoted(compressed_tiny: Callable, ids: torch.Tensor) -> None:
    needs("peft")
    import peft

    model = compressed_tiny("llama", "taco")[1]
    adapted = peft.get_peft_model(copy.deepcopy(model), lora(target_modules=["up_proj"]))
    give_weights(adapted)
    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, **ROUNDINGS)
    assert merged.structure.pivoted == {
        layer: tuple(path for path in paths if "up_proj" not in path)
        for layer, paths in model.structure.pivoted.items()
    }


def test_merging_beside_integers_keeps_them(compressed_tiny: Callable, ids: torch.Tensor, tmp_path: Path) -> None:
    """Adapters on the floating factors of a model whose other factors are 8-bit integers."""
    needs("peft")
    import peft

    model = compressed_tiny("llama", "taco")[1]
    structure = model.structure
    half = {layer: tuple(path for path in ranks if "mlp" in path) for layer, ranks in structure.low_rank.items()}
    part = quantise(model, half)
    adapted = peft.get_peft_model(copy.deepcopy(part), lora(target_modules=["q_proj", "o_proj"]))
    give_weights(adapted)
    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, **ROUNDINGS)
    assert merged.structure.int8 == part.structure.int8
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.structure == merged.structure
    torch.testing.assert_close(again(ids).logits, expected, **ROUNDINGS)


def test_experts_are_adapted_and_merged(calibration_tokens: torch.Tensor, ids: torch.Tensor, tmp_path: Path) -> None:
    needs("peft")
    import peft

    model = compress(build("mixtral"), method="taco", keep=0.7, calibration=calibration_tokens)[0]
    adapted = peft.get_peft_model(model, lora(r=2))
    assert any("experts" in name for name in adapted_names(adapted))
    give_weights(adapted)
    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(ids).logits, expected, **ROUNDINGS)


def test_classifiers_are_merged_too(compressed_tiny: Callable, ids: torch.Tensor, tmp_path: Path) -> None:
    needs("peft")
    import peft

    _, model, plan = compressed_tiny("llama", "taco")
    save_compressed(model, plan, tmp_path / "model")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    adapted = peft.get_peft_model(classifier, lora(task_type="SEQ_CLS"))
    assert adapted_names(adapted) == map_names(model)
    give_weights(adapted)
    expected = adapted(ids).logits
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(ids).logits, expected, **ROUNDINGS)


def test_what_cannot_be_merged_changes_nothing(compressed_tiny: Callable, ids: torch.Tensor) -> None:
    needs("peft")
    import peft

    model = compressed_tiny("llama", "paper")[1]
    ranks = {"down_proj": 40}  # of 32 x 56; the maps before it could be merged
    adapted = peft.get_peft_model(copy.deepcopy(model), lora(rank_pattern=ranks))
    give_weights(adapted)
    expected = adapted(ids).logits
    with pytest.raises(TacoError, match=r"down_proj: merging makes rank \d+ \+ 40, too much .*taco-svd export"):
        adapted.merge_and_unload()
    assert torch.equal(adapted(ids).logits, expected)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora(lora_bias=True))
    with pytest.raises(TacoError, match="has no bias"):
        adapted.merge_and_unload()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
)
def test_what_needs_a_dense_weight_is_refused(options: dict, words: str, compressed_tiny: Callable) -> None:
    needs("peft")
    import peft

    model = copy.deepcopy(compressed_tiny("llama", "taco")[1])
    with pytest.raises(TacoError, match=words):
        peft.get_peft_model(model, lora(target_modules=["q_proj"], **options))


def test_adalora_is_refused_at_once() -> None:
    needs("peft")
    import peft

    with pytest.raises(TacoError, match="AdaLoraConfig"):
        with_lora_support(peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10))


# -- how PEFT is told ------------------------------------------------------------------------------------------------

HOOKED = """
import sys
for name in sys.argv[1].split(","):
    __import__(name)
    assert name == "peft" or sys.argv[1].startswith("peft") or "peft" not in sys.modules
import taco_svd, peft
from taco_svd import adapter_hook
from transformers import AutoModelForCausalLM

tuner = sys.modules[adapter_hook.TUNERS].BaseTuner
patched = tuner.inject_adapter
adapter_hook.hook()
assert tuner.inject_adapter is patched and hasattr(patched, "taco_svd") and patched.__name__ == "inject_adapter"
"""
ADAPTED = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == 7 * len(model.model.layers)
"""
# What the hook looks for, without PEFT.
STAND_IN = """
class BaseTuner:
    def inject_adapter(self, model, adapter_name):
        return model, adapter_name
    def merge_and_unload(self, progressbar=False, safe_merge=False, adapter_names=None):
        return self.model
"""


def run(script: str, *arguments: str, before: str = "") -> None:
    path = os.pathsep.join(filter(None, [before, str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["peft,taco_svd", "taco_svd,peft"])
def test_either_may_be_imported_first(order: str, compressed_tiny: Callable, tmp_path: Path) -> None:
    needs("peft")
    _, model, plan = compressed_tiny("llama", "taco")
    save_compressed(model, plan, tmp_path / "model")
    run(HOOKED + ADAPTED, order, str(tmp_path / "model"))


def stand_in(directory: Path, tuners: str) -> str:
    package = directory / "peft" / "tuners"
    package.mkdir(parents=True)
    (directory / "peft" / "__init__.py").write_text("import peft.tuners.tuners_utils\n")
    (package / "__init__.py").write_text("")
    (package / "tuners_utils.py").write_text(tuners)
    return str(directory)


@pytest.mark.parametrize("order", ["peft,taco_svd", "taco_svd,peft"])
def test_the_hook_without_peft_itself(order: str, tmp_path: Path) -> None:
    script = HOOKED + (
        "import torch\n"
        "made = tuner(); made.model = torch.nn.Linear(2, 2)\n"
        "assert made.inject_adapter(made.model, adapter_name='a') == (made.model, 'a')\n"
        "assert made.merge_and_unload() is made.model\n"
    )
    run(script, order, before=stand_in(tmp_path, STAND_IN))


@pytest.mark.parametrize("order", ["peft,taco_svd", "taco_svd,peft"])
def test_a_peft_of_another_make_is_left_alone(order: str, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in sys.argv[1].split(','):\n    __import__(name)\n"
        "tuner = sys.modules['peft.tuners.tuners_utils'].BaseTuner\n"
        "assert not hasattr(tuner.inject_adapter, 'taco_svd')\n"
    )
    run(script, order, before=stand_in(tmp_path, "class BaseTuner:\n    def inject_adapter(self):\n        pass\n"))


def test_there_is_one_finder() -> None:
    for _ in range(2):
        adapter_hook.hook()
    assert sum(type(finder) is adapter_hook._Finder for finder in sys.meta_path) <= 1


# -- TRL -------------------------------------------------------------------------------------------------------------


def test_configs_say_that_they_bring_no_code(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """TRL reads `auto_map` of every config whose model class is not in transformers. It must not get into the file."""
    config = AutoConfig.from_pretrained(saved[1])
    assert isinstance(config, CompressedConfig) and dict(config.auto_map) == {}
    assert "auto_map" not in config.to_dict()
    config.save_pretrained(tmp_path / "again")
    written = (tmp_path / "again" / "config.json").read_text()
    assert written == (saved[1] / "config.json").read_text() and "auto_map" not in json.dumps(written)
    with pytest.raises(TypeError):
        config.auto_map["AutoModelForCausalLM"] = "code.Model"


def test_trl_trains_compressed_models(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    needs("trl")
    needs("peft")
    import datasets
    import trl

    directory = str(saved[1])
    words = tokenizer(end=2)
    words.pad_token = words.eos_token
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False}
    texts = datasets.Dataset.from_dict({"text": ["w5 w6 w7 w8 w9"] * 4})
    pairs = datasets.Dataset.from_dict({"prompt": ["w5"] * 4, "chosen": [" w6 w7"] * 4, "rejected": [" w8 w9"] * 4})
    for config in (None, lora()):
        sft = trl.SFTTrainer(
            directory, trl.SFTConfig(str(tmp_path / "sft"), **options), train_dataset=texts, processing_class=words,
            peft_config=config,
        )  # fmt: skip
        assert sft.train().training_loss > 0
    dpo = trl.DPOTrainer(
        directory, args=trl.DPOConfig(str(tmp_path / "dpo"), **options), train_dataset=pairs, processing_class=words
    )
    assert dpo.train().training_loss > 0
