"""What the plugin tells vLLM: model classes, configs, bridges; and what it refuses. No engine is started."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make test-vllm` sets it up and runs this", allow_module_level=True)

import transformers
import vllm
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.stablelm import StablelmDecoderLayer
from vllm.transformers_utils.config import get_config, get_config_parser

from taco_svd import BridgeSpec, TacoError
from taco_svd.checkpoint import DEFAULT_MODEL
from taco_svd.modeling import compressed_config_class
from taco_svd.structure import NarrowSpec, Structure
from taco_svd.vllm import register
from taco_svd.vllm.bridges import Bridge, attach
from taco_svd.vllm.models import ServedModel, decoder_layers, expected_weights
from taco_svd.vllm.registration import as_vllm_expects, served_name

from .random_checkpoints import CONFIGS, KEPT, random_model, write_checkpoint


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "llama")


def test_registering_twice_changes_nothing() -> None:
    before, parser = dict(ModelRegistry.models), type(get_config_parser("hf"))
    register()
    assert ModelRegistry.models == before
    assert type(get_config_parser("hf")) is parser
    assert not any(name.startswith("TacoTaco") for name in before)


def test_what_vllm_remembers_of_a_model_class_is_of_this_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    entry: Any = ModelRegistry.models["TacoLlamaForCausalLM"]
    found = entry.inspect_model_cls()
    (file,) = (tmp_path / "modelinfos").iterdir()
    assert vllm.__version__ in file.name and "TacoLlamaForCausalLM" in file.name
    assert found.architecture == entry.inspect_model_cls().architecture == "TacoLlamaForCausalLM"
    assert len(list((tmp_path / "modelinfos").iterdir())) == 1


def test_vllm_sees_an_ordinary_config(llama: Path) -> None:
    config: Any = get_config(str(llama), trust_remote_code=False)
    assert type(config) is transformers.LlamaConfig and config.model_type == "llama"
    assert config.architectures == ["TacoLlamaForCausalLM"]
    assert config.num_hidden_layers == len(KEPT) and config.vocab_size == 384
    assert Structure.from_dict(config.taco_svd).kept == KEPT
    again = pickle.loads(pickle.dumps(config))  # it goes to vLLM's other processes
    assert again.taco_svd == config.taco_svd


def test_configs_of_others_are_left_alone() -> None:
    config = get_config(str(DEFAULT_MODEL), trust_remote_code=False)
    assert config.to_dict() == AutoConfig.from_pretrained(DEFAULT_MODEL).to_dict()
    assert as_vllm_expects(config) is config


def test_two_structures_never_share_a_compiled_graph(tmp_path: Path) -> None:
    """vLLM keys compiled graphs by the config's JSON: factors of other ranks must give another key."""
    one = get_config(str(write_checkpoint("llama", tmp_path / "one")), trust_remote_code=False)
    other = get_config(str(write_checkpoint("llama", tmp_path / "other", bridges=False)), trust_remote_code=False)
    assert one.to_json_string() != other.to_json_string()


def test_an_architecture_that_vllm_has_not_goes_to_its_transformers_backend() -> None:
    assert "HeliumForCausalLM" not in ModelRegistry.models, "choose another architecture for this test"
    config = as_vllm_expects(random_model("helium").config)
    assert config.architectures == ["TacoTransformersForCausalLM"]
    assert "TacoTransformersForCausalLM" in ModelRegistry.models


def test_what_is_no_language_model_is_a_classifier_or_refused() -> None:
    """It used to be taken for a language model in the Transformers backend, which then missed weights."""
    assert served_name("TacoLlamaForSequenceClassification") == "TacoLlamaForSequenceClassification"
    assert served_name("TacoGPT2ForSequenceClassification") == "TacoGPT2ForSequenceClassification"
    assert served_name("TacoHeliumForCausalLM") == served_name("") == "TacoTransformersForCausalLM"
    for name in ("TacoLlamaModel", "TacoHeliumForSequenceClassification"):
        with pytest.raises(TacoError, match=name):
            served_name(name)


