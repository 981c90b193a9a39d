"""Two processes give what one gives, and a lost one ends the run with a sentence and a state to go on from."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taco_svd import TacoError, compress, run_bridges
from taco_svd.architectures import Architecture
from taco_svd.gathering import _where_it_was
from taco_svd.store import INDEX, Store
from taco_svd.team import Team, local_device

from .tiny_models import tiny_model

BRIDGE = ("--method", "bridge", "--layers", "2", "--bridge-rank", "3")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(path)
    return path


def command(dense: Path, out: Path, *more: str) -> list[str]:
    return ["compress", str(dense), "--samples", "16", "--seq-len", "12", "--out", str(out), *more]


def start(arguments: list[str], timeout: float = 60, size: int = 2) -> list[subprocess.Popen]:
    """The processes that torchrun would start, without its supervision."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "taco_svd", *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **common, "RANK": str(rank), "TACO_TIMEOUT": str(timeout)},
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    try:
        return [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("arguments", [("--keep", "0.8"), BRIDGE], ids=["taco", "bridge"])
def test_two_processes_give_what_one_gives(arguments: tuple[str, ...], dense: Path, tmp_path: Path, invoke) -> None:
    code, _, stderr = invoke(*command(dense, tmp_path / "one", *arguments))
    assert code == 0, stderr
    processes = start(command(dense, tmp_path / "two", *arguments))
    errors = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one", "two"]
    plans = [json.loads((tmp_path / name / "taco_plan.json").read_text()) for name in ("one", "two")]
    assert plans[0]["structure"] == plans[1]["structure"] and plans[0]["calibration"] == plans[1]["calibration"]
    assert plans[0]["result"]["measured_loss"] == pytest.approx(plans[1]["result"]["measured_loss"], rel=1e-3)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    # a map's factors are its product: single directions may turn where singular values are close
    for name, u in one.items():
        if name.endswith(".u") and name.replace(".u", ".pivot") not in one:
            v = name.removesuffix("u") + "v"
            torch.testing.assert_close(two[name] @ two[v], u @ one[v], rtol=1e-3, atol=1e-4 * float(u.abs().max()))
        elif not name.endswith((".v", ".u", ".pivot")):
            torch.testing.assert_close(two[name], u, rtol=1e-3, atol=1e-4)


def test_a_lost_process_ends_the_run_and_resume_goes_on(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = start(command(dense, out, "--keep", "0.8"), timeout=20)
    index = tmp_path / "out.work" / INDEX
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and processes[1].poll() is None:
        if index.exists() and len(json.loads(index.read_text())["entries"]) >= 8:
            processes[1].send_signal(signal.SIGKILL)
            break
    errors = finish(processes)
    if processes[1].returncode == 0:
        pytest.skip("the run was over before its process could be killed")
    assert processes[0].returncode == 2 and "--resume" in errors[0] and "Traceback" not in errors[0], errors
    assert not out.exists()
    again = start(command(dense, out, "--keep", "0.8", "--resume"))
    errors = finish(again)
    assert [process.returncode for process in again] == [0, 0], errors
    assert (out / "model.safetensors").exists() and not index.parent.exists()


def test_what_a_team_cannot_do_is_said(calibration_tokens: torch.Tensor) -> None:
    team = Team(0, 2)  # no collective is reached
    with pytest.raises(TacoError, match="paper"):
        compress(tiny_model("llama"), method="paper", layers=1, calibration=calibration_tokens, team=team)


def test_a_team_of_one_does_nothing() -> None:
    team = Team()
    tensor = torch.arange(3.0)
    assert torch.equal(team.sum_(tensor), torch.arange(3.0)) and team.sum(2.5) == 2.5
    assert team.gather("x") == ["x"] and team.broadcast("x") == "x" and team.all(True) and not team.all(False)
    assert torch.equal(team.windows(tensor), tensor) and team.deals(7)


# -- on GPUs, as far as it can be told without one -----------------------------------------------------------------


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The environment of the second of two processes on a machine of two GPUs; what torch was asked to do, in order."""
    asked: list[object] = []
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    return asked


def test_each_process_takes_its_own_gpu_and_a_backend_for_the_cpu_as_well(second_of_two: list[object]) -> None:
    team = Team.from_environment("cuda")
    assert (team.rank, team.size) == (1, 2)
    assert second_of_two == ["cuda:1", "cpu:gloo,cuda:nccl"]  # the device first: NCCL works on the current one
    assert local_device("cuda") == "cuda:1" and local_device("cpu") == "cpu"


def test_processes_on_the_cpu_ask_for_no_gpu(second_of_two: list[object]) -> None:
    Team.from_environment("cpu")
    assert second_of_two == ["gloo"]


def test_processes_that_would_share_a_gpu_are_refused(
    second_of_two: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TacoError, match="cannot share cuda:0"):
        Team.from_environment("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(TacoError, match="2 run on this machine and torch can use 1"):
            Team.from_environment("cuda")
    assert second_of_two == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert local_device("cuda") == "cuda" and local_device("cuda:1") == "cuda:1"


def test_a_process_group_without_a_backend_for_the_cpu_is_no_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")

    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    with pytest.raises(TacoError, match="device type cpu.*cpu:gloo,cuda:nccl") as raised:
        Team(0, 2).sum(1.0)
    assert "--resume" not in str(raised.value)


def test_bridges_of_runs_are_handed_over_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, calibration_tokens: torch.Tensor
) -> None:
    class Elsewhere:
        """A tensor of which only the copy on the CPU may be used."""

        def cpu(self) -> torch.Tensor:
            return torch.ones(1)

    monkeypatch.setattr(run_bridges, "fit_bridge", lambda *args, **more: (Elsewhere(), Elsewhere(), Elsewhere()))
    store = Store(memory=1 << 20)
    runs = run_bridges.fit_run_bridges(Architecture(tiny_model("llama")), calibration_tokens, store, lambda *_: None)
    first, last = runs[0]
    assert {name: tensor.item() for name, tensor in store.get(f"run-bridge/{first}-{last}").items()} == {
        "u": 1.0, "v": 1.0, "bias": 1.0,
    }  # fmt: skip


def test_a_gathered_model_goes_to_a_gpu_in_all_processes_or_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    votes: list[bool] = []

    class Outvoted(Team):
        def all(self, value: bool) -> bool:
            votes.append(value)
            return False

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40 if device.index == 1 else 0, 1 << 40))
    model = tiny_model("llama")
    assert _where_it_was(model, torch.device("cuda:1"), Outvoted(1, 2)) is model and votes == [True]
    assert _where_it_was(model, torch.device("cuda:0"), Team()) is model  # no space on that one
