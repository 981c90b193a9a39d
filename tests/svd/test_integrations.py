"""Compressed models inside transformers' and torch's own machinery: static caches, compilers, export, generation with
an assistant, gradient checkpointing."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from taco_svd.bench_models import from_shape
from taco_svd.replacement import LowRankBridge, LowRankLinear
from taco_svd.structure import BridgeSpec, Structure

from .tiny_models import CONFIGS, tiny_model

METHODS = ("bridge", "taco", "modegpt")


def every_module() -> PreTrainedModel:
    """A llama with random weights in which everything occurs: plain and pivoted factors, a bridge, a removed layer."""
    structure = Structure(
        5,
        (0, 1, 2, 4),
        {1: {"self_attn.q_proj": 9, "mlp.down_proj": 12}, 4: {"mlp.gate_proj": 11, "mlp.up_proj": 7}},
        (BridgeSpec(2, 6),),
        pivoted={1: ("mlp.down_proj",), 4: ("mlp.gate_proj",)},
    )
    model = from_shape(CONFIGS["llama"](), structure, [3], torch.float32).models["compressed"]
    return model.requires_grad_(True)


@pytest.fixture(params=[*METHODS, "every module"])
def model(request: pytest.FixtureRequest, compressed_tiny: Callable) -> PreTrainedModel:
    return every_module() if request.param == "every module" else compressed_tiny("llama", request.param)[1]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def greedy(step: Callable, model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Tokens [batch, tokens] over a static cache: an eager prefill, then one `step` per token."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        logits = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:]
        found = []
        for _ in range(tokens):
            found.append(logits.argmax(-1))
            logits = step(input_ids=found[-1], past_key_values=cache, use_cache=True).logits
    return torch.cat(found, 1)


def expected(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """The same without any cache."""
    text = prompt
    with torch.no_grad():
        for _ in range(tokens):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return text[:, prompt.shape[1] :]


def test_static_cache_compiles_once_for_all_lengths(model: PreTrainedModel, ids: torch.Tensor) -> None:
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for length in (4, 7, 9):
        tokens = greedy(compiled, model, ids[:, :length], 6)
        assert torch.equal(tokens, expected(model, ids[:, :length], 6))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"] and not counters["recompiles"]


def test_generated_code_gives_the_same_tokens(ids: torch.Tensor) -> None:
    """As above with the compiler that users get, on the model in which everything occurs."""
    model = every_module()
    mode = "reduce-overhead" if torch.cuda.is_available() else "default"
    compiled = torch.compile(model.forward, fullgraph=True, mode=mode)
    for length in (4, 9):
        assert torch.equal(greedy(compiled, model, ids[:, :length], 5), expected(model, ids[:, :length], 5))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generate_with_a_static_cache(model: PreTrainedModel, ids: torch.Tensor) -> None:
    output = model.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=None, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(output[:, 9:], expected(model, ids, 6))


@pytest.mark.parametrize("training", [False, True])
def test_export_keeps_the_length_open(model: PreTrainedModel, ids: torch.Tensor, training: bool) -> None:
    length = torch.export.Dim("length", min=2, max=48)
    with torch.set_grad_enabled(training):
        program = torch.export.export(
            model,
            (),
            {"input_ids": ids, "use_cache": False},
            dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
            strict=False,
        )
    assert not training or any(parameter.requires_grad for parameter in program.parameters())
    for other in (ids[:, :3], ids, torch.cat([ids, ids, ids], 1)):
        exported = program.module()(input_ids=other, use_cache=False).logits
        # the same operations on the same numbers, fused differently at most: a few roundings of float32
        torch.testing.assert_close(exported, model(other, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    if not training and any(isinstance(module, LowRankBridge) for module in model.modules()):
        assert any("low_rank_bridge" in str(node.target) for node in program.graph.nodes)


def test_a_compressed_model_assists_its_dense_one(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Speculation must not change what the dense model says, however good its assistant is."""
    dense = tiny_model("llama")
    settings = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        assisted = dense.generate(ids[:1], assistant_model=model, **settings)
    finally:
        handle.remove()
    assert torch.equal(assisted, dense.generate(ids[:1], **settings))
    assert calls  # ... and it was asked


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    model: PreTrainedModel, ids: torch.Tensor, reentrant: bool
) -> None:
    model = copy.deepcopy(model)  # transformers may leave hooks behind
    calls = {"LowRankLinear": 0, "LowRankBridge": 0}

    def count(module: torch.nn.Module, _: object) -> None:
        calls[type(module).__name__] += 1

    for module in model.modules():
        if isinstance(module, (LowRankBridge, LowRankLinear)):
            module.register_forward_pre_hook(count)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.requires_grad_(True).train()
    plain = gradients()
    once = dict(calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients()
    # forward, and once more on the way back; without checkpointing only forward
    assert calls == {name: 3 * count for name, count in once.items()}
    assert set(again) == set(plain) == {name for name, _ in model.named_parameters()}
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)


def test_importing_brings_in_no_more_than_loading_needs() -> None:
    """What makes models, and the command line, are imported when they are asked for; matplotlib only to draw."""
    code = (
        "import sys, torch, transformers; from transformers import AutoModelForCausalLM, PreTrainedModel\n"
        "before = set(sys.modules)\n"
        "import taco_svd\n"
        "added = set(sys.modules) - before\n"
        "late = {'taco_svd.pipeline', 'taco_svd.baselines', 'taco_svd.cli', 'matplotlib', 'typer', 'triton', 'peft'}\n"
        "assert not late & added, late & added\n"
        "assert callable(taco_svd.compress) and 'compress' in dir(taco_svd) and 'taco_svd.pipeline' in sys.modules\n"
        "try:\n    taco_svd.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
