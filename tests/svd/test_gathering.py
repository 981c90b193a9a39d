"""Models whose weights are spread over processes, or put aside by accelerate, compress like whole ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from taco_svd import CompressionOptions, TacoError, apply_plan, compress, make_plan
from taco_svd.baselines import Workspace
from taco_svd.calibration import Calibration
from taco_svd.errors import DiskFullError
from taco_svd.gathering import gathered, is_scattered
from taco_svd.mapped import is_mapped

from .conftest import run_two
from .tiny_models import tiny_model

SHARDED = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.tensor import DTensor
import taco_svd
from taco_svd.gathering import is_scattered
from taco_svd.team import Team
from tests.svd.tiny_models import tiny_model

how, name, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
torch.set_num_threads(1)
distributed.init_process_group("gloo")
team = Team(distributed.get_rank(), distributed.get_world_size())
model = tiny_model(name)
mesh = distributed.init_device_mesh("cpu", (team.size,))
if how == "fsdp2":
    from torch.distributed.fsdp import fully_shard
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
else:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    for layer in model.model.layers:
        plan = {"self_attn." + one: ColwiseParallel() for one in ("q_proj", "k_proj", "v_proj")}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        plan |= {"mlp." + one: ColwiseParallel() for one in ("gate_proj", "up_proj")}
        parallelize_module(layer, mesh, plan)
assert is_scattered(model)
tokens = torch.randint(3, 96, (16, 12), generator=torch.Generator().manual_seed(11))
here = [p.to_local().clone() for p in model.parameters() if isinstance(p, DTensor)]
together = team if "team" in sys.argv else None
work = out / f"work{team.rank}"
compressed, plan = taco_svd.compress(model, layers=[2, 3], calibration=tokens, team=together, work_dir=work)
assert is_scattered(model) and not is_scattered(compressed)
assert all(map(torch.equal, here, (p.to_local() for p in model.parameters() if isinstance(p, DTensor))))
save_file({key: tensor.clone() for key, tensor in compressed.state_dict().items()}, out / f"{team.rank}.safetensors")
if team.rank == 0:
    taco_svd.save_compressed(compressed, plan, out / "saved")
"""


def whole_compressed(name: str) -> tuple[dict[str, torch.Tensor], PreTrainedModel]:
    tokens = torch.randint(3, 96, (16, 12), generator=torch.Generator().manual_seed(11))
    compressed, _ = compress(tiny_model(name), layers=[2, 3], calibration=tokens)
    return compressed.state_dict(), compressed


@pytest.mark.parametrize("how, name", [("fsdp2", "llama"), ("tensor", "qwen3")])
def test_a_sharded_model_gives_what_the_whole_one_gives(how: str, name: str, tmp_path: Path) -> None:
    run_two(SHARDED, how, name, str(tmp_path))
    expected, whole = whole_compressed(name)
    for rank in (0, 1):  # without a team each process does all of it: the same bits as from the whole model
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    ids = torch.arange(3, 15)[None]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved(ids).logits, whole(ids).logits)
    assert not [path for path in tmp_path.iterdir() if "weights" in path.name]  # the gathered files are gone


def test_processes_share_the_work_on_a_sharded_model(tmp_path: Path) -> None:
    run_two(SHARDED, "fsdp2", "llama", str(tmp_path), "team")
    zero, one = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert zero.keys() == one.keys() and all(torch.equal(zero[key], one[key]) for key in zero)
    _, whole = whole_compressed("llama")
    ids = torch.arange(3, 15)[None]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(saved(ids).logits, whole(ids).logits, rtol=1e-3, atol=1e-3)


