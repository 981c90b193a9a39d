"""Budgets of measured time: a latency that a model must not exceed, an overhead that its bridges must not.

On a GPU both are of CUDA graphs (not yet run on one): eager decoding takes what its launches take, whatever the ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .allocation import Costs
from .architectures import Architecture, set_config, slice_config
from .bench import weight_bytes_of, work
from .bench_runner import PHASES, Runner
from .budget import bridge_structure
from .calibration import context_length
from .device_costs import DeviceCosts
from .errors import TacoError
from .experts import open_modules
from .module_tree import structural_copy
from .options import parse_latency
from .progress import Progress, Silent
from .structure import Structure
from .surgery import drop_layers
from .wide_products import in_natural_products

# Of the overhead that is allowed, what the prediction may use. The promise is about the upper end of an interval: the
# rest covers the interval's width and what single calls do not show.
SAFETY = 2 / 3
PROMPT = 512


@in_natural_products
def model_seconds(model: PreTrainedModel, phase: str, prompt: int, samples: int = 7) -> float:
    """Median seconds of a decode step (batch 1, after `prompt` tokens) or of a prefill of `prompt` tokens.

    On a GPU in a CUDA graph, as `DeviceCosts` times single calls.

    Raises:
        TacoError: it cannot be captured in one.
    """
    on_gpu = model.device.type == "cuda"
    if on_gpu and next(open_modules(model), None) is not None:
        raise TacoError(
            "On a GPU a budget of time is one of CUDA graphs, in which experts that are factorised one by one cannot "
            "run; give --experts whole, or --keep."
        )
    runner = Runner(model, "graph" if on_gpu else "eager", 1, prompt, samples + 2, (phase,))
    sample: Callable[[], float] = runner.prefill if phase == "prefill" else runner.decode
    first = [sample() for _ in range(2)][-1]
    # a sample of seconds is steady enough to need few of them
    return statistics.median(sample() for _ in range(samples if first < 1 else 3))


def without_layers(model: PreTrainedModel, gone: list[int]) -> PreTrainedModel:
    """A structural copy of a dense model without some layers: same weights, no memory."""
    bare = structural_copy(model)
    depth = len(Architecture(bare).layers)
    keep = [layer for layer in range(depth) if layer not in gone]
    drop_layers(Architecture(bare), keep)
    set_config(bare, slice_config(model.config, keep))
    return bare.eval()


def costs_for(model: PreTrainedModel) -> DeviceCosts:
    """The table for models of this size, dtype and device."""
    return DeviceCosts(model.device, model.dtype, working_set=weight_bytes_of(model))


def prompt_length(model: PreTrainedModel, prompt: int = PROMPT) -> int:
    """`prompt`, or what the model's context leaves room for."""
    return max(1, min(prompt, context_length(model) - 16))


@dataclass(frozen=True)
class Overhead:
    """Bridges whose predicted cost stays below a limit.

    Attributes:
        structure: with the rank that was chosen.
        rank: of the bridges.
        predicted: phase -> cost of all bridges over the latency of bare removal.
        record: for the plan.
    """

    structure: Structure
    rank: int
    predicted: dict[str, float]
    record: dict[str, Any]


