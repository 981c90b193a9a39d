"""Checkpoints that are damaged, or made to do harm: each a `TacoError`, and nothing else happens."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from taco_svd import Plan, TacoError
from taco_svd.checkpoint import load_model
from taco_svd.checksums import CHECKSUMS_FILE
from taco_svd.untrusted import INDEX_FILE, WEIGHTS_FILE

from .conftest import FACTOR

Copy = Callable[[Path], Path]


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def refused(directory: Path, says: str) -> None:
    """Both ways in say the same: ours, and transformers' own for compressed models."""
    with pytest.raises(TacoError, match=says):
        load_model(directory)
    if json.loads((directory / "config.json").read_bytes()).get("model_type") == "taco_svd":
        with pytest.raises(TacoError, match=says):
            AutoModelForCausalLM.from_pretrained(directory)


# -- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["header", "data"])
def test_a_flipped_bit_in_a_shard_is_found(taco_checkpoint: Path, copy_of: Copy, where: str) -> None:
    generator = random.Random(3)
    directory = copy_of(taco_checkpoint)
    for shard in sorted(directory.glob("*.safetensors")):
        whole = shard.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for _ in range(3 * FACTOR):
            at = generator.randrange(header) if where == "header" else generator.randrange(header, len(whole))
            flipped = bytearray(whole)
            flipped[at] ^= 1 << generator.randrange(8)
            shard.write_bytes(bytes(flipped))
            refused(directory, "SHA-256 differs|cannot be loaded|should be in|missing or have")
        shard.write_bytes(whole)
    load_model(directory)


def test_verification_can_be_turned_off_and_taken_out(
    bridge_checkpoint: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(bridge_checkpoint)
    shard = directory / WEIGHTS_FILE
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # the last byte is data: nothing but the checksum can tell
    shard.write_bytes(bytes(content))
    refused(directory, "SHA-256 differs")
    monkeypatch.setenv("TACO_VERIFY", "0")
    load_model(directory)
    monkeypatch.delenv("TACO_VERIFY")
    (directory / CHECKSUMS_FILE).unlink()
    load_model(directory)


def test_saving_again_renews_the_checksums(taco_checkpoint: Path, copy_of: Copy) -> None:
    directory = copy_of(taco_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(directory)
    for stale in directory.glob("model-0*"):
        stale.unlink(missing_ok=True)
    again, _ = load_model(directory)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)


@pytest.mark.parametrize("bytes_left", [0, 7, 8, 60, -1])
@pytest.mark.parametrize("checksums", [True, False])
def test_cut_shards(taco_checkpoint: Path, copy_of: Copy, bytes_left: int, checksums: bool) -> None:
    directory = copy_of(taco_checkpoint)
    if not checksums:
        (directory / CHECKSUMS_FILE).unlink()
    shard = sorted(directory.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:bytes_left])
    refused(directory, "cannot be loaded")


def test_renamed_swapped_and_doubled_shards(taco_checkpoint: Path, copy_of: Copy) -> None:
    directory = copy_of(taco_checkpoint)
    one, two = sorted(directory.glob("*.safetensors"))[:2]
    spare = directory / "spare"
    for step in ((one, spare), (two, one), (spare, two)):
        step[0].rename(step[1])
    refused(directory, "renamed, mixed or lost")
    directory = copy_of(taco_checkpoint)
    shutil.copy(directory / two.name, directory / one.name)
    refused(directory, "is in .* and in")
    directory = copy_of(taco_checkpoint)
    (directory / one.name).rename(directory / "other.safetensors")
    refused(directory, "not there")


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE, CHECKSUMS_FILE, "generation_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b"null", b'{"a": "\\ud800"}']
)
def test_broken_json_files(taco_checkpoint: Path, copy_of: Copy, name: str, content: bytes) -> None:
    directory = copy_of(taco_checkpoint)
    (directory / name).write_bytes(content)
    if name == "generation_config.json":  # transformers does without it where it can
        with contextlib.suppress(TacoError):
            load_model(directory)
        return
    with pytest.raises(TacoError):
        load_model(directory)


def test_huge_json_is_not_read(taco_checkpoint: Path, copy_of: Copy) -> None:
    directory = copy_of(taco_checkpoint)
    with (directory / "config.json").open("r+b") as file:
        file.truncate(1 << 33)  # sparse: no disk is used
    with pytest.raises(TacoError, match="no such file is that large"):
        load_model(directory)


# -- weights that do not fit ---------------------------------------------------------------------------------------


