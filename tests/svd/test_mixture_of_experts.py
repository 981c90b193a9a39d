"""Mixtures of experts (Mixtral, Qwen2-MoE, Qwen3-MoE): every expert is a pair of linear maps, or all stay whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from taco_svd import TacoError, UnsupportedModelError, compress, save_compressed
from taco_svd.architectures import Architecture
from taco_svd.baselines import Workspace
from taco_svd.bench import BenchSettings, run_bench, work
from taco_svd.bench_memory import cache_bytes
from taco_svd.bench_models import BenchModels
from taco_svd.bench_runner import Runner
from taco_svd.calibration import Calibration
from taco_svd.checkpoint import load_model
from taco_svd.experts import Expert, OpenExperts, expert_number, kind_of, names_experts, opened, stacked
from taco_svd.export import to_dense, with_layers_removed
from taco_svd.methods import METHODS as FACTS
from taco_svd.model_size import parameter_count, weight_bytes

from .tiny_models import VOCABULARY

LAYERS = 4
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_COMMON, intermediate_size=40, num_local_experts=3)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**_COMMON, intermediate_size=48, moe_intermediate_size=24, num_experts=5)
    ),
    # experts that some tokens share stand beside the others as ordinary linear maps
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **{key: value for key, value in _COMMON.items() if key != "head_dim"},
            intermediate_size=48,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=28,
            num_experts=4,
        )
    ),
}  # fmt: skip
WHOLE = ("bridge", "removal", "svd-llm")
METHODS = (*(name for name, facts in FACTS.items() if facts.opens_experts), *WHOLE)


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.config.architectures = [type(model).__name__]
    return model


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found(name: str) -> None:
    architecture = Architecture(build(name))
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    shared = {f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")} if name == "qwen2_moe" else set()
    assert set(architecture.paths) == attention | shared
    assert architecture.experts_block == "mlp"


@pytest.mark.parametrize(
    "method, loaded, experts",
    [(method, False, "factorised") for method in METHODS]
    + [("taco", True, "factorised"), ("taco", True, "whole"), ("bridge", True, "whole")],
)
@pytest.mark.parametrize("name", MODELS)
def test_compress_save_reload_generate(
    name: str, method: str, loaded: bool, experts: str, calibration_tokens: torch.Tensor, tmp_path: Path
) -> None:
    dense = build(name)
    if loaded:  # the form on the hub has one tensor per expert; transformers joins them as it reads
        dense.save_pretrained(tmp_path / "dense")
        dense, _ = load_model(tmp_path / "dense")
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    small, plan = compress(dense, method=method, layers=[1, 2], calibration=calibration_tokens, experts=experts)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert plan.result["parameters"] == parameter_count(small) < parameter_count(dense)
    assert plan.result["bytes"] == weight_bytes(small)
    for position, source in enumerate(plan.structure.kept):
        ours, theirs = small.model.layers[position].mlp, dense.model.layers[source].mlp
        assert torch.equal(ours.gate.weight, theirs.gate.weight)
        if FACTS[method].opens_experts and experts == "factorised":
            assert names_experts(plan.structure) and isinstance(ours.experts, OpenExperts)
            assert not ours.experts.run_idle
            continue
        for key, value in theirs.experts.state_dict().items():
            assert torch.equal(ours.experts.state_dict()[key], value)
    save_compressed(small, plan, tmp_path / "small", max_shard_size="40KB")
    again, _ = load_model(tmp_path / "small")
    for key, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    if loaded:
        assert again.config._experts_implementation == small.config._experts_implementation
    # a model that was built by its class alone runs its experts one by one, a loaded one all at once
    again.config._experts_implementation = small.config._experts_implementation
    # torch's products of few rows round by where a matrix begins in memory: in a file that is anywhere
    again = copy.deepcopy(again)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)
        made = again.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(made, small.generate(ids, max_new_tokens=4, do_sample=False)) and made.shape[1] > 7


def test_taco_by_a_budget(calibration_tokens: torch.Tensor) -> None:
    dense = build("mixtral")
    keep = 0.93
    small, plan = compress(dense, method="taco", keep=keep, calibration=calibration_tokens)
    assert parameter_count(small) <= keep * parameter_count(dense)
    assert plan.structure.low_rank or plan.structure.removed
    with pytest.raises(TacoError, match="cannot be reached"):
        compress(dense, method="paper", keep=0.5, calibration=calibration_tokens, experts="whole")
    with pytest.raises(TacoError, match="--experts must be one of"):
        compress(dense, keep=keep, calibration=calibration_tokens, experts="some")


@pytest.mark.parametrize("name", MODELS)
def test_open_experts_compute_what_closed_ones_do(name: str) -> None:
    dense = build(name).double()
    dense.config._experts_implementation = "eager"  # the joint product has no float64
    ids = torch.randint(3, VOCABULARY, (2, 9))
    for run_idle in (False, True):
        model = opened(dense, run_idle)
        assert model is not dense and opened(model) is model
        assert parameter_count(model) == parameter_count(dense)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-12, atol=1e-12)
    # the same memory: nothing was copied
    stack = dense.model.layers[0].mlp.experts.down_proj
    assert model.model.layers[0].mlp.experts[1].down_proj.weight.data_ptr() == stack[1].data_ptr()
    again = stacked(model.model.layers[0].mlp.experts, dense.model.layers[0].mlp.experts)
    assert torch.equal(again.gate_up_proj, dense.model.layers[0].mlp.experts.gate_up_proj)


def one_by_one(
    experts: OpenExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Every expert asked for its tokens in turn; and (expert, tokens) of those that ran."""
    total, ran = torch.zeros_like(hidden), []
    for number, expert in enumerate(experts):
        token, place = torch.where(index == number)
        if len(token) or experts.run_idle:
            ran.append((number, len(token)))
            total.index_add_(0, token, (expert(hidden[token]) * weights[token, place, None]).to(total.dtype))
    return total, ran