def dispatched(model: PreTrainedModel, tmp_path: Path, layers: dict[int, str]) -> PreTrainedModel:
    """`model` with accelerate's hooks everywhere; `layers` that are said to be on "disk" lose their weights to it."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")
    places = {f"model.layers.{index}": layers.get(index, "cpu") for index in range(len(model.model.layers))}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "aside", force_hooks=True)


def put_aside(model: PreTrainedModel, tmp_path: Path) -> PreTrainedModel:
    return dispatched(model, tmp_path, {1: "disk", 3: "disk"})


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_offloaded_model_gives_what_the_whole_one_gives(name: str, tmp_path: Path) -> None:
    model = put_aside(tiny_model(name), tmp_path)
    assert is_scattered(model) and any(parameter.is_meta for parameter in model.parameters())
    tokens = torch.randint(3, 96, (16, 12), generator=torch.Generator().manual_seed(11))
    compressed, plan = compress(model, layers=[2, 3], calibration=tokens)
    expected, whole = whole_compressed(name)
    found = compressed.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert is_scattered(model)
    ids = torch.arange(3, 15)[None]
    assert torch.equal(compressed(ids).logits, whole(ids).logits)
    assert plan.source["architecture"] == type(tiny_model(name)).__name__


@pytest.mark.parametrize("method", ["taco", "paper", "bridge"])
def test_a_model_that_is_placed_by_hooks_is_compressed_where_it_is(method: str, tmp_path: Path) -> None:
    tokens = torch.randint(3, 96, (16, 12), generator=torch.Generator().manual_seed(11))
    expected, plan = compress(tiny_model("llama"), method=method, layers=[2, 3], calibration=tokens)
    model = dispatched(tiny_model("llama"), tmp_path, {})
    assert not is_scattered(model)
    compressed, _ = compress(model, method=method, layers=[2, 3], calibration=tokens)
    ids = torch.arange(3, 15)[None]
    assert torch.equal(compressed(ids).logits, expected(ids).logits)
    applied = apply_plan(model, plan, Calibration(tokens, "tokens", 0))
    assert torch.equal(applied(ids).logits, expected(ids).logits)
    assert torch.equal(compressed.generate(ids, max_new_tokens=4), expected.generate(ids, max_new_tokens=4))


def test_what_is_gathered_is_mapped_and_leaves_no_files(tmp_path: Path) -> None:
    model = put_aside(tiny_model("llama"), tmp_path)
    made = gathered(model, tmp_path / "new" / "folder")
    assert is_mapped(made) and list((tmp_path / "new" / "folder").iterdir()) == []
    expected = tiny_model("llama").state_dict()
    found = made.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = put_aside(tiny_model("llama"), tmp_path)

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name == "3.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("taco_svd.gathering.save_file", full)
    with pytest.raises(DiskFullError, match="could not be written"):
        gathered(model, tmp_path / "small")
    assert list((tmp_path / "small").iterdir()) == []


def test_what_only_a_whole_model_can_do_is_said(tmp_path: Path, calibration_tokens: torch.Tensor) -> None:
    model = put_aside(tiny_model("llama"), tmp_path)
    calibration = Calibration(calibration_tokens, "tokens", 0)
    with pytest.raises(TacoError, match="compress"):
        make_plan(model, calibration, CompressionOptions(layers=1))
    _, plan = compress(tiny_model("llama"), method="bridge", layers=1, calibration=calibration)
    with pytest.raises(TacoError, match="compress"):
        apply_plan(model, plan, calibration)
    with pytest.raises(TacoError, match="workspace"):
        compress(model, layers=1, calibration=calibration, workspace=Workspace(model, calibration))
    with pytest.raises(TacoError, match="between 1 and 4"):  # before anything is gathered
        compress(model, layers=9, calibration=calibration)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    with pytest.raises(TacoError, match="no data"):
        compress(empty, layers=1, calibration=calibration)
    with pytest.raises(TacoError, match="no data"):
        apply_plan(empty, plan, calibration)


def test_a_compressed_model_is_refused_when_it_is_put_aside(
    compressed_tiny: Callable, tmp_path: Path, calibration_tokens: torch.Tensor
) -> None:
    _, compressed, _ = compressed_tiny("llama", "bridge")
    model = dispatched(copy.deepcopy(compressed), tmp_path, {0: "disk"})
    with pytest.raises(TacoError, match="compressed already"):
        compress(model, layers=1, calibration=calibration_tokens)
