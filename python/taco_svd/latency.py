"""Latency of whole models, compared in interleaved pairs.

Every round measures all models one after another, in an order that goes around (`turns`), so that drift of the machine
hits them alike; what is reported is the median over rounds of the ratio within a round, with a bootstrap 95% interval
(DESIGN: the 0.3% target).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .bench_runner import PHASES
from .calibration import context_length
from .devices import on_device, waits_for
from .errors import TacoError
from .intervals import Ratio, bootstrap, percentiles
from .wide_products import in_natural_products


@dataclass(frozen=True)
class LatencyReport:
    """Latencies of several models in one interleaved run.

    Attributes:
        seconds: model name -> phase -> p20, p50, p80 seconds (decode: per step of one token per sequence).
        overhead: ``"a/b"`` -> phase -> latency(a) / latency(b) - 1.
    """

    batch: int
    prompt: int
    decode_steps: int
    rounds: int
    threads: int
    device: str
    seconds: dict[str, dict[str, dict[str, float]]]
    overhead: dict[str, dict[str, Ratio]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def turns(names: list[str], number: int) -> list[str]:
    """The order in which round `number` takes its models: every second round is the one before it backwards, and each
    such two begin with another model.

    Whoever ends a round begins the next and finds its own weights in the caches: with the same two at the ends always,
    only they would.
    """
    first = number // 2 % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if number % 2 else order


@torch.inference_mode()
def _one(model: PreTrainedModel, ids: torch.Tensor, steps: int, wait: Callable[[], None]) -> tuple[float, float]:
    """(prefill seconds, seconds per decode step) of one prompt batch.

    Not by a `Runner`, which keeps a cache of its own: here all models of a setting are alive at once, and only the one
    that is timed has a cache.
    """
    cache = DynamicCache(config=model.config)
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)  # see Runner._prepare_prefill
    wait()
    start = time.perf_counter()
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last)
    wait()
    prefill = time.perf_counter() - start
    token = output.logits[:, -1:].argmax(-1)
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        # a fixed token instead of the argmax: the sampler is no part of what is compared
        model(input_ids=token, past_key_values=cache, use_cache=True)
    wait()
    return prefill, (time.perf_counter() - start) / steps


def check_lengths(model: PreTrainedModel, batch: int, prompt: int, decode_steps: int, rounds: int) -> None:
    """What `compare_latency` refuses; cheap, so that it can be asked before the models are made.

    Raises:
        TacoError: a number below 1, or prompt and decode steps do not fit the model's context.
    """
    limit = context_length(model)
    if prompt < 1 or decode_steps < 1 or batch < 1 or rounds < 1:
        raise TacoError("Batch, prompt, decode steps and rounds must be at least 1.")
    if prompt + decode_steps > limit:
        raise TacoError(f"{prompt} prompt tokens and {decode_steps} decoded ones exceed the context of {limit}.")


@in_natural_products
def compare_latency(
    models: dict[str, PreTrainedModel],
    against: tuple[tuple[str, str], ...],
    batch: int = 1,
    prompt: int = 128,
    decode_steps: int = 16,
    rounds: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyReport:
    """Measures prefill and decode of all models, interleaved.

    Args:
        models: name -> model, all on one device, in eval mode.
        against: pairs of names; for each the ratio of latencies is reported.
        batch, prompt, decode_steps: sequences at once, prompt tokens each, tokens decoded after it.
        rounds: measured rounds; two more warm up.

    Raises:
        TacoError: see `check_lengths`.
    """
    first = next(iter(models.values()))
    check_lengths(first, batch, prompt, decode_steps, rounds)
    device = first.device
    wait = waits_for(device)
    vocabulary = first.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    generator = torch.Generator().manual_seed(0)
    names = list(models)
    times: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in names}
    for round_ in range(-2, rounds):
        ids = torch.randint(int(vocabulary), (batch, prompt), generator=generator).to(device)
        for name in turns(names, round_ + 2):
            with on_device(device):
                prefill, decode = _one(models[name], ids, decode_steps, wait)
            if round_ >= 0:
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode)
        if progress is not None and round_ >= 0:
            progress(round_ + 1, rounds)
    seconds = {name: {phase: percentiles(values) for phase, values in phases.items()} for name, phases in times.items()}
    overhead = {
        f"{one}/{other}": {
            phase: bootstrap([a / b - 1 for a, b in zip(times[one][phase], times[other][phase], strict=True)])
            for phase in PHASES
        }
        for one, other in against
    }
    return LatencyReport(batch, prompt, decode_steps, rounds, torch.get_num_threads(), str(device), seconds, overhead)
