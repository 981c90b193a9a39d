"""Compressed models with accelerate, torchao and bitsandbytes, each where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from taco_svd import save_compressed
from taco_svd.replacement import LowRankBridge, LowRankLinear

from .conftest import METHODS, needs, run_two


def our_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, module in model.named_modules()
        if isinstance(module, (LowRankLinear, LowRankBridge))
        for part, tensor in module.named_parameters()
    }


@pytest.mark.parametrize("where", ["auto", "offloaded"])
def test_device_maps_and_offloading(saved: tuple[PreTrainedModel, Path], ids: torch.Tensor, where: str) -> None:
    needs("accelerate")
    model, directory = saved
    places: str | dict[str, str] = "auto"
    if where == "offloaded":
        places = {
            f"model.layers.{index}": "disk" if index in (1, 2) else "cpu" for index in range(len(model.model.layers))
        }
        places.update(dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"))
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, device_map=places, offload_folder=str(directory / "offloaded")
    )
    if where == "offloaded":
        assert any(tensor.is_meta for tensor in loaded.model.layers[1].parameters())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    tokens = [entry.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None) for entry in (loaded, model)]
    assert torch.equal(*tokens)


def test_a_layer_with_its_bridge_is_never_split(saved: tuple[PreTrainedModel, Path]) -> None:
    needs("accelerate")
    from accelerate import infer_auto_device_map

    model = saved[0]
    size = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    for share in range(1, 12):
        places = infer_auto_device_map(
            model,
            max_memory={"cpu": int(share * size / 2), "disk": 10**9},
            no_split_module_classes=list(model._no_split_modules),
        )
        assert not any(name.startswith("model.layers.") and name.count(".") > 2 for name in places), places


def quantised_is_close(quantised: torch.Tensor, plain: torch.Tensor) -> None:
    """int8 with one scale per row: each weight is off by at most 1/254 of its row's largest, at random. Logits of five
    layers stay within a tenth of their size; factors at random, or a dense map in their place, would not."""
    assert 0 < (quantised - plain).abs().max() < 0.1 * plain.abs().max()


def test_torchao_quantises_the_dense_maps_only(saved: tuple[PreTrainedModel, Path], ids: torch.Tensor) -> None:
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu"
    )
    assert type(loaded.model.layers[0].mlp.up_proj.weight) not in (torch.Tensor, torch.nn.Parameter)
    for name, tensor in our_weights(model).items():
        assert torch.equal(tensor, loaded.get_parameter(name)), name
    quantised_is_close(loaded(ids).logits, model(ids).logits)


def test_bitsandbytes_quantises_the_dense_maps_only(saved: tuple[PreTrainedModel, Path], ids: torch.Tensor) -> None:
    needs("bitsandbytes")
    needs("accelerate")
    from transformers import BitsAndBytesConfig

    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    for name, tensor in our_weights(model).items():
        # what it leaves alone it still casts to float16, its own default
        torch.testing.assert_close(loaded.get_parameter(name).to(tensor.dtype), tensor, rtol=2**-10, atol=1e-7)
    quantised_is_close(loaded(ids).logits.float(), model(ids).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_models_are_saved_and_loaded_again(
    bits: int, saved: tuple[PreTrainedModel, Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    """Quantise once, serve from the small file: 4-bit weights lie there in shapes of their own."""
    needs("bitsandbytes")
    needs("accelerate")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    loaded = AutoModelForCausalLM.from_pretrained(saved[1], quantization_config=config, device_map="cpu")
    loaded.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert type(again.model.layers[0].mlp.up_proj).__name__ == f"Linear{bits}bit".replace("8bit", "8bitLt")
    torch.testing.assert_close(again(ids).logits, loaded(ids).logits, rtol=1e-5, atol=1e-6)


TENSOR_PARALLEL = """
import sys
import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import taco_svd

torch.set_num_threads(1)
distributed.init_process_group("gloo")
ids = torch.arange(3, 21).view(2, 9)
for directory in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=2)).eval()
    except taco_svd.TacoError as error:
        print("refused:", error, flush=True)
    else:
        plain = AutoModelForCausalLM.from_pretrained(directory).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        print("same", flush=True)
"""


def test_tensor_parallelism_takes_bridges_and_refuses_factors(compressed_tiny: Callable, tmp_path: Path) -> None:
    """transformers' plan would cut both factors of a map, and the first forward pass would fail."""
    directories = []
    for method in METHODS:
        _, model, plan = compressed_tiny("llama", method)
        save_compressed(model, plan, tmp_path / method)
        directories.append(str(tmp_path / method))
    said = run_two(TENSOR_PARALLEL, *directories)
    assert said.count("same") == 2 and said.count("is factorised") == 4, said