def test_windows_of_gpt_oss_must_alternate_still() -> None:
    """vLLM's class goes by whether a layer's number is even, whatever the config says."""
    for removed, refused in (((2,), True), ((2, 3), False), ((), False)):
        kinds = [
            kind for number, kind in enumerate(("sliding_attention", "full_attention") * 3) if number not in removed
        ]
        plain = transformers.GptOssConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=len(kinds), layer_types=kinds, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=32, num_local_experts=4, sliding_window=8,
        )  # fmt: skip
        kept = tuple(number for number in range(6) if number not in removed)
        values = {
            **plain.to_dict(),
            "taco_svd": Structure(6, kept).to_dict(),
            "architectures": ["TacoGptOssForCausalLM"],
        }
        config = compressed_config_class(transformers.GptOssConfig).from_dict(values)
        if refused:
            with pytest.raises(TacoError, match="every second layer"):
                as_vllm_expects(config)
        else:
            assert as_vllm_expects(config).layer_types == kinds


def test_vllm_knows_its_transformers_backend_again() -> None:
    """By the class's name, on which fusions depend."""
    made = ModelRegistry.models["TacoTransformersForCausalLM"].load_model_cls()
    assert made.__name__ == "TransformersForCausalLM" and issubclass(made, ServedModel)
    assert pickle.loads(pickle.dumps(made)) is made
    assert ModelRegistry.models["TacoLlamaForCausalLM"].load_model_cls().__name__ == "TacoLlamaForCausalLM"


def test_narrowed_maps_are_refused() -> None:
    config: Any = random_model("llama").config
    structure = Structure(6, KEPT, narrow={1: {"mlp.up_proj": NarrowSpec(8, 128)}})
    config.taco_svd = structure.to_dict()
    with pytest.raises(TacoError, match="export"):
        as_vllm_expects(config)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_expected_weights_are_those_of_the_checkpoint(name: str) -> None:
    model = random_model(name)
    expected = expected_weights(as_vllm_expects(model.config))
    stored = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    assert expected == {key: shape for key, shape in stored.items() if key not in tied}
    assert any(key.endswith(".pivot") for key in expected) and any(key.endswith("bridge.v") for key in expected)


class _Loader(nn.Module):
    """A model of vLLM's with three parameters, whose loader passes over the names in `unknown`."""

    unknown: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Module(), nn.Module()
        self.a.weight, self.b.v = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
        self.other = nn.Parameter(torch.zeros(1))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return {name for name, _ in weights if name not in self.unknown}


class _Served(ServedModel, _Loader):
    def __init__(self) -> None:
        _Loader.__init__(self)
        self._taco_expected = {"a.weight": (2, 3), "b.v": (4,)}


def test_missing_and_misshapen_weights_stop_the_loading() -> None:
    whole = {"a.weight": torch.zeros(2, 3), "b.v": torch.zeros(4), "other": torch.zeros(1)}
    assert _Served().load_weights(whole.items()) == set(whole)
    assert _Served().load_weights(whole.items()) == set(whole)
    with pytest.raises(TacoError, match=r"1 weights are missing.*b\.v"):
        _Served().load_weights([("a.weight", whole["a.weight"])])
    with pytest.raises(TacoError, match=r"b\.v is \(5,\)"):
        _Served().load_weights([*whole.items(), ("b.v", torch.zeros(5))][::-1])


def test_weights_that_a_loader_passes_over_stop_the_loading() -> None:
    whole = {"a.weight": torch.zeros(2, 3), "b.v": torch.zeros(4), "other": torch.zeros(1)}
    served = _Served()
    served.unknown = ("other",)
    with pytest.raises(TacoError, match="filled 1 of its weights from nothing.*other.*serve it with transformers"):
        served.load_weights(whole.items())


