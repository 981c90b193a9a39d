"""Arguments of `compress` that are none: each gets a sentence that says what to do, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

import taco_svd
from taco_svd import TacoError, UnsupportedModelError, pipeline

from .tiny_models import tiny_model


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the weights are looked at, which is the first thing that takes long."""

    def looked(model: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(pipeline, "weight_sums", looked)


class _Adapter(nn.Module):
    """A layer as PEFT puts it around another one."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})


class _PeftModel(nn.Module):
    """A model as PEFT wraps it: it has whatever the model has, but is none."""

    def __init__(self, base_model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = base_model
        self.peft_config: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


class _Quantised(torch.Tensor):
    """A tensor subclass with a shape and a dtype of its own, as torchao's are."""

    @staticmethod
    def __new__(cls, whole: torch.Tensor) -> _Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)  # type: ignore[attr-defined]

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].whole)
        return function(*[each.whole if isinstance(each, cls) else each for each in args], **(kwargs or {}))


class _Packed(nn.Parameter):
    """A class of parameters of its own, as bitsandbytes' are."""


def with_projections(change: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    model: Any = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = change(layer.self_attn.q_proj)
    return model  # type: ignore[no-any-return]


def quantised(kind: Callable[[torch.Tensor], nn.Parameter]) -> PreTrainedModel:
    def change(linear: nn.Linear) -> nn.Linear:
        linear.weight = kind(linear.weight.data)
        return linear

    return with_projections(change)


def dynamic() -> nn.Module:
    with pytest.warns():
        made: nn.Module = torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {nn.Linear}, dtype=torch.qint8)
    return made


def in_inference_mode() -> PreTrainedModel:
    with torch.inference_mode():
        return tiny_model("llama")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: "org/model", "AutoModelForCausalLM.from_pretrained"),
        (lambda: Path("model"), "AutoModelForCausalLM.from_pretrained"),
        (lambda: None, "got NoneType"),
        (lambda: nn.Linear(3, 3), "Linear is no transformers model"),
        (lambda: torch.compile(tiny_model("llama")), "the one that was compiled"),
        (lambda: nn.DataParallel(tiny_model("llama")), ".module"),
        (lambda: _PeftModel(tiny_model("llama")), "merge_and_unload"),
        (lambda: with_projections(_Adapter), "merge_and_unload"),
        (lambda: quantised(lambda weight: nn.Parameter(_Quantised(weight), False)), "quantised.*q_proj.*_Quantised"),
        (lambda: quantised(_Packed), "quantised.*q_proj.*_Packed"),
        (dynamic, "quantised.*q_proj"),
        (lambda: AutoModel.from_config(tiny_model("llama").config), "LlamaModel has no language-modelling head"),
        (lambda: AutoModel.from_config(tiny_model("gpt2").config), "GPT2Model has no language-modelling head"),
        (
            lambda: AutoModelForSequenceClassification.from_config(tiny_model("llama").config),
            "ForSequenceClassification has no language-modelling head",
        ),
        (in_inference_mode, "made inside torch.inference_mode"),
    ],
)
def test_what_is_no_plain_language_model(make: Callable[[], Any], says: str) -> None:
    model = make()
    with pytest.raises(TacoError, match=says) as error:
        taco_svd.compress(model, layers=1)
    assert ("quantised" in says) == isinstance(error.value, UnsupportedModelError)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_work")
def test_inference_mode_is_to_be_left() -> None:
    model = tiny_model("llama")
    with torch.inference_mode(), pytest.raises(TacoError, match="outside of it"):
        taco_svd.compress(model, layers=1, method="removal")


class _Processor:
    def __init__(self) -> None:
        from .test_calibration import tokenizer

        self.tokenizer = tokenizer()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"tokenizer": "org/model"}, "AutoTokenizer.*got str"),
        ({"tokenizer": _Processor()}, r"\.tokenizer"),
        ({"layers": 2.0}, "layers.*2.0"),
        ({"layers": "2"}, "layers.*'2'"),
        ({"layers": True}, "layers.*True"),
        ({"layers": [1, 2.0]}, "layers.*2.0"),
        ({"layers": np.zeros(2)}, "layers"),
        ({"samples": 4.0}, "samples"),
        ({"samples": None}, "samples"),
        ({"seq_len": 16.0}, "seq_len"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "x" * 1000}, "seed"),
        ({"method": "bridge", "bridge_rank": 2.0}, "bridge_rank"),
        ({"layers": None, "keep": [0.8]}, "keep"),
        ({"layers": None, "keep": True}, "keep"),
        ({"compression_ratio": "0.5"}, "compression_ratio"),
        ({"method": "bridge", "max_overhead": "0.1"}, "max_overhead"),
        ({"plan": "plan.json"}, "Plan.load"),
        ({"plan": {"method": "taco"}}, "Plan.load"),
        ({"work_dir": 3}, "work_dir"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(TacoError, match=says) as error:
        taco_svd.compress(tiny_model("llama"), **{"layers": 1, **arguments})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("layers", [range(1, 3), [np.int64(1), 2], (1, 2)])
def test_whole_numbers_of_any_type(layers: Any) -> None:
    plan = taco_svd.compress(
        tiny_model("llama"), layers=layers, method="removal", samples=np.int32(2), seq_len=np.int64(8), seed=np.int64(1)
    )[1]
    assert plan.redundant == (1, 2)
    assert taco_svd.Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("out", ["file/x", "file/x/y", "a" * 300, "a" * 300 + "/b", "a" * 250, "a\0b", None, 3])
def test_saving_where_nothing_can_be(out: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compressed, plan = taco_svd.compress(tiny_model("llama"), layers=1, method="removal", samples=2, seq_len=8)
    with pytest.raises(TacoError, match="cannot be|must be"):
        taco_svd.save_compressed(compressed, plan, str(tmp_path / out) if isinstance(out, str) else out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
