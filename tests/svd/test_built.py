"""Finished layers of a compressed model, in memory or mapped from files, whatever happens to the files."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from taco_svd import compress, save_compressed, taco
from taco_svd.errors import DiskFullError
from taco_svd.mapped import page_out
from taco_svd.store import Store

from .tiny_models import tiny_model


def same_bits(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def test_on_disk_and_in_memory_give_the_same_factors(
    calibration_tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory, plan = compress(tiny_model("llama"), method="taco", layers=[1, 3], calibration=calibration_tokens)
    monkeypatch.setattr(taco, "LEAST_MEMORY", 0)
    monkeypatch.setattr(taco, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    on_disk, plan_on_disk = compress(tiny_model("llama"), method="taco", layers=[1, 3], calibration=calibration_tokens)
    assert same_bits(in_memory, on_disk)
    assert plan_on_disk.result.pop("measured_loss") == pytest.approx(plan.result.pop("measured_loss"), rel=1e-4)
    assert plan_on_disk.to_dict() == plan.to_dict()
    # the files are gone, what is mapped from them is not; it can be trained and saved
    gc.collect()
    assert not list(tmp_path.rglob("built*"))
    page_out(on_disk)
    assert same_bits(in_memory, on_disk)
    save_compressed(on_disk, plan_on_disk, tmp_path / "saved")
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), in_memory)
    window = {"input_ids": calibration_tokens[:1], "labels": calibration_tokens[:1]}
    loss = on_disk(**window).loss
    loss.backward()
    with torch.no_grad():
        for parameter in on_disk.parameters():
            parameter -= 0.01 * parameter.grad
        assert float(on_disk(**window).loss) < float(loss.detach())


def test_a_full_disk_leaves_finished_layers_in_memory(
    calibration_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = compress(tiny_model("llama"), method="taco", layers=[1, 3], calibration=calibration_tokens)
    put, refused = Store.put, []

    def full(self: Store, name: str, *rest: Any, **more: Any) -> None:
        if name.startswith("built/"):
            refused.append(name)
            if len(refused) == 2:
                raise DiskFullError("No space left")
        put(self, name, *rest, **more)

    monkeypatch.setattr(Store, "put", full)
    found, _ = compress(tiny_model("llama"), method="taco", layers=[1, 3], calibration=calibration_tokens)
    assert len(refused) == 2  # not tried again
    assert same_bits(expected, found)
