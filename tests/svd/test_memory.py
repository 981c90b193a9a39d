"""How much memory is free, in a container and outside, and what of it results of a model on a GPU may take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from taco_svd import memory, taco

from .tiny_models import tiny_model

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a file system with 4000 MiB available."""
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 4096000 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


def limit(machine: Path, most: str, used: int, cached: int) -> None:
    group = machine / "sys/fs/cgroup"
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_free_memory_is_the_least_of_machine_and_container(machine: Path) -> None:
    assert memory.free_memory() == 4000 * MIB
    limit(machine, "max", 1, 1)
    assert memory.free_memory() == 4000 * MIB
    limit(machine, str(1000 * MIB), 900 * MIB, 300 * MIB)  # what caches files is free
    assert memory.free_memory() == 400 * MIB
    limit(machine, str(1000 * MIB), 1100 * MIB, 0)
    assert memory.free_memory() == 0
    limit(machine, str(9000 * MIB), 0, 0)
    assert memory.free_memory() == 4000 * MIB
    (machine / "sys/fs/cgroup/memory.stat").write_text("nothing known")
    assert memory.free_memory() == 4000 * MIB


def test_a_system_that_does_not_tell(machine: Path) -> None:
    (machine / "proc/meminfo").unlink()
    assert memory.free_memory() is None and memory.host_room() == 0


def test_on_a_gpu_statistics_may_lie_in_the_machines_memory(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert taco.memory_for(model) == taco.LEAST_MEMORY
    monkeypatch.setattr(taco, "embedding_weight", lambda model: SimpleNamespace(device=torch.device("cuda")))
    assert taco.memory_for(model) == 2000 * MIB
    assert taco.memory_for(model, processes=4) == 500 * MIB
    (machine / "proc/meminfo").unlink()
    assert taco.memory_for(model) == taco.LEAST_MEMORY
