"""A pass layer by layer against the whole model's backward pass, and its continuation after an interruption."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from taco_svd import layerwise
from taco_svd.architectures import Architecture, LinearSite
from taco_svd.layerwise import LayerwisePass
from taco_svd.store import Store
from taco_svd.suffix import SuffixRunner

from .tiny_models import tiny_model

Seen = dict[LinearSite, list[tuple[torch.Tensor, torch.Tensor]]]


def collected(seen: Seen):
    return lambda site, x, gradient: seen.setdefault(site, []).append((x.clone(), gradient.clone()))


def store_for(kind: str, tmp_path: Path) -> Store:
    return {"memory": Store(memory=1 << 30), "temporary": Store(), "directory": Store(tmp_path / "work")}[kind]


# how entries are kept does not depend on the model
@pytest.mark.parametrize(
    "name, kind",
    [*((name, "memory") for name in ("llama", "gemma2", "phi3", "gpt2", "opt")), ("llama", "temporary"),
     ("llama", "directory")],
)  # fmt: skip
def test_equals_the_whole_models_backward_pass(
    name: str, kind: str, calibration_tokens: torch.Tensor, tmp_path: Path
) -> None:
    architecture = Architecture(tiny_model(name))
    sites = architecture.sites([1, 2])
    whole: Seen = {}
    layerwise: Seen = {}
    residual: dict[int, list[torch.Tensor]] = {}
    expected: dict[int, list[torch.Tensor]] = {}

    def keep_gradient(layer: int, _: object, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        leaving = output[0] if isinstance(output, tuple) else output
        leaving.register_hook(lambda g: expected.setdefault(layer, []).append(g.clone()))

    with ExitStack() as stack:
        for layer in (1, 2, 3):
            hook = architecture.layers[layer].register_forward_hook(partial(keep_gradient, layer))
            stack.callback(hook.remove)
        SuffixRunner(architecture, calibration_tokens, 0, 24).backward(sites, collected(whole))
    store = store_for(kind, tmp_path)
    LayerwisePass(architecture, calibration_tokens, store, batch_tokens=24).backward(
        sites, collected(layerwise), residual_callback=lambda layer, g: residual.setdefault(layer, []).append(g.clone())
    )
    assert whole.keys() == layerwise.keys() == set(sites)
    for site in sites:
        for (x, gradient), (x2, gradient2) in zip(whole[site], layerwise[site], strict=True):
            torch.testing.assert_close(x2, x, rtol=1e-5, atol=1e-6)
            # sums over up to `width` terms in float32, in another order
            torch.testing.assert_close(gradient2, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-12)
    for layer, gradients in expected.items():
        for one, two in zip(gradients, residual[layer], strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6 * float(one.abs().max()) + 1e-12)
    assert all(parameter.requires_grad for parameter in architecture.model.parameters())
    assert not any(name.startswith("pass/") for name in [*store._index, *store._held])  # nothing is left behind


@pytest.mark.parametrize("stop_after", [3, 2, 1])
def test_goes_on_where_it_was_stopped(stop_after: int, calibration_tokens: torch.Tensor, tmp_path: Path) -> None:
    """Layers that were finished are not handed out again, and the rest comes out bit for bit the same."""
    architecture = Architecture(tiny_model("llama"))
    sites = architecture.sites([1, 2, 3])
    reference: Seen = {}
    LayerwisePass(architecture, calibration_tokens, Store(), batch_tokens=24).backward(sites, collected(reference))

    class Stopped(Exception):
        pass

    def stop(layer: int) -> None:
        if layer == stop_after - 1:
            raise Stopped

    first: Seen = {}
    with pytest.raises(Stopped):
        LayerwisePass(architecture, calibration_tokens, Store(tmp_path / "work"), batch_tokens=24).backward(
            sites, collected(first), lowest=0, finished=stop
        )
    second: Seen = {}
    LayerwisePass(architecture, calibration_tokens, Store(tmp_path / "work"), batch_tokens=24).backward(
        sites, collected(second), lowest=0
    )
    # the layer at which it stopped was not finished: it comes again
    assert {site.layer for site in second} == set(range(1, stop_after)) | ({stop_after - 1} - {0})
    for site, pairs in second.items():
        for ours, theirs in zip(pairs, reference[site], strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("room", [1 << 30, 0])
def test_on_a_gpu_no_work_directory_gets_what_lies_between_layers(
    room: int, calibration_tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that was interrupted begins anew, and gives the same bits."""
    architecture = Architecture(tiny_model("llama"))
    sites = architecture.sites([1, 2, 3])
    reference: Seen = {}
    LayerwisePass(architecture, calibration_tokens, Store(tmp_path / "cpu"), batch_tokens=24).backward(
        sites, collected(reference)
    )
    monkeypatch.setattr(layerwise, "_is_quick", lambda device: True)
    monkeypatch.setattr(layerwise, "host_room", lambda processes: room)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    store = Store(tmp_path / "gpu")
    store.put("moments", {"kept": torch.ones(3)})

    def stop(layer: int) -> None:
        assert store._index.keys() == {"moments"}
        assert bool(list(scratch.glob("*/*.safetensors"))) == (room == 0)
        if layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LayerwisePass(architecture, calibration_tokens, store, batch_tokens=24).backward(
            sites, collected({}), finished=stop
        )
    assert not list(scratch.iterdir())
    found: Seen = {}
    again = LayerwisePass(architecture, calibration_tokens, Store(tmp_path / "gpu"), batch_tokens=24)
    again.backward(sites, collected(found))
    assert found.keys() == reference.keys()
    for site, pairs in found.items():
        for ours, theirs in zip(pairs, reference[site], strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert Store(tmp_path / "gpu").get("moments")["kept"].tolist() == [1.0] * 3


def test_float16_gradients_do_not_vanish(calibration_tokens: torch.Tensor) -> None:
    def gradient(dtype: torch.dtype) -> torch.Tensor:
        architecture = Architecture(tiny_model("llama", dtype))
        site = architecture.sites([3])[-1]
        seen: Seen = {}
        LayerwisePass(architecture, calibration_tokens, Store(memory=1 << 30)).backward([site], collected(seen))
        return torch.cat([g.float() for _, g in seen[site]])

    half, full = gradient(torch.float16), gradient(torch.float32)
    assert float((half - full).norm() / full.norm()) < 30 * torch.finfo(torch.float16).eps