def bridges_within(
    model: PreTrainedModel,
    redundant: list[int],
    max_overhead: float,
    costs: DeviceCosts | None = None,
    seconds: Callable[[PreTrainedModel, str, int], float] = model_seconds,
    progress: Progress | None = None,
) -> Overhead:
    """The largest rank at which all bridges together cost at most `max_overhead` of the model with the layers removed.

    Holds in prefill (512 tokens, or the context) and in decode after it, batch 1. The rank never exceeds the default
    of `bridge_structure`: a bridge is to be small in memory as well.

    Args:
        model: dense, on the device that is measured.
        redundant: layers that are taken out.
        max_overhead: e.g. 0.003.

    Raises:
        TacoError: not between 0 and 1, or out of reach even at rank 1.
    """
    if not 0 < max_overhead < 1:
        raise TacoError(f"--max-overhead must be above 0 and below 1 (0.003 is 0.3%), got {max_overhead}.")
    architecture = Architecture(model)
    widest = bridge_structure(architecture, redundant, None)
    hidden, prompt = model.config.hidden_size, prompt_length(model)
    if not widest.bridges:
        return Overhead(widest, 0, dict.fromkeys(PHASES, 0.0), {"max_overhead": max_overhead})
    costs = costs or costs_for(model)
    with (progress or Silent()).step("measuring what bridges cost") as report:
        bare = without_layers(model, redundant)
        whole = {}
        for number, phase in enumerate(PHASES):
            whole[phase] = seconds(bare, phase, prompt)
            report(number + 1, len(PHASES) + 1)
        rows = {"prefill": prompt, "decode": 1}
        count, most = len(widest.bridges), widest.bridges[0].rank

        # A single call reads its factors faster than they come among all the other weights of a decode step.
        per_byte = whole["decode"] / work(bare, "decode", 1, prompt)
        per_direction = 2 * hidden * model.dtype.itemsize * per_byte

        def overhead(rank: int) -> dict[str, float]:
            seconds = {phase: costs.bridge(hidden, rank, rows[phase]) for phase in PHASES}
            streamed = costs.bridge(hidden, 1, 1) + (rank - 1) * per_direction
            seconds["decode"] = max(seconds["decode"], streamed)
            return {phase: count * seconds[phase] / whole[phase] for phase in PHASES}

        fits = [rank for rank in _ranks_to_try(most) if max(overhead(rank).values()) <= SAFETY * max_overhead]
        costs.close()
    if not fits:
        phase, least = max(overhead(1).items(), key=lambda entry: entry[1])
        raise TacoError(
            f"--max-overhead {max_overhead:.2%} is out of reach: {count} bridge{'s' * (count > 1)} of rank 1 cost "
            f"{least:.2%} in {phase} here (the layers that stay take {whole[phase] * 1e3:.1f} ms); "
            f"allow {least / SAFETY:.2%}, or take --method removal."
        )
    rank = max(fits)
    predicted = overhead(rank)
    record = {
        "max_overhead": max_overhead,
        "cost_model": dict(costs.key),
        "predicted_overhead": predicted,
        "prompt": prompt,
    }
    return Overhead(bridge_structure(architecture, redundant, rank), rank, predicted, record)


def _ranks_to_try(most: int) -> list[int]:
    """Up to 8 every rank, from there on multiples of 8."""
    return [rank for rank in range(1, most + 1) if rank < 8 or rank % 8 == 0]


class LatencyCosts(Costs):
    """A budget of measured seconds per decoded token, batch 1.

    The dense model and what its layers take are measured as they run; a factorised map changes that by the difference
    between its own measured time and the dense map's.

    Raises:
        TacoError: taking layers out does not make this model faster here.
    """

    unit = "seconds"

    def __init__(
        self,
        model: PreTrainedModel,
        costs: DeviceCosts | None = None,
        seconds: Callable[[PreTrainedModel, str, int], float] = model_seconds,
        progress: Progress | None = None,
    ) -> None:
        self.costs = costs or costs_for(model)
        depth, prompt = len(Architecture(model).layers), prompt_length(model, 128)
        gone = list(range(1, 1 + max(1, depth // 2)))
        with (progress or Silent()).step("measuring the dense model") as report:
            self.total: float = seconds(model, "decode", prompt)
            report(1, 2)
            fewer = seconds(without_layers(model, gone), "decode", prompt)
            report(2, 2)
        self.layer: float = (self.total - fewer) / len(gone)
        if self.layer <= 0:
            raise TacoError(
                "A latency budget needs quieter timings: without half of its layers the model was measured no faster. "
                "Stop what else runs on this machine, or give --keep."
            )
        self.prompt = prompt

    def of_map(self, out_features: int, in_features: int, rank: int | None, pivoted: bool) -> float:
        if rank is None:
            return self.costs.linear(out_features, in_features)
        return self.costs.low_rank(out_features, in_features, rank, pivoted)

    def of_bridge(self, hidden: int, rank: int) -> float:
        return self.costs.bridge(hidden, rank)

    def render(self, amount: float) -> str:
        return f"{amount * 1e3:.3f} ms per token"

    def budget(self, max_latency: str | float) -> float:
        """Seconds per token that `max_latency` allows.

        Raises:
            TacoError: not readable, or no less than the dense model takes.
        """
        fraction, seconds = parse_latency(max_latency)
        if seconds is None:
            assert fraction is not None
            return fraction * self.total
        if seconds >= self.total:
            raise TacoError(
                f"--max-latency {seconds * 1e3:g}ms is met by the dense model: it takes {self.render(self.total)} here."
            )
        return seconds

    def record(self, most: float, cost: float) -> dict[str, Any]:
        """What the plan says of the budget."""
        return {
            "max_latency": most,
            "cost_model": dict(self.costs.key),
            "dense_latency": self.total,
            "predicted_latency": cost,
            "prompt": self.prompt,
        }