def test_weights_that_come_later_may_come_in_parts() -> None:
    """Reinforcement learning sends them one after the other, each by a call of its own."""
    served = _Served()
    served.process_weights_after_loading()  # vLLM's call after the first ones, also after dummies
    assert served.load_weights([("b.v", torch.zeros(4))]) == {"b.v"}
    with pytest.raises(TacoError, match=r"b\.v is \(5,\)"):
        served.load_weights([("b.v", torch.zeros(5))])


@pytest.mark.parametrize("kind", ["online", "cache", "stored"])
def test_what_vllm_computes_itself_is_not_missed(kind: str) -> None:
    """Scales of layers that vLLM quantises while loading, and those of its key/value cache, are in no checkpoint."""

    class Method:
        uses_meta_device = kind == "online"

    whole = {"a.weight": torch.zeros(2, 3), "b.v": torch.zeros(4), "other": torch.zeros(1)}
    served = _Served()
    served.a.weight_scale = nn.Parameter(torch.ones(1))
    served.a.quant_method = BaseKVCacheMethod(None) if kind == "cache" else Method()
    if kind == "stored":
        with pytest.raises(TacoError, match=r"filled 1 of its weights from nothing.*a\.weight_scale"):
            served.load_weights(whole.items())
    else:
        assert served.load_weights(whole.items()) == set(whole)


@pytest.mark.parametrize("bridges, low_rank", [(True, False), (False, True), (False, False)])
def test_batch_invariance_is_refused_where_it_would_not_hold(
    bridges: bool, low_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Built(Exception):
        pass

    class Base:
        def __init__(self, **kwargs: Any) -> None:
            raise Built

    class Served(ServedModel, Base):  # type: ignore[misc]
        pass

    structure = Structure(
        source_layers=2,
        kept=(0,),
        low_rank={0: {"mlp.up_proj": 3}} if low_rank else {},
        bridges=(BridgeSpec(0, 2),) if bridges else (),
    )
    hf_config = SimpleNamespace(taco_svd=structure.to_dict())
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config), quant_config=None)
    with pytest.raises(Built):
        Served(vllm_config=config)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    refusal = pytest.raises(TacoError, match="BATCH_INVARIANT") if bridges or low_rank else pytest.raises(Built)
    with refusal:
        Served(vllm_config=config)


def test_what_vllm_is_told_of_layouts_reaches_the_layers() -> None:
    class Base:
        def __init__(self, vllm_config: Any, **kwargs: Any) -> None:
            told.append(vllm_config.quant_config.choice)
            raise LookupError

    class Served(ServedModel, Base):  # type: ignore[misc]
        pass

    told: list[str] = []
    hf_config = SimpleNamespace(taco_svd=Structure(source_layers=2, kept=(0,)).to_dict())
    for additional in ({}, {"taco_tensor_parallel": "split"}, {"taco_tensor_parallel": "halves"}):
        config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=hf_config), quant_config=None, additional_config=additional
        )
        with pytest.raises(TacoError if "halves" in additional.values() else LookupError):
            Served(vllm_config=config)
    assert told == ["auto", "split"]


def test_the_layers_are_found() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))

    model = nn.Module()
    model.layers = nn.ModuleList(block() for _ in range(4))
    model.small = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
    assert decoder_layers(model, 4) is model.layers
    with pytest.raises(TacoError, match="found 0"):
        decoder_layers(model, 5)
    model.again = nn.ModuleList(block() for _ in range(4))
    with pytest.raises(TacoError, match="found 2"):
        decoder_layers(model, 4)