@pytest.mark.parametrize("run_idle", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_open_experts_are_the_plain_loop_bit_by_bit(dtype: torch.dtype, run_idle: bool) -> None:
    """Experts without tokens, numbers beyond the last one, no tokens at all; gradients too."""
    generator = torch.Generator().manual_seed(3)
    count, hidden, wide = 7, 16, 12
    made = [
        Expert(torch.nn.Linear(hidden, 2 * wide), torch.nn.Linear(wide, hidden), torch.nn.SiLU()) for _ in range(count)
    ]
    experts = OpenExperts(made, run_idle).to(dtype)
    busy = torch.tensor([0, 2, 3, 6, count, count + 2])  # 1, 4 and 5 idle, two numbers that are no expert's
    for tokens, k in ((40, 3), (1, 2), (5, 1), (0, 2)):
        x = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
        index = busy[torch.rand(tokens, len(busy), generator=generator).argsort(-1)[:, :k]]
        weights = torch.rand(tokens, k, generator=generator).to(dtype).requires_grad_()
        ran: list[tuple[int, int]] = []
        hooks = [
            expert.register_forward_hook(
                lambda _, given, __, number=number, ran=ran: ran.append((number, len(given[0])))
            )
            for number, expert in enumerate(experts)
        ]
        found = experts(x, index, weights)
        for hook in hooks:
            hook.remove()
        expected, should = one_by_one(experts, x, index, weights)
        assert ran == should and torch.equal(found, expected)
        if tokens and ran:
            seed = torch.randn(found.shape, generator=generator).to(dtype)
            parts = [x, weights, made[0].down_proj.weight]
            ours, theirs = (torch.autograd.grad(y, parts, seed, allow_unused=True) for y in (found, expected))
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("run_idle", [False, True])
def test_open_experts_ask_the_device_once(run_idle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that only the device knows makes the host wait for all that is queued on a GPU."""
    model = opened(build("qwen3_moe"), run_idle)
    asked: list[str] = []
    for name in ("item", "tolist", "unique", "nonzero", "__bool__", "__int__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, n=name, f=real, **k: asked.append(n) or f(self, *a, **k)
        )
    real_where = torch.where
    monkeypatch.setattr(torch, "where", lambda *a: (len(a) == 1 and asked.append("where")) or real_where(*a))
    experts = model.model.layers[0].mlp.experts
    experts(torch.randn(9, 32), torch.randint(5, (9, 2)), torch.rand(9, 2))
    assert asked == ["tolist"]


def test_open_experts_are_measured_eagerly_only() -> None:
    dense = build("mixtral")
    model = opened(dense, run_idle=False)
    with pytest.raises(TacoError, match="--mode compiled cannot run .* --experts whole"):
        Runner(model, "compiled", prompt=4)
    settings = BenchSettings(prompt=4, decode_steps=2, modes=("eager", "compiled"), pairs=(("compressed", "dense"),))
    told: list[object] = []
    with pytest.raises(TacoError, match="Take --mode eager"):  # before anything is measured
        run_bench(BenchModels({"dense": dense, "compressed": model}), settings, on_row=told.append)
    assert told == []
    assert Runner(model, "eager", prompt=4, decode_steps=2).decode() > 0


def test_work_counts_the_experts_that_are_used() -> None:
    """Of five experts a token uses two; with every expert used it is that of all matrices."""
    dense = build("qwen3_moe")
    for model in (dense, opened(dense)):
        layers = sum(
            parameter.numel() * (0.4 if "experts" in name else 1.0)
            for name, parameter in model.model.layers.named_parameters()
            if parameter.ndim > 1
        )
        attention = 7 * 7 * 32 * LAYERS
        assert work(model, "prefill", 3, 7) == pytest.approx(3 * (7 * layers + attention + 32 * VOCABULARY))
        alone, many = (work(model, "decode", batch, 7) for batch in (1, 1000))
        experts = 4 * sum(parameter.numel() for name, parameter in model.named_parameters() if "experts" in name)
        cache = [cache_bytes(model.config, batch, 7, torch.float32) for batch in (1, 1000)]
        assert many - cache[1] - (alone - cache[0]) == pytest.approx(0.6 * experts)


def test_paths_of_experts() -> None:
    assert expert_number("mlp.experts.13.down_proj") == 13 and expert_number("experts.0.up") == 0
    assert expert_number("mlp.down_proj") is None and expert_number("mlp.shared_expert.down_proj") is None
    assert kind_of("mlp.experts.13.down_proj") == "mlp.experts.*.down_proj"
    assert kind_of("self_attn.q_proj") == "self_attn.q_proj"


def test_an_expert_without_tokens_keeps_directions(calibration_tokens: torch.Tensor) -> None:
    dense = build("mixtral")
    idle = 2
    for layer in dense.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: _without(output, idle))
    small, plan = compress(dense, method="taco", keep=0.8, calibration=calibration_tokens)
    for ranks in plan.structure.low_rank.values():
        for path, rank in ranks.items():
            if expert_number(path) == idle:
                busy = [r for other, r in ranks.items() if kind_of(other) == kind_of(path) and other != path]
                assert rank >= 2 and rank >= 0.1 * max(busy, default=0)
    assert all(torch.isfinite(parameter).all() for parameter in small.parameters())


def _without(output: tuple[torch.Tensor, ...], idle: int) -> tuple[torch.Tensor, ...]:
    """A router's output with every token that was sent to `idle` sent to its neighbour instead."""
    logits, scores, indices = output
    return logits, scores, torch.where(indices == idle, idle - 1, indices)


def test_important_experts_keep_more(calibration_tokens: torch.Tensor) -> None:
    """An expert that sees nearly all tokens keeps more directions than those that share the rest."""
    dense = build("qwen3_moe")
    for layer in dense.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: _mostly(output))
    _, plan = compress(dense, method="taco", keep=0.75, calibration=calibration_tokens)
    full = {"gate_up_proj": 32, "down_proj": 24}
    total: dict[int, float] = {}
    for layer in plan.structure.kept:
        for number in range(5):
            for kind, most in full.items():
                rank = plan.structure.low_rank.get(layer, {}).get(f"mlp.experts.{number}.{kind}", most)
                total[number] = total.get(number, 0.0) + rank / most
    assert total[0] > 1.2 * max(total[number] for number in range(1, 5))


def _mostly(output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A router's output with the first choice always expert 0, the second one of the others."""
    logits, scores, indices = output
    second = torch.where(indices[:, 1] == 0, 1 + indices[:, 0] % 4, indices[:, 1])
    return logits, scores, torch.stack([torch.zeros_like(second), second], 1)


def test_resume_gives_the_same_experts(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    """What a work directory keeps of open experts is what they were: the same bits again."""
    dense = build("mixtral")
    first, _ = compress(dense, keep=0.85, calibration=calibration_tokens, work_dir=tmp_path / "work")
    again, _ = compress(dense, keep=0.85, calibration=calibration_tokens, work_dir=tmp_path / "work", resume=True)
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_attention_is_refitted_beside_experts(calibration_tokens: torch.Tensor) -> None:
    _, plan = compress(build("mixtral"), keep=0.85, calibration=calibration_tokens)
    assert {record["path"] for record in plan.result["consistency"]} == {"self_attn.o_proj"}


def test_no_expert_is_taken_for_a_map_that_writes_to_the_stream(calibration_tokens: torch.Tensor) -> None:
    """Beside massive activations bfloat16 rounds so much that trying alone would take an idle expert for one."""
    dense = build("mixtral", torch.bfloat16)
    with torch.no_grad():
        dense.model.embed_tokens.weight[:, 0] = 20
    for layer in dense.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: _without(output, 2))
    _, plan = compress(dense, keep=0.85, calibration=calibration_tokens)
    assert {record["path"] for record in plan.result["consistency"]} <= {"self_attn.o_proj"}


def test_bfloat16_and_a_further_save(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    small, plan = compress(
        build("qwen3_moe", torch.bfloat16), method="taco", layers=[2], calibration=calibration_tokens
    )
    save_compressed(small, plan, tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto")
    model.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype="auto")
    for key, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@torch.no_grad()
def test_export_and_comparison(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    with torch.enable_grad():
        small, plan = compress(build("mixtral"), method="taco", layers=[1, 2], calibration=calibration_tokens)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    plain = to_dense(small)
    torch.testing.assert_close(plain(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    again, _ = load_model(tmp_path / "plain")
    assert type(again) is transformers.MixtralForCausalLM
    assert torch.equal(again(ids).logits, plain(ids).logits)
    assert len(with_layers_removed(small, list(plan.redundant)).model.layers) == LAYERS - len(plan.redundant)


def test_layers_are_chosen_as_for_dense_models(calibration_tokens: torch.Tensor) -> None:
    for importance in ("bi", "angular", "greedy"):
        _, plan = compress(
            build("mixtral"), method="removal", layers=2, importance=importance, calibration=calibration_tokens
        )
        assert len(plan.redundant) == 2


def test_replaceme_refuses_experts_with_a_reason(calibration_tokens: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="router"):
        compress(build("mixtral"), method="replaceme", layers=2, calibration=calibration_tokens)


def test_methods_on_one_workspace_see_what_each_of_them_sees(calibration_tokens: torch.Tensor) -> None:
    """One takes experts whole, the next one by one: the statistics of the first are not the second's."""
    model, calibration = build("mixtral"), Calibration(calibration_tokens, "given", 0)
    alone = compress(model, method="taco", keep=0.7, calibration=calibration)[1]
    workspace = Workspace(model, calibration)
    compress(model, method="bridge", layers=1, calibration=calibration, workspace=workspace)
    after = compress(model, method="taco", keep=0.7, calibration=calibration, workspace=workspace)[1]
    assert after.structure == alone.structure and names_experts(alone.structure)


def test_single_experts_have_no_price_in_time(calibration_tokens: torch.Tensor) -> None:
    """Which of them run depends on the tokens."""
    with pytest.raises(TacoError, match="--experts whole"):
        compress(build("mixtral"), method="taco", max_latency=0.8, calibration=calibration_tokens)
