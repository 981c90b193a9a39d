"""Checkpoints: never half written, never loaded half, never loaded by code that does not know them."""

from __future__ import annotations

import copy
import errno
import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from taco_svd import Plan, Structure, TacoError, compress, save_compressed
from taco_svd.checkpoint import describe, load_model
from taco_svd.output_directory import check_output, write_whole
from taco_svd.untrusted import check_size

from .conftest import Compressed
from .tiny_models import VOCABULARY, tiny_model

WITHOUT_PACKAGE = """
import sys
import transformers
assert not any(name.split(".")[0] in ("taco_svd", "taco_kernels") for name in sys.modules)
directory = sys.argv[1]
for loader in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.AutoConfig,
               transformers.LlamaConfig):
    try:
        loader.from_pretrained(directory)
    except Exception as error:
        print(loader.__name__, "taco_svd" in str(error))
    else:
        print(loader.__name__, "loaded")
"""


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_code_without_the_package_is_told_what_it_lacks(checkpoint: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(checkpoint)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    answers = [line for line in result.stdout.splitlines() if line.endswith(("True", "False", "loaded"))]
    assert answers == ["AutoModelForCausalLM True", "LlamaForCausalLM True", "AutoConfig True", "LlamaConfig True"]


def test_only_safetensors_json_and_the_card_are_written(checkpoint: Path) -> None:
    assert {file.name for file in checkpoint.iterdir() if file.suffix not in (".safetensors", ".json")} == {"README.md"}
    assert (checkpoint / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("shard", ["50GB", "10KB"])
def test_a_variant_is_saved_and_loaded(shard: str, compressed_tiny: Callable[..., Compressed], tmp_path: Path) -> None:
    _, model, _ = compressed_tiny("llama")
    model.save_pretrained(tmp_path / "small", variant="fp16", max_shard_size=shard)
    assert all(".fp16" in file.name for file in (tmp_path / "small").glob("*.safetensors*"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", variant="fp16")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(TacoError, match=r"neither model.bf16.safetensors nor model.safetensors.index.bf16.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", variant="bf16")


def test_the_plan_goes_wherever_the_model_is_saved(
    checkpoint: Path, compressed_tiny: Callable[..., Compressed], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    """Trainer, for example, saves checkpoints by `save_pretrained`: `info`, `heal` and `bench` read them, too."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "again")
    assert Plan.load(tmp_path / "again") == Plan.load(checkpoint) == model.taco_plan
    assert invoke("info", tmp_path / "again")[0] == 0
    made, plan = compress(tiny_model("llama"), method="removal", layers=1, calibration=torch.randint(3, 90, (4, 8)))
    made.save_pretrained(tmp_path / "made")
    assert Plan.load(tmp_path / "made") == plan
    # one that tells of another structure does not: a plan that was changed by hand, a model that was changed since
    model.taco_plan = plan
    model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "taco_plan.json").exists()
    code, _, stderr = invoke("info", tmp_path / "other")
    assert code == 2 and "copy taco_plan.json" in stderr


@pytest.mark.parametrize("content", [None, "{", '{"method": "magic"}'])
def test_a_model_is_loaded_without_a_plan_and_with_a_damaged_one(damaged: Path, content: str | None) -> None:
    (damaged / "taco_plan.json").unlink()
    if content is not None:
        (damaged / "taco_plan.json").write_text(content)
    assert AutoModelForCausalLM.from_pretrained(damaged).taco_plan is None


def test_missing_weight_is_an_error(damaged: Path) -> None:
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    key = next(name for name in index["weight_map"] if name.endswith("mlp.up_proj.u"))
    shard = damaged / index["weight_map"].pop(key)
    tensors = load_file(shard)
    del tensors[key]
    save_file(tensors, shard, metadata={"format": "pt"})
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TacoError, match="mlp.up_proj.u"):
        AutoModelForCausalLM.from_pretrained(damaged)
    with pytest.raises(TacoError, match="mlp.up_proj.u"):
        load_model(damaged)


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_other_numbers_do_not_make_up_for_a_missing_weight(
    key: str, calibration_tokens: torch.Tensor, tmp_path: Path
) -> None:
    """A bare stack does not read the head, so that the files hold more numbers than it needs."""
    config: LlamaConfig = tiny_model("llama").config
    config.tie_word_embeddings = False  # a head of its own
    model, plan = compress(LlamaForCausalLM(config), method="removal", layers=[2], calibration=calibration_tokens)
    save_compressed(model, plan, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["unknown"] = torch.zeros(tensors.pop(key).numel())
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "taco_checksums.json").unlink()
    for loader in (AutoModel, AutoModelForCausalLM) if "layers" in key else (AutoModelForCausalLM,):
        with pytest.raises(TacoError, match=key.removeprefix("model.")):
            loader.from_pretrained(tmp_path / "model")


def test_weight_of_the_wrong_shape_is_an_error(damaged: Path) -> None:
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    key = next(name for name in index["weight_map"] if name.endswith("mlp.up_proj.u"))
    shard = damaged / index["weight_map"][key]
    tensors = load_file(shard)
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    (damaged / "taco_checksums.json").unlink()
    with pytest.raises(TacoError, match="the shape of .*mlp.up_proj.u"):
        load_model(damaged)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_truncated_file_is_an_error(damaged: Path, share: float) -> None:
    shard = max(damaged.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TacoError, match="cannot be loaded"):
        load_model(damaged)


def test_missing_shard_is_an_error(damaged: Path) -> None:
    next(iter(damaged.glob("*.safetensors"))).unlink()
    with pytest.raises(TacoError, match="which is not there"):
        load_model(damaged)


def test_load_model_names_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TacoError, match=r"config\.json"):
        load_model(tmp_path / "nothing")
    with pytest.raises(TacoError, match=r"config\.json"):
        load_model(tmp_path)


@torch.no_grad()
def test_load_model_reads_dense_and_compressed(checkpoint: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, VOCABULARY, (1, 9))
    dense = tiny_model("qwen2")
    dense.save_pretrained(tmp_path / "dense")
    model, tokenizer = load_model(tmp_path / "dense")
    assert tokenizer is None and torch.equal(model(ids).logits, dense(ids).logits)
    model, _ = load_model(checkpoint)
    assert not model.training
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits)


# -- writing ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_existing_directory_is_refused_and_replaced_by_force(
    compressed_tiny: Callable[..., Compressed], damaged: Path
) -> None:
    _, model, plan = compressed_tiny("llama", "svd")
    before = snapshot(damaged)
    with pytest.raises(TacoError, match="--force"):
        save_compressed(model, plan, damaged)
    assert snapshot(damaged) == before
    (damaged / "left-over.safetensors").write_bytes(b"x")
    save_compressed(model, plan, damaged, force=True)
    assert not (damaged / "left-over.safetensors").exists()
    ids = torch.randint(3, VOCABULARY, (1, 9))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(damaged)(ids).logits, model(ids).logits)
    assert [entry.name for entry in damaged.parent.iterdir()] == [damaged.name]


def test_force_replaces_no_foreign_directory_or_file(tmp_path: Path) -> None:
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(TacoError, match="no model directory"):
        check_output(foreign, force=True)
    with pytest.raises(TacoError, match="is a file"):
        check_output(foreign / "letter.txt", force=True)
    with pytest.raises(TacoError, match="GB free"):
        check_output(tmp_path / "new", needed_bytes=1 << 62)
    assert (foreign / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("existing", [False, True])
def test_crash_while_writing_leaves_nothing_behind(damaged: Path, error: BaseException, existing: bool) -> None:
    target = damaged if existing else damaged.parent / "new"
    before = snapshot(damaged)

    def write(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise error

    expected = TacoError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_whole(target, write, force=True)
    assert snapshot(damaged) == before
    assert [entry.name for entry in damaged.parent.iterdir()] == [damaged.name]


def test_crash_while_renaming_puts_the_old_directory_back(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(damaged)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken"):
        write_whole(damaged, lambda directory: None, force=True)
    assert snapshot(damaged) == before
    assert [entry.name for entry in damaged.parent.iterdir()] == [damaged.name]


def test_dense_model_is_not_saved_as_compressed(compressed_tiny: Callable[..., Compressed], tmp_path: Path) -> None:
    dense, _, plan = compressed_tiny("llama", "taco")
    with pytest.raises(TacoError, match="not a compressed model"):
        save_compressed(dense, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["taco", "bridge"])
@torch.no_grad()
def test_deepcopy_and_pickle(method: str, compressed_tiny: Callable[..., Compressed]) -> None:
    _, model, _ = compressed_tiny("qwen2", method)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    logits = model(ids).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert torch.equal(again(ids).logits, logits)
        for parameter in again.parameters():
            parameter.zero_()
        assert torch.equal(model(ids).logits, logits)


def test_pickle_is_read_by_a_new_process(compressed_tiny: Callable[..., Compressed], tmp_path: Path) -> None:
    _, model, _ = compressed_tiny("qwen2", "bridge")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    ids = torch.randint(3, VOCABULARY, (2, 9))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    code = (
        "import pickle, sys, torch; model = pickle.load(open(sys.argv[1], 'rb')); want = torch.load(sys.argv[2]);"
        "torch.set_grad_enabled(False); torch.testing.assert_close(model(want['ids']).logits, want['logits']);"
        "print('same')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pickle"), str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.strip().endswith("same"), result.stderr


# -- damaged config --------------------------------------------------------------------------------------------


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        if value is None:
            del config[keys[-1]]
        else:
            config[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("taco_svd", value=None),
        _set("taco_svd", value=[1]),
        _set("taco_svd", "format_version", value=4),
        _set("taco_svd", "kept", value=None),
        _set("taco_svd", "kept", value=[]),
        _set("taco_svd", "kept", value=[0, 0, 1, 2, 3]),
        _set("taco_svd", "kept", value=[0, 1, 2, 3]),
        _set("taco_svd", "kept", value=[0, 1, 2, 3, True]),
        _set("taco_svd", "kept", value=[0, 1, 2, 3, 99]),
        _set("taco_svd", "source_layers", value="5"),
        _set("taco_svd", "source_layers", value=-1),
        _set("taco_svd", "low_rank", value=[]),
        _set("taco_svd", "low_rank", "2", value={"mlp.up_proj": 0}),
        _set("taco_svd", "low_rank", "2", value={"mlp.up_proj": 1 << 40}),
        _set("taco_svd", "low_rank", "2", value={"mlp.up_proj": 33}),
        _set("taco_svd", "low_rank", "2", value={"mlp.up_proj": 2.5}),
        _set("taco_svd", "low_rank", "2", value={"mlp.no_proj": 3}),
        _set("taco_svd", "low_rank", "2", value={"__class__.x()": 3}),
        _set("taco_svd", "low_rank", "9", value={"mlp.up_proj": 3}),
        _set("taco_svd", "pivoted", value=[]),
        _set("taco_svd", "pivoted", value={"2": ["mlp.no_proj"]}),
        _set("taco_svd", "pivoted", value={"2": ["mlp.up_proj", "mlp.up_proj"]}),
        _set("taco_svd", "pivoted", value={"9": ["mlp.up_proj"]}),
        _set("taco_svd", "bridges", value=[{"after": 1}]),
        _set("taco_svd", "bridges", value=[{"after": 9, "rank": 3, "bias": True, "eps": 1e-6}]),
        _set("taco_svd", "bridges", value=[{"after": 1, "rank": 3, "bias": True, "eps": -1.0}]),
        _set("taco_svd", "bridges", value=[{"after": 1, "rank": 3, "bias": True, "eps": "nan"}]),
        _set("base_config", value=None),
        _set("base_config", value="llama"),
        _set("base_model_type", value=None),
        _set("base_model_type", value="no-such-model"),
        _set("base_model_type", value="taco_svd"),
        _set("base_model_type", value=["llama"]),
    ],
)
def test_damaged_config_is_named(damaged: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = damaged / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(TacoError):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_config_that_is_no_json_is_an_error(damaged: Path) -> None:
    (damaged / "config.json").write_text('{"model_type": "taco_svd", ')
    with pytest.raises(TacoError):
        load_model(damaged)


def test_config_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    assert (config.vocab_size, config.hidden_size, config.model_type) == (VOCABULARY, 32, "taco_svd")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    where = {"_name_or_path": ""}
    assert {**again.to_dict(), **where} == {**config.to_dict(), **where}
    structure = Structure.from_dict(config.taco_svd)
    assert Structure.from_dict(structure.to_dict()) == structure == Plan.load(checkpoint).structure


@pytest.mark.parametrize("method", ["bridge", "taco", "modegpt"])
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_classifier_has_the_compressed_stack(
    auto: Any, method: str, compressed_tiny: Callable[..., Compressed], tmp_path: Path
) -> None:
    """Its class takes the stack from AutoModel, with all replacements in it."""
    _, model, plan = compressed_tiny("llama", method)
    save_compressed(model, plan, tmp_path / "small")
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    classifier = auto.from_pretrained(tmp_path / "small", num_labels=2).eval()
    with torch.no_grad():
        assert torch.equal(classifier.base_model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    classifier.save_pretrained(tmp_path / "classifier")
    again = auto.from_pretrained(tmp_path / "classifier").eval()
    with torch.no_grad():
        assert torch.equal(again(ids)[0], classifier(ids)[0])


def test_a_classifier_takes_another_head_only_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    """As transformers has it: ``ignore_mismatched_sizes=True`` is for heads that are to be trained anew. The stack's
    weights are never left at random values."""
    AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(TacoError, match=r"score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "three", num_labels=5)
    options: dict[str, Any] = {"num_labels": 5, "ignore_mismatched_sizes": True}
    five = AutoModelForSequenceClassification.from_pretrained(tmp_path / "three", **options)
    assert five.score.weight.shape == (5, 32)
    three = AutoModelForSequenceClassification.from_pretrained(tmp_path / "three")
    assert all(torch.equal(tensor, three.model.state_dict()[key]) for key, tensor in five.model.state_dict().items())
    (file,) = (tmp_path / "three").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "three" / "taco_checksums.json").unlink()
    with pytest.raises(TacoError, match=r"model\.norm\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "three", **options)


def test_token_ids_come_from_the_config_where_no_generation_config_is(checkpoint: Path, damaged: Path) -> None:
    """Without them `generate` would never stop."""
    (damaged / "generation_config.json").unlink()
    found = AutoModelForCausalLM.from_pretrained(damaged)
    assert found.generation_config._from_model_config
    assert found.generation_config.eos_token_id == found.config.eos_token_id == 2
    assert found.generation_config.pad_token_id == 0
    own = GenerationConfig(eos_token_id=5)
    given = AutoModelForCausalLM.from_pretrained(damaged, generation_config=own)
    assert given.generation_config.eos_token_id == 5
    assert AutoModel.from_pretrained(damaged).config.eos_token_id == 2


def test_the_path_can_be_given_by_its_name(checkpoint: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    again = type(loaded).from_pretrained(pretrained_model_name_or_path=checkpoint)
    assert type(again) is type(loaded)


@pytest.mark.parametrize("packed", [2, 8])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_quantised_weights_have_their_quantisers_shapes(
    name: str, packed: int, compressed_tiny: Callable[..., Compressed]
) -> None:
    """Several weights in one stored number, as bitsandbytes' 4 bits have it; all others as the config says."""
    _, model, _ = compressed_tiny(name, "paper")
    maps = (torch.nn.Linear, Conv1D)
    linear = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, maps)}
    stored = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    quantised = {name: (math.prod(shape) // packed, 1) if name in linear else shape for name, shape in stored.items()}
    with pytest.raises(TacoError, match="shape"):
        check_size(model, quantised, "small")
    model = copy.deepcopy(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    check_size(model, quantised, "small")
    check_size(model, stored, "small")
    factor = next(name for name in stored if name.endswith(".u"))
    with pytest.raises(TacoError, match=factor):
        check_size(model, {**quantised, factor: (1, 1)}, "small")
    with pytest.raises(TacoError, match=f"{factor} holds integers in the files and numbers by the config"):
        check_size(model, quantised, "small", integers={factor, *linear})
    check_size(model, quantised, "small", integers=linear)
    first = next(path for path, shape in stored.items() if len(shape) == 1)
    with pytest.raises(TacoError, match="weights are missing"):
        check_size(model, {first: stored[first]}, "small")


def test_a_plain_config_can_be_made_of_the_file(checkpoint: Path) -> None:
    """`Trainer` does so when it resumes, and compares token ids with `vocab_size`, where the guard stands."""
    assert PreTrainedConfig.from_json_file(checkpoint / "config.json").transformers_version
    assert AutoConfig.from_pretrained(checkpoint).eos_token_id == 2


def test_description_agrees_with_the_files(checkpoint: Path, compressed_tiny: Callable[..., Compressed]) -> None:
    _, _, plan = compressed_tiny("llama", "taco")
    told = describe(checkpoint)
    assert told["result"]["file_bytes"] == sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert told["method"] == "taco" and told["redundant_layers"] == list(plan.redundant)
    assert told["low_rank"]["2"] == plan.structure.low_rank[2]
    json.dumps(told)


def test_all_files_are_there_when_a_model_goes_to_the_hub(
    compressed_tiny: Callable[..., Compressed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, _ = compressed_tiny("llama", "taco")
    seen: list[set[str]] = []

    def upload(self: Any, working_dir: Any, *_: Any, **__: Any) -> None:
        seen.append({file.name for file in Path(working_dir).iterdir()})

    hub = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    for name, value in (("hf_api", lambda: hub), ("create_repo", hub.create_repo)):
        monkeypatch.setattr(f"transformers.modeling_utils.{name}", value, raising=False)
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="someone/model")
    assert seen and {"taco_checksums.json", "taco_plan.json", "model.safetensors", "README.md"} <= seen[-1]


@pytest.mark.parametrize("name", ["", "model.gguf"])
def test_a_gguf_file_is_told_how_to_be_read(tmp_path, name):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(TacoError, match="GgufConfig"):
        load_model(tmp_path / name)