class LlamaDecoderLayer(nn.Module):  # by the name of vLLM's
    def forward(self, positions: Any, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return hidden * 2, residual


class SingleLayer(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2


class StrangeLayer(LlamaDecoderLayer):
    def forward(self, positions: Any, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return hidden, residual


@pytest.mark.parametrize("bias", [False, True])
def test_bridges_do_the_same_to_a_pair_and_to_a_sum(bias: bool) -> None:
    hidden, eps = 24, 1e-5
    x, residual = torch.randn(7, hidden), torch.randn(7, hidden)
    with set_current_vllm_config(VllmConfig()):
        layers: list[Any] = [LlamaDecoderLayer(), SingleLayer(), LlamaDecoderLayer()]
        v, u, b = torch.randn(5, hidden), torch.randn(hidden, 5), torch.randn(hidden)
        for layer in layers:
            attach(layer, BridgeSpec(0, 5, bias, eps), hidden, torch.float32)
            layer.bridge.v.data, layer.bridge.u.data = v, u
            if bias:
                layer.bridge.bias.data = b
        found, stream = layers[0](None, x, residual)
        (alone, nothing), single = layers[2](None, x, None), layers[1](x)

    def exact(stream: torch.Tensor) -> torch.Tensor:
        wide = stream.double()
        normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        return wide + normed @ v.double().T @ u.double().T + (b.double() if bias else 0)

    tolerance = 60 * torch.finfo(torch.float32).eps * (hidden * 5) ** 0.5
    torch.testing.assert_close((found + stream).double(), exact(2 * x + residual), rtol=0, atol=tolerance)
    torch.testing.assert_close(stream, 2 * x + residual, rtol=0, atol=1e-6)
    torch.testing.assert_close(single.double(), exact(2 * x), rtol=0, atol=tolerance)
    assert nothing is None and torch.equal(alone, single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_bridge_has_a_weight_that_changes_nothing(dtype: torch.dtype) -> None:
    """vLLM fuses an all-reduce and the norm after it into a kernel that cannot do without the norm's weight."""
    x, residual = torch.randn(7, 24).to(dtype), torch.randn(7, 24).to(dtype)
    with set_current_vllm_config(VllmConfig()):
        bridge = Bridge(24, BridgeSpec(0, 5, bias=False), dtype)
        weightless: Any = RMSNorm(24, eps=bridge.eps, has_weight=False, dtype=dtype)
        found = bridge.norm(x.clone(), residual.clone())
        expected = weightless(x.clone(), residual.clone())
        traced = make_fx(bridge.norm)(x.clone(), residual.clone())
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    norms = [node for node in traced.graph.nodes if "fused_add_rms_norm" in str(node.target)]
    assert [node.args[2] is None for node in norms] == [False]
    # nothing that a checkpoint must fill, nothing that it holds
    assert [name for name, _ in bridge.named_parameters()] == ["v", "u"] == list(bridge.state_dict())
    assert dict(bridge.named_buffers()).keys() == {"norm.weight"}


def test_a_pair_of_unknown_meaning_is_refused() -> None:
    with pytest.raises(TacoError, match="StrangeLayer"):
        attach(StrangeLayer(), BridgeSpec(0, 2), 8, torch.float32)


def test_a_pair_that_only_comes_out_is_refused() -> None:
    """StableLM's layers take the stream and give it back with another tensor, that of before the MLP."""
    stable = StablelmDecoderLayer.__new__(StablelmDecoderLayer)
    nn.Module.__init__(stable)
    with pytest.raises(TacoError, match="StablelmDecoderLayer"):
        attach(stable, BridgeSpec(0, 2), 8, torch.float32)

    class Unannotated(nn.Module):
        def forward(self, hidden: torch.Tensor):  # type: ignore[no-untyped-def]
            return hidden * 2, hidden

    layer = Unannotated()
    with set_current_vllm_config(VllmConfig()):
        attach(layer, BridgeSpec(0, 2), 8, torch.float32)
        with pytest.raises(TacoError, match="Unannotated"):
            layer(torch.ones(1, 8))


def test_a_layer_whose_forward_vllm_has_replaced_is_refused() -> None:
    """As its prefetching of offloaded weights does: the bridge would be passed over in silence."""
    layer = SingleLayer()
    layer.forward = layer.forward  # type: ignore[method-assign]
    with pytest.raises(TacoError, match="offload"):
        attach(layer, BridgeSpec(0, 2), 8, torch.float32)


def test_every_tested_architecture_has_a_class() -> None:
    for name in CONFIGS:
        config = as_vllm_expects(random_model(name).config)
        assert config.architectures[0] in ModelRegistry.models
