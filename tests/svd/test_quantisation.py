"""Factors of 8-bit integers: the model that holds them, its checkpoint, and what every command makes of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import taco_kernels
from taco_kernels.low_rank_linear_int8 import low_rank_linear_int8_reference
from taco_svd import TacoError, compress, save_compressed, with_lora_support
from taco_svd.export import to_dense
from taco_svd.int8_linear import SCALES, Int8LowRankLinear
from taco_svd.model_size import weight_bytes
from taco_svd.modeling import CompressedModel, compressed_config_class
from taco_svd.plan import Plan
from taco_svd.quantisation import quantise
from taco_svd.replacement import LowRankBridge, LowRankLinear, in_floats
from taco_svd.structure import BridgeSpec, Structure

from .conftest import needs
from .tiny_models import VOCABULARY, tiny_model

ARCHITECTURES = ("llama", "gpt2", "phi3", "qwen2")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(compressed_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A taco compression of the tiny llama, on disk."""
    _, model, plan = compressed_tiny("llama", "taco")
    directory = tmp_path_factory.mktemp("quantisation") / "small"
    save_compressed(model, plan, directory)
    return directory


def maps(model: torch.nn.Module) -> dict[str, Int8LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8LowRankLinear)}


@torch.no_grad()
def test_a_layer_with_8_bit_factors_and_a_bridge_is_read_again(tmp_path: Path, ids: torch.Tensor) -> None:
    """The bridge has the model's dtype, not that of the layer's first parameter."""
    structure = Structure(4, (0, 1), {0: {"self_attn.q_proj": 5}}, bridges=(BridgeSpec(0, 3),))
    base = tiny_model("llama").config
    base.num_hidden_layers = 2
    config = compressed_config_class(type(base)).from_dict({**base.to_dict(), "taco_svd": structure.to_dict()})
    model = quantise(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    bridges = [module for module in again.modules() if isinstance(module, LowRankBridge)]
    assert [bridge.v.dtype for bridge in bridges] == [torch.bfloat16] and len(maps(again)) == 1
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", ["taco", "paper"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_every_map_is_the_rounded_one(name: str, method: str, compressed_tiny: Callable, ids: torch.Tensor) -> None:
    """Each factor at most half a step off, everything else shared; and the model before stays what it was."""
    model = compressed_tiny(name, method)[1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = quantise(model)
    assert isinstance(made, CompressedModel) and type(made) is type(model)
    found = maps(made)
    factorised = {key: module for key, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert found.keys() == factorised.keys() and found
    for key, module in found.items():
        old = factorised[key]
        u, v = module.floating(torch.float32)
        assert float((v - old.v).abs().div(module.v_scale[:, None].clamp(min=1e-30)).max()) <= 0.5001
        assert float((u - old.u).abs().div(module.u_scale.clamp(min=1e-30)).max()) <= 0.5001
        assert module.pivot is old.pivot is None or torch.equal(module.pivot, old.pivot)
        x = torch.randn(3, module.in_features)
        expected = low_rank_linear_int8_reference(
            x, module.v, module.v_scale, module.u, module.u_scale, module.bias, module.pivot
        )
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(in_floats(module, torch.float32)(x), expected, rtol=1e-4, atol=1e-5)
    shared = {id(parameter) for parameter in model.parameters()}
    kept = [parameter for parameter in made.parameters() if id(parameter) in shared]
    assert len(kept) == len(shared) - sum(2 + (module.bias is not None) for module in factorised.values())
    assert weight_bytes(made) < weight_bytes(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not maps(model) and not model.structure.int8
    # an eight-bit factor is about a hundredth off, and so is what comes of it
    expected_logits, logits = model(ids).logits, made(ids).logits
    assert float((logits - expected_logits).norm() / expected_logits.norm()) < 0.05
    assert not torch.equal(logits, expected_logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_checkpoint_gives_the_same_model(
    name: str, compressed_tiny: Callable, ids: torch.Tensor, tmp_path: Path
) -> None:
    made = quantise(compressed_tiny(name, "taco")[1])
    made.save_pretrained(tmp_path / "small8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small8")
    assert again.structure == made.structure and again.taco_plan == made.taco_plan
    assert maps(again).keys() == maps(made).keys()
    assert torch.equal(again(ids).logits, made(ids).logits)
    plan = Plan.load(tmp_path / "small8")
    assert plan.structure.int8 and plan.result["bytes"] == weight_bytes(again)
    assert "measured_loss" not in plan.result
    # twice the same
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(third(ids).logits, made(ids).logits)
    with pytest.raises(TacoError, match="8-bit integers already"):
        quantise(again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_are_float32_in_any_model(dtype: torch.dtype, compressed_tiny: Callable, tmp_path: Path) -> None:
    made = quantise(compressed_tiny("llama", "taco")[1])
    made.save_pretrained(tmp_path / "small8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small8", dtype=dtype)
    assert loaded.dtype == dtype
    for model in (loaded, copy.deepcopy(made).to(dtype), copy.deepcopy(made).half().float().to(dtype)):
        for key, module in maps(model).items():
            for name in ("v", "u", *SCALES):
                stored = getattr(maps(made)[key], name)
                assert getattr(module, name).dtype == stored.dtype
                assert torch.equal(getattr(module, name), stored), (key, name)
        assert all(module.bias is None or module.bias.dtype == dtype for module in maps(model).values())
    shell = copy.deepcopy(made).to("meta").to(dtype)
    assert all(getattr(module, name).dtype == torch.float32 for module in maps(shell).values() for name in SCALES)


def test_the_format_of_other_models_stays(compressed_tiny: Callable) -> None:
    """Releases that know no such factors go on reading what has none, and say so of what has."""
    model = compressed_tiny("llama", "taco")[1]
    structure = model.structure
    assert structure.to_dict()["format_version"] == 2 and "int8" not in structure.to_dict()
    values = quantise(model).structure.to_dict()
    assert values["format_version"] == 3 and Structure.from_dict(values).int8
    layer = next(iter(values["int8"]))
    for damage in (["self_attn.none"], ["mlp.up_proj", "mlp.up_proj"], "mlp.up_proj", [3]):
        with pytest.raises(TacoError):
            Structure.from_dict({**values, "int8": {layer: damage}})


def test_a_plan_with_such_factors_is_carried_out(
    compressed_tiny: Callable, calibration_tokens: torch.Tensor, ids: torch.Tensor
) -> None:
    dense, model, _ = compressed_tiny("llama", "taco")
    made = quantise(model)
    again, plan = compress(dense, calibration=calibration_tokens, plan=made.taco_plan)
    assert again.structure == plan.structure == made.structure
    assert torch.equal(again(ids).logits, made(ids).logits)
    some = {layer: paths[:1] for layer, paths in made.structure.int8.items()}
    part = quantise(model, some)
    assert part.structure.int8 == some and len(maps(part)) == len(some)
    assert quantise(part).structure.int8.keys() == made.structure.int8.keys()


def test_factors_that_are_integers_already_stay_so(
    compressed_tiny: Callable, tmp_path: Path, ids: torch.Tensor
) -> None:
    """Of a model whose first layer is done whole, the rest; and the files must be what the config says."""
    model = compressed_tiny("llama", "taco")[1]
    whole = quantise(model)
    first = next(iter(whole.structure.int8))
    part = quantise(model, {first: whole.structure.int8[first]})
    rest = quantise(part)
    assert {layer: set(paths) for layer, paths in rest.structure.int8.items()} == {
        layer: set(paths) for layer, paths in whole.structure.int8.items()
    }
    assert torch.equal(rest(ids).logits, whole(ids).logits)
    with pytest.raises(TacoError, match="8-bit integers already"):
        quantise(rest)
    rest.save_pretrained(tmp_path / "rest")
    config = tmp_path / "rest" / "config.json"
    values = json.loads(config.read_text())
    del values["taco_svd"]["int8"][str(first)]
    config.write_text(json.dumps(values))
    with pytest.raises(TacoError, match="holds integers in the files and numbers by the config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "rest")


def test_what_has_no_factors_is_refused(compressed_tiny: Callable) -> None:
    with pytest.raises(TacoError, match="not a compressed model"):
        quantise(tiny_model("llama"))
    with pytest.raises(TacoError, match="No matrix of this model is factorised"):
        quantise(compressed_tiny("llama", "bridge")[1])
    broken = copy.deepcopy(compressed_tiny("llama", "paper")[1])
    next(module for module in broken.modules() if isinstance(module, LowRankLinear)).u.data[0, 0] = float("nan")
    with pytest.raises(TacoError, match=r"layer \d+, .*not finite"):
        quantise(broken)


@torch.no_grad()
def test_dense_again(compressed_tiny: Callable, ids: torch.Tensor) -> None:
    made = quantise(compressed_tiny("gpt2", "taco")[1])
    ordinary = to_dense(made)
    assert not isinstance(ordinary, CompressedModel) and not maps(ordinary)
    torch.testing.assert_close(ordinary(ids).logits, made(ids).logits, rtol=1e-4, atol=1e-4)


def test_every_command_takes_it(saved: Path, invoke: Callable, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number) for number in range(2000)))
    out = tmp_path / "small8"
    code, stdout, stderr = invoke("quantize", saved, "--out", out, "--json")
    assert code == 0, stderr
    values = json.loads(stdout)
    assert values["maps"] > 0 and values["bytes"] < values["bytes_before"]
    code, stdout, _ = invoke("info", out)
    assert code == 0 and f"of {values['maps']} of {values['maps']} factorised maps" in stdout
    code, stdout, stderr = invoke(
        "bench", out, "--prompt", "8", "--decode", "4", "--rounds", "1", "--against", "dense", "--json"
    )
    assert code == 0, stderr
    # with the few bytes of rotary tables
    assert values["bytes"] <= json.loads(stdout)["weight_bytes"]["compressed"] < values["bytes_before"]
    code, _, stderr = invoke("export", out, "--dense", tmp_path / "ordinary")
    assert code == 0, stderr
    code, _, stderr = invoke("heal", out, "--out", tmp_path / "healed", "--text", text)
    assert code == 2 and "heal first, then quantize" in stderr
    code, _, stderr = invoke("quantize", out, "--out", tmp_path / "other")
    assert code == 2 and "8-bit integers already" in stderr and not (tmp_path / "other").exists()
    code, _, stderr = invoke("quantize", saved, "--out", out)
    assert code == 2 and "--force" in stderr


def test_a_shape_with_such_factors_is_timed(monkeypatch: pytest.MonkeyPatch, invoke: Callable) -> None:
    import taco_svd.shapes as shapes

    monkeypatch.setattr(shapes, "shape_config", lambda _: tiny_model("llama").config)
    small = ("--prompt", "8", "--decode", "4", "--rounds", "1", "--against", "dense", "--json")
    bytes_of = {}
    for extra in ((), ("--int8",)):
        code, stdout, stderr = invoke("bench", "--shape", "tiny", "--method", "taco", "--keep", "0.8", *small, *extra)
        assert code == 0, stderr
        bytes_of[extra] = json.loads(stdout)["weight_bytes"]["compressed"]
    assert bytes_of[("--int8",)] < bytes_of[()]
    code, _, stderr = invoke("bench", "--shape", "tiny", "--method", "bridge", "--int8", *small[:-1])
    assert code == 2 and "--int8 goes with --method paper or taco" in stderr


def test_damaged_checkpoints_are_refused(compressed_tiny: Callable, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made = quantise(compressed_tiny("llama", "taco")[1])
    made.save_pretrained(tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "model.safetensors")
    pivot = next(name for name in tensors if name.endswith(".pivot"))
    base = pivot.removesuffix("pivot")
    for name, value, words in (
        (pivot, torch.zeros_like(tensors[pivot]), "is no permutation"),
        (f"{base}v_scale", tensors[f"{base}v_scale"][:-1].clone(), "the shape of"),
        (f"{base}u", None, "missing"),
    ):
        directory = tmp_path / name.rpartition(".")[2]
        made.save_pretrained(directory)
        changed = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file({**changed, **({} if value is None else {name: value})}, directory / "model.safetensors")
        (directory / "taco_checksums.json").unlink()
        with pytest.raises(TacoError, match=words):
            AutoModelForCausalLM.from_pretrained(directory)


def test_lora_on_top(compressed_tiny: Callable, ids: torch.Tensor) -> None:
    """Frozen 8-bit factors under trained adapters; nothing can be merged into them."""
    needs("peft")
    import peft

    made = quantise(compressed_tiny("llama", "taco")[1])
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(made), with_lora_support(config, made))
    over = [name for name, module in adapted.named_modules() if isinstance(getattr(module, "base_layer", None),
                                                                          Int8LowRankLinear)]  # fmt: skip
    assert len(over) == len(maps(made))
    torch.testing.assert_close(adapted(ids).logits, made(ids).logits, rtol=1e-4, atol=1e-4)
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with pytest.raises(TacoError, match="8-bit integers, into which nothing is merged"):
        adapted.merge_and_unload()


def test_compiled_and_generated(compressed_tiny: Callable, ids: torch.Tensor) -> None:
    made: PreTrainedModel = quantise(compressed_tiny("llama", "taco")[1]).eval()
    torch.compiler.reset()
    compiled = torch.compile(made.forward, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(ids).logits, made(ids).logits, rtol=1e-4, atol=1e-4)
        assert made.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 16)
    assert taco_kernels.get_backend() is None