def test_weights_of_other_shapes_and_dtypes(bridge_checkpoint: Path, copy_of: Copy) -> None:
    directory = copy_of(bridge_checkpoint)
    (directory / CHECKSUMS_FILE).unlink()
    whole = load_file(directory / WEIGHTS_FILE)
    key = next(name for name in whole if name.endswith("bridge.u"))
    # as many numbers, in another shape: only the comparison of shapes can tell
    save_file({**whole, key: whole[key].T.contiguous()}, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    refused(directory, "bridge")
    save_file({**whole, "extra": torch.zeros(100)}, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    model, _ = load_model(directory)
    assert not hasattr(model, "extra")
    save_file({**whole, key: torch.full_like(whole[key], 1 << 20)}, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    load_model(directory)


@pytest.mark.parametrize("kind", ["bridge", "dense"])
def test_weights_of_other_names(bridge_checkpoint: Path, dense_checkpoint: Path, copy_of: Copy, kind: str) -> None:
    """Totals are compared before memory is taken, for names that the model does not know say nothing of shapes."""
    directory = copy_of(bridge_checkpoint if kind == "bridge" else dense_checkpoint)
    (directory / CHECKSUMS_FILE).unlink(missing_ok=True)
    whole = load_file(directory / WEIGHTS_FILE)
    renamed = {f"other.{key}": value for key, value in list(whole.items())[1:]}
    save_file(renamed, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    refused(directory, "the files hold .* weights are missing")


def test_pivot_and_index_out_of_range(taco_checkpoint: Path, narrow_checkpoint: Path, copy_of: Copy) -> None:
    for source, ending, says in (
        (taco_checkpoint, ".pivot", "no permutation"),
        (narrow_checkpoint, ".index", "places"),
    ):
        for wrong in (-1, 0, 1 << 30):
            directory = copy_of(source)
            (directory / CHECKSUMS_FILE).unlink()
            for shard in directory.glob("*.safetensors"):
                tensors = load_file(shard)
                for key in tensors:
                    if key.endswith(ending):
                        tensors[key][:2] = wrong
                save_file(tensors, shard, metadata={"format": "pt"})
            refused(directory, says)


# -- harm ----------------------------------------------------------------------------------------------------------


class Canary:
    """What a hostile pickle does when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json", "consolidated.00.pth"]
)
@pytest.mark.parametrize("kind", ["bridge", "dense"])
def test_pickles_are_never_opened(
    bridge_checkpoint: Path, dense_checkpoint: Path, copy_of: Copy, tmp_path: Path, name: str, kind: str
) -> None:
    directory = copy_of(bridge_checkpoint if kind == "bridge" else dense_checkpoint)
    (directory / WEIGHTS_FILE).unlink()
    bomb = pickle.dumps(Canary(tmp_path / "canary"))
    if name.endswith(".json"):
        (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}))
        (directory / "pytorch_model.bin").write_bytes(bomb)
    else:
        (directory / name).write_bytes(bomb)
    refused(directory, "safetensors")
    # named as what it is not
    (directory / WEIGHTS_FILE).write_bytes(bomb)
    refused(directory, "no whole safetensors file")
    assert not (tmp_path / "canary").exists()


CODE = "from pathlib import Path\nPath({!r}).touch()\nraise SystemExit\n"


@pytest.mark.parametrize("model_type", ["taco_svd", "llama", "something-new", None, 3])
def test_code_in_a_checkpoint_is_never_run(
    bridge_checkpoint: Path, dense_checkpoint: Path, copy_of: Copy, tmp_path: Path, model_type: Any
) -> None:
    directory = copy_of(bridge_checkpoint if model_type == "taco_svd" else dense_checkpoint)
    (directory / "evil.py").write_text(CODE.format(str(tmp_path / "canary")))
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    edit(directory / "config.json", auto_map=auto, model_type=model_type)
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "T"}))
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(CODE.format(str(tmp_path / "canary")))
    with contextlib.suppress(TacoError):  # a class that transformers has itself is loaded, and no code for it
        load_model(directory)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", "someone/kernel@main:f", {"": "someone/kernel"}, 3, "../x"])
def test_kernels_from_elsewhere_are_refused(
    bridge_checkpoint: Path, dense_checkpoint: Path, copy_of: Copy, field: str, value: Any
) -> None:
    directory = copy_of(dense_checkpoint)
    edit(directory / "config.json", **{field: value})
    refused(directory, "kernel from elsewhere")
    directory = copy_of(bridge_checkpoint)
    edit(directory / "config.json", **{field: value})
    refused(directory, "kernel from elsewhere")
    directory = copy_of(bridge_checkpoint)
    values = json.loads((directory / "config.json").read_text())
    edit(directory / "config.json", base_config={**values["base_config"], field: value})
    refused(directory, "kernel from elsewhere")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/abs.safetensors", "sub/x.safetensors", "..", "", "a\\b", "x.bin"]
)
def test_paths_in_the_index(taco_checkpoint: Path, copy_of: Copy, name: str) -> None:
    directory = copy_of(taco_checkpoint)
    shard = sorted(directory.glob("*.safetensors"))[0]
    shutil.copy(shard, directory.parent / "outside.safetensors")
    values = json.loads((directory / INDEX_FILE).read_text())
    moved = {key: name if file == shard.name else file for key, file in values["weight_map"].items()}
    edit(directory / INDEX_FILE, weight_map=moved)
    refused(directory, "outside itself|not a safetensors file")


def test_weights_file_named_by_the_config(dense_checkpoint: Path, copy_of: Copy) -> None:
    directory = copy_of(dense_checkpoint)
    edit(directory / "config.json", transformers_weights="../outside.safetensors")
    refused(directory, "transformers_weights")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_FILE, CHECKSUMS_FILE, "tokenizer.json", "taco_plan.json"])
def test_links_that_lead_out(bridge_checkpoint: Path, copy_of: Copy, tmp_path: Path, name: str) -> None:
    directory = copy_of(bridge_checkpoint)
    secret = tmp_path / "secret"
    secret.write_bytes((directory / name).read_bytes() if (directory / name).exists() else b"{}")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(secret)
    with pytest.raises(TacoError, match="outside the checkpoint"):
        Plan.load(directory) if name == "taco_plan.json" else load_model(directory)


def test_links_of_the_hub_cache_are_followed(bridge_checkpoint: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(bridge_checkpoint.iterdir())):
        shutil.copy(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number}"))
    load_model(snapshot)


def test_what_is_no_regular_file(bridge_checkpoint: Path, copy_of: Copy) -> None:
    for name in ("config.json", WEIGHTS_FILE, "taco_plan.json"):
        directory = copy_of(bridge_checkpoint)
        (directory / name).unlink()
        (directory / name).mkdir()
        with pytest.raises(TacoError):
            load_model(directory) if name != "taco_plan.json" else Plan.load(directory)
        (directory / name).rmdir()
        os.mkfifo(directory / name)  # reading it would wait for ever
        with pytest.raises(TacoError):
            load_model(directory) if name != "taco_plan.json" else Plan.load(directory)


def test_an_adapter_does_not_lead_to_another_model(bridge_checkpoint: Path, copy_of: Copy) -> None:
    directory = copy_of(bridge_checkpoint)
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/model"}))
    refused(directory, "adapter")


# -- sizes -----------------------------------------------------------------------------------------------------------

ABSURD = """
import json, resource, sys, time
from pathlib import Path
import torch
from taco_svd import Plan, TacoError
from taco_svd.checkpoint import load_model
from taco_svd.cli_shared import quiet_libraries
quiet_libraries()
directory, path = Path(sys.argv[1]), Path(sys.argv[1], "config.json")
load_model(directory)
whole = json.loads(path.read_text())
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
for change in json.load(sys.stdin):
    values = json.loads(json.dumps(whole))
    inner = values.get("base_config", values)
    structure = values.get("taco_svd", {})
    for key, value in change.items():
        (structure if key in structure else inner)[key] = value
    path.write_text(json.dumps(values))
    start = time.process_time()  # a busy machine is not the loader's fault
    try:
        load_model(directory)
        print("loaded", list(change))
    except TacoError as error:
        print("refused" if time.process_time() - start < 20 else "slow", str(error)[:150].replace(chr(10), " "))
"""

SIZES: list[dict[str, Any]] = [
    {"hidden_size": 1 << 20},
    {"hidden_size": 1 << 40},
    {"hidden_size": 10**30},
    {"intermediate_size": 1 << 34},
    {"vocab_size": 1 << 40},
    {"num_hidden_layers": 1 << 31},
    {"num_hidden_layers": 60000},
    {"num_attention_heads": 1 << 31},
    {"head_dim": 1 << 40},
    {"max_position_embeddings": 1 << 60},
    {"num_labels": 30_000_000},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e12}},
    {"layer_types": ["full_attention"] * 100000},
]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to know the memory in use")
@pytest.mark.parametrize("kind", ["bridge", "dense"])
def test_absurd_sizes_take_no_memory(bridge_checkpoint: Path, dense_checkpoint: Path, copy_of: Copy, kind: str) -> None:
    """One more gigabyte of address space is all the process has: each of these configs would ask for far more."""
    directory = copy_of(bridge_checkpoint if kind == "bridge" else dense_checkpoint)
    sizes = list(SIZES)
    if kind == "bridge":
        sizes += [
            {"bridges": [{"after": 1, "rank": 1 << 20, "bias": True, "eps": 1e-6}]},
            {"source_layers": 1 << 60},
            {"source_layers": 1 << 16, "kept": list(range(1 << 16)), "num_hidden_layers": 1 << 16},
        ]
    done = subprocess.run(
        [sys.executable, "-c", ABSURD, str(directory)], input=json.dumps(sizes),
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(sizes), done.stdout + done.stderr[-2000:]
    # a longer context than the weights know of costs nothing until it is used, and llama does not read the share
    harmless = ("max_position", "rope_parameters")
    told = [line for line in lines if not any(word in line for word in harmless)]
    assert {line.split()[0] for line in told} == {"refused"}, "\n".join(line[:200] for line in lines)
