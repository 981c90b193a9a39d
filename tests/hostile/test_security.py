"""No network unless it is asked for, nothing run from a checkpoint, dependencies as declared."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from taco_svd import TacoError
from taco_svd.checkpoint import load_model

# Runs in a process of its own: every way to reach another machine is recorded, and fails.
BLOCKED = """
import socket, sys
tried = []
def refuse(*arguments, **options):
    tried.append(arguments)
    raise OSError("the network is blocked")
socket.getaddrinfo = socket.create_connection = refuse
class Socket(socket.socket):
    def connect(self, address):
        if self.family != socket.AF_UNIX:
            refuse(address)
        return super().connect(address)
    def connect_ex(self, address):
        refuse(address)
    def sendto(self, *arguments):
        refuse(arguments)
socket.socket = Socket
sys.argv = ["taco-svd"]
from pathlib import Path
import torch, taco_kernels, taco_svd
from taco_svd import cli
from taco_svd.checkpoint import load_model
torch.set_num_threads(1)
dense, out = Path(DENSE), Path(OUT)

def command(*words):
    sys.argv = ["taco-svd", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, words

command("compress", dense, "--out", out / "small", "--layers", "2", "--samples", "2", "--seq-len", "16")
model, tokenizer = load_model(out / "small")
model.generate(torch.ones((1, 3), dtype=torch.int64), max_new_tokens=2, do_sample=False)
command("info", out / "small")
command("eval", out / "small", "--text", "self", "--window", "16", "--against", dense)
command("export", out / "small", "--dense", out / "plain")
command("report", out / "small", "--dense", dense, "--out", out / "page.html", "--rounds", "0", "--window", "16",
        "--max-windows", "1")
page = (out / "page.html").read_text()
assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page, "the page loads something"
print("TRIED", tried)
"""


def test_nothing_reaches_for_the_network(dense_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    code = BLOCKED.replace("DENSE", repr(str(dense_checkpoint))).replace("OUT", repr(str(tmp_path)), 1)
    environment = {
        key: value for key, value in os.environ.items() if "OFFLINE" not in key and "PROXY" not in key.upper()
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "TRIED []"


def test_the_block_blocks() -> None:
    """The test above can fail: something that does reach out is seen."""
    start = BLOCKED.split("sys.argv")[0]
    code = start + (
        "import urllib.request\n"
        "try:\n    urllib.request.urlopen('http://127.0.0.1:9')\n"
        "except OSError:\n    pass\n"
        "print('TRIED', bool(tried))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "TRIED True", done.stderr


def test_sources_do_not_open_pickles_or_run_text(repo_root: Path) -> None:
    """What could run something from a file is in none of the packages' modules (compiled regular expressions aside)."""
    banned = re.compile(
        r"\btorch\.load\(|\bimport pickle\b|\bpickle\.load|\bmarshal\b|\byaml\b|(?<![\w.])exec\(|(?<![\w.])eval\(|"
        r"trust_remote_code=True|weights_only=False|\bos\.system\(|shell=True"
    )
    found = [
        f"{path.relative_to(repo_root)}:{number}"
        for folder in ("taco_kernels", "python/taco_svd")
        for path in sorted((repo_root / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if banned.search(line)
    ]
    assert not found


def test_declared_dependencies_are_ranges_that_hold_here(repo_root: Path) -> None:
    """Every dependency has a lower bound, and what is installed is above it."""
    from importlib.metadata import version

    from packaging.version import Version

    text = (repo_root / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"\ndependencies = \[(.*?)\]", text, re.DOTALL)
    assert block is not None
    declared = re.findall(r'"([a-zA-Z0-9_-]+)>=([0-9.]+)"', block.group(1))
    assert len(declared) == block.group(1).count('",')
    for name, least in declared:
        assert Version(version(name).partition("+")[0]) >= Version(least), name


def test_files_that_a_tokenizer_reads_lie_in_the_checkpoint(dense_checkpoint: Path, tmp_path: Path) -> None:
    """What it reads it writes again, with the compressed model, for all to see."""
    secret = tmp_path / "secret"
    secret.write_text("{{ private }}")
    for number, name in enumerate(("chat_template.jinja", "merges.txt", "spiece.model", "chat_templates/tool.jinja")):
        model = tmp_path / f"model{number}"
        shutil.copytree(dense_checkpoint, model)
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).symlink_to(secret)
        with pytest.raises(TacoError, match="link"):
            load_model(model)
    (model / name).unlink()
    (model / name).write_text("{{ own }}")
    (model / "LICENSE").symlink_to(secret)  # nobody reads it
    load_model(model)


def test_a_plan_fetches_nothing(taco_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that a file names is looked for on this machine only."""
    from taco_svd import hub
    from taco_svd.evaluation_run import _dense
    from taco_svd.plan import PLAN_FILE, Plan
    from taco_svd.source_model import load_source

    small = tmp_path / "small"
    shutil.copytree(taco_checkpoint, small)
    plan = Plan.load(small)
    plan = dataclasses.replace(plan, source={**plan.source, "name": "somebody/something"})
    plan.save(small / PLAN_FILE)
    asked: list[bool] = []

    def snapshot_download(name: str, **options: object) -> None:
        asked.append(bool(options.get("local_files_only")))
        raise OSError("not here")

    model, _ = load_model(small)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert _dense(model, str(small), None)[0] is None
    with pytest.raises(TacoError, match="somebody/something"):
        load_source(model, plan, small)
    assert asked == [True, True]
