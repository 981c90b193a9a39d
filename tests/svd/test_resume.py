"""A run that was stopped anywhere goes on and gives the same bits; nothing half-done is taken for done."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taco_svd import TacoError, compress
from taco_svd.store import INDEX, Store
from taco_svd.work_directory import check_work_directory, open_run

from .tiny_models import tiny_model

ARGUMENTS: dict[str, dict[str, Any]] = {
    "taco": {"method": "taco", "keep": 0.8},
    "bridge": {"method": "bridge", "layers": [1, 3], "bridge_rank": 2},
    "paper": {"method": "paper", "layers": [1, 2], "compression_ratio": 0.5},
    "svd": {"method": "svd", "layers": 2},
    "kfac": {"method": "kfac", "keep": 0.8},
}


class Stopped(BaseException):
    """Not an Exception: nothing may catch it and go on."""


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, before: bool) -> list[str]:
    """Stops the run at the store's so manieth entry, just before or just after it is written; returns their names."""
    put, names = Store.put, []

    def counting(self: Store, name: str, *rest: Any, **more: Any) -> None:
        names.append(name)
        if before and len(names) == number:
            raise Stopped
        put(self, name, *rest, **more)
        if not before and len(names) == number:
            raise Stopped

    monkeypatch.setattr(Store, "put", counting)
    return names


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_stopped_at_every_step(
    name: str, calibration_tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")

    def go(work: str, resume: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        compressed, plan = compress(
            model, calibration=calibration_tokens, work_dir=tmp_path / work, resume=resume, **ARGUMENTS[name]
        )
        return bits(compressed), plan.to_dict()

    plain, plan = compress(model, calibration=calibration_tokens, **ARGUMENTS[name])
    with monkeypatch.context() as patch:
        steps = stop_at(patch, -1, True)
        expected, expected_plan = go("whole")
    assert expected_plan == plan.to_dict()  # a work directory changes nothing
    assert all(torch.equal(expected[key], value) for key, value in bits(plain).items())
    assert len(steps) >= 3
    # of many steps a third: all kinds of them are among these
    for number in range(1, len(steps) + 1, 1 + len(steps) // 20):
        work = f"stopped-{number}"
        with monkeypatch.context() as patch:
            stop_at(patch, number, before=number % 2 == 0)
            with pytest.raises(Stopped):
                go(work)
        with monkeypatch.context() as patch:
            again = stop_at(patch, -1, True)
            found, found_plan = go(work, resume=True)
        assert found_plan == expected_plan
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        # what was kept is not made twice
        finished = [step for step in steps[: number - 1] if step.startswith(("moments/", "built/", "curves/", "plan"))]
        assert not set(finished) & set(again)


def test_another_run_is_not_continued(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    work = tmp_path / "work"
    model = tiny_model("llama")
    compress(model, method="svd", layers=2, calibration=calibration_tokens, work_dir=work)
    with pytest.raises(TacoError, match="--resume"):
        compress(model, method="svd", layers=2, calibration=calibration_tokens, work_dir=work)
    for change, told in [
        ({"layers": 1}, "layers"),
        ({"compression_ratio": 0.6}, "compression_ratio"),
        ({"model": tiny_model("llama", seed=1)}, "weights"),
        ({"calibration": calibration_tokens.flip(0)}, "calibration"),
    ]:
        arguments = {"model": model, "method": "svd", "layers": 2, "calibration": calibration_tokens, **change}
        with pytest.raises(TacoError, match=told):
            compress(**arguments, work_dir=work, resume=True)
    with pytest.raises(TacoError, match="work_dir"):
        compress(model, method="svd", layers=2, calibration=calibration_tokens, resume=True)


def test_damaged_steps_are_made_again(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    model, work = tiny_model("llama"), tmp_path / "work"
    arguments: dict[str, Any] = {"calibration": calibration_tokens, **ARGUMENTS["taco"]}
    expected = bits(compress(model, work_dir=work, **arguments)[0])
    for file in sorted(work.glob("*.safetensors"))[::2]:
        content = bytearray(file.read_bytes())
        if content:
            content[len(content) // 2] ^= 0x10
            file.write_bytes(content)
    found = bits(compress(model, work_dir=work, resume=True, **arguments)[0])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(path)
    return path


def command(dense: Path, out: Path, *more: str) -> list[str]:
    return [
        *("compress", str(dense), "--keep", "0.8", "--samples", "4", "--seq-len", "12", "--out", str(out)),
        *more,
    ]


def files(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_killed_and_resumed(dense: Path, tmp_path: Path, invoke) -> None:
    """kill -9 while it works; the same command with --resume then writes the same files as one that was left alone."""
    stream = "--stream"
    whole, out = tmp_path / "whole", tmp_path / "out"
    code, _, stderr = invoke(*command(dense, whole, stream))
    assert code == 0, stderr
    assert not whole.with_name("whole.work").exists()
    work = out.with_name("out.work")
    with subprocess.Popen(
        [sys.executable, "-m", "taco_svd", *command(dense, out, stream, "--resume")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            index = work / INDEX
            if index.exists() and len(json.loads(index.read_text())["entries"]) >= 10:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    if process.returncode == 0:
        pytest.skip("the run was over before this test could kill it")
    assert process.returncode == -signal.SIGKILL and not out.exists()
    code, _, stderr = invoke(*command(dense, out))
    assert code == 2 and "--resume" in stderr
    code, _, stderr = invoke(*command(dense, out, stream, "--resume"))
    assert code == 0, stderr
    assert files(out) == files(whole)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "whole"]


def test_streamed_and_loaded_give_the_same_files(dense: Path, tmp_path: Path, invoke) -> None:
    for name in ("--stream", "--no-stream"):
        code, _, stderr = invoke(*command(dense, tmp_path / name, name))
        assert code == 0, stderr
    streamed, loaded = files(tmp_path / "--stream"), files(tmp_path / "--no-stream")
    assert streamed["model.safetensors"] == loaded["model.safetensors"] and streamed.keys() == loaded.keys()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("--stream", "--no-stream")]
    assert configs[0] == configs[1]


def test_a_wrong_argument_leaves_no_directory(dense: Path, tmp_path: Path, invoke) -> None:
    (tmp_path / "text.txt").write_text("no tokenizer")
    code, _, stderr = invoke(*command(dense, tmp_path / "out", "--calibration", tmp_path / "text.txt"))
    assert code == 2 and "tokenizer" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "mine.txt").write_text("keep this")
    code, _, stderr = invoke(*command(dense, tmp_path / "out"))
    assert code == 2 and "other files" in stderr
    assert (tmp_path / "out.work" / "mine.txt").read_text() == "keep this"


@pytest.mark.parametrize("name", ["adapter.safetensors", "download.partial"])
def test_a_directory_of_other_weights_is_no_work_directory(name: str, tmp_path: Path) -> None:
    """It would be deleted once the model is saved."""
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(TacoError, match="other files"):
        check_work_directory(tmp_path, resume=True)
    assert (tmp_path / name).exists()


def test_what_a_run_leaves_that_was_killed_at_its_first_step_is_taken(tmp_path: Path, monkeypatch) -> None:
    def killed(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_write_index", killed)
        with pytest.raises(Stopped):
            open_run(tmp_path / "work", {"method": "svd"}, resume=False)
    (tmp_path / "work" / f".{INDEX}.17.partial").write_text("{")
    assert "run" in open_run(tmp_path / "work", {"method": "svd"}, resume=False)


@pytest.mark.parametrize("work, out", [("small", "small"), ("small/work", "small"), ("work", "work/small")])
def test_a_work_directory_in_the_output_is_told_before_work(
    work: str, out: str, dense: Path, tmp_path: Path, invoke
) -> None:
    """The output must not exist until it is written: the run would fail when all is done."""
    code, _, stderr = invoke(*command(dense, tmp_path / out, "--work-dir", str(tmp_path / work)))
    assert code == 2 and "--work-dir" in stderr
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("inside", [False, True])
def test_a_work_directory_that_cannot_be_made_is_told_before_work(
    inside: bool, dense: Path, tmp_path: Path, invoke
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    code, _, stderr = invoke(*command(dense, tmp_path / "out", "--work-dir", str(file / "work" if inside else file)))
    assert code == 2 and "--work-dir" in stderr and len(stderr.strip().splitlines()) == 1
    assert file.read_text() == "x" and not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(dense: Path, tmp_path: Path, invoke, monkeypatch) -> None:
    put = Store.put

    def interrupted(self: Store, name: str, *rest: Any) -> None:
        put(self, name, *rest)
        if name.startswith("moments/"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", interrupted)
        code, _, stderr = invoke(*command(dense, tmp_path / "out"))
    assert code == 130 and "--resume" in stderr and "out.work" in stderr.replace("\n", "")
    code, _, stderr = invoke(*command(dense, tmp_path / "out", "--resume"))
    assert code == 0, stderr


def test_a_model_that_is_read_otherwise_is_another(calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    """The same weights under another epsilon: statistics of the one are not the other's."""
    model = tiny_model("llama")
    work = tmp_path / "work"
    compress(model, calibration=calibration_tokens, work_dir=work, **ARGUMENTS["svd"])
    model.config.rms_norm_eps *= 10
    with pytest.raises(TacoError, match="belongs to another run .config"):
        compress(model, calibration=calibration_tokens, work_dir=work, resume=True, **ARGUMENTS["svd"])


def saved_dense(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder / "dense")
    return folder / "dense"


def test_what_is_finished_outlives_an_output_that_has_come_in_between(
    tmp_path: Path, invoke: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import taco_svd.checkpoint as module

    dense = saved_dense(tmp_path)
    out, save = tmp_path / "small", module.write_whole

    def late(target: Path, *rest: Any) -> None:
        out.mkdir()
        save(target, *rest)

    arguments = (
        "compress", dense, "--out", out, "--method", "svd", "--layers", "2", "--samples", "2",
        "--seq-len", "16",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", late)
        code, _, stderr = invoke(*arguments)
    assert code == 2 and "exists" in stderr and "--resume" in stderr
    out.rmdir()
    code, _, stderr = invoke(*arguments, "--resume")
    assert code == 0 and (out / "config.json").exists(), stderr
    assert not (tmp_path / "small.work").exists()


def test_links(tmp_path: Path, invoke: Callable) -> None:
    """An output goes where its link leads, and so does a work directory, which is taken away there."""
    dense = saved_dense(tmp_path)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "small")
    (tmp_path / "work").symlink_to(tmp_path / "scratch")
    common = ("--method", "removal", "--layers", "1", "--samples", "2", "--seq-len", "16")
    code, _, stderr = invoke("compress", dense, "--out", tmp_path / "out", "--work-dir",
                             tmp_path / "work", *common)  # fmt: skip
    assert code == 0, stderr
    assert (tmp_path / "disk" / "small" / "config.json").is_file() and (tmp_path / "out").is_symlink()
    assert not (tmp_path / "scratch").exists()
    code, _, stderr = invoke("compress", dense, "--out", tmp_path / "out", "--force", *common)
    assert code == 0, stderr
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["small"]


def test_the_source_is_not_replaced_by_what_comes_of_it(
    tmp_path: Path, invoke: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_dense(tmp_path)
    before = sorted(path.name for path in model.iterdir())
    monkeypatch.chdir(model)
    for out in (model, "."):
        code, _, stderr = invoke("compress", model, "--out", out, "--force", "--layers", "1")
        assert code == 2 and "is the model itself" in stderr
    assert sorted(path.name for path in model.iterdir()) == before
