"""Whole-model latency in interleaved rounds, measured until the interval of each comparison is narrow enough.

A round is A B B A: drift of the machine, and whatever a model finds in the caches after the other one or after itself,
hits both alike. A comparison is the median over rounds of the ratio within a round, minus one, with a bootstrap 95%
interval over rounds that allows for rounds like the one before (`intervals.bootstrap`). Only two models take turns at a
time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from taco_kernels.env import build_digest

from .bench_memory import cache_bytes, check_memory, tokens_seen, working_bytes
from .bench_models import BenchModels
from .bench_runner import MODES, PHASES, Runner, check_mode
from .bridge_share import bridge_share
from .bridge_window import overhead_in_windows
from .calibration import context_length
from .devices import device_name
from .energy import energy_counter
from .errors import TacoError
from .experts import is_of_expert, share_of_experts
from .intervals import Ratio, bootstrap, percentiles
from .module_tree import structural_copy
from .plan import versions
from .progress import Progress, Silent
from .replacement import LowRankBridge
from .wide_products import needs_wide_products

# 2: `settings.decode_steps`, which was `settings.window` in 1, and `build`. Reports read neither.
FORMAT = 2
# A sample shorter than this is timed as several steps at once: the clock and the synchronisation would show.
LEAST_SAMPLE_SECONDS = 0.005
# Rounds before an interval is believed: the bootstrap of a median of fewer is too narrow.
LEAST_ROUNDS = 12


@dataclass(frozen=True)
class PairResult:
    """One model against another, in one phase.

    Attributes:
        overhead: latency / latency of the other - 1.
        rounds: rounds of two samples of each.
        stopped: "interval" (as narrow as asked for), "time" or "rounds" (a limit was reached first).
        bytes: weights and cache that a decode step reads, over the other's; decode only.
        flops: of a prefill, over the other's; prefill only.
        bridges: time inside the bridges over the rest of a step's (`bridge_share`), and of how many samples: of a
            bridged model over removal, eagerly on a CPU.
        windows: what the bridges add to a step, by a clock that runs only where they can (`bridge_window`), and of how
            many rounds: of the same models.
        windows_control: the same with the bridges off on both sides; with `BenchSettings.control`.
    """

    overhead: Ratio
    rounds: int
    stopped: str
    bytes: float | None = None
    flops: float | None = None
    bridges: dict[str, float] | None = None
    windows: dict[str, float] | None = None
    windows_control: dict[str, float] | None = None


@dataclass
class BenchSettings:
    """What is measured and how long.

    Attributes:
        batches, prompt, decode_steps: sequences at once; tokens each; tokens decoded before the cache is taken back.
        modes, phases: of `bench_runner.MODES` and `PHASES`.
        pairs: names to compare; models that are missing are left out.
        precision: half the width of the interval, as a fraction, at which a comparison against removal is done;
            against the dense model ten times that is enough.
        seconds: limit for one comparison in one phase; `LEAST_ROUNDS` are made all the same, unless
        rounds: exactly so many are asked for.
        control: also compares removal with a second copy of itself on the same weights: an interval around zero shows
            what the measurement can resolve.
        energy: also measures energy per token where the device reports it.
    """

    batches: tuple[int, ...] = (1,)
    prompt: int = 128
    decode_steps: int = 64
    modes: tuple[str, ...] = ("eager",)
    phases: tuple[str, ...] = PHASES
    pairs: tuple[tuple[str, str], ...] = (("compressed", "removal"), ("compressed", "dense"))
    precision: float = 0.0005
    seconds: float = 60.0
    rounds: int | None = None
    control: bool = False
    energy: bool = True

    @property
    def length(self) -> int:
        """Tokens per sequence at most."""
        return self.prompt + (self.decode_steps if "decode" in self.phases else 0)

    def check(self) -> None:
        """Raises TacoError for what cannot be measured."""
        if min(self.batches, default=0) < 1 or self.prompt < 1 or self.decode_steps < 1:
            raise TacoError("--batch, --prompt and --decode must be at least 1.")
        if self.rounds is not None and self.rounds < 1:
            raise TacoError("--rounds must be at least 1.")
        if not self.precision > 0 or not self.seconds > 0:
            raise TacoError("--precision and --seconds must be above 0.")
        for name, values, known in (("--mode", self.modes, MODES), ("--phase", self.phases, PHASES)):
            if not values or not set(values) <= set(known):
                raise TacoError(f"{name} takes {', '.join(known)}, with commas, got {','.join(values)!r}.")


def round_ratios(one: list[float], other: list[float]) -> list[float]:
    """The ratio minus one of each round, from the two samples that each model has in it."""
    rounds = range(0, len(one), 2)
    return [sum(one[at : at + 2]) / sum(other[at : at + 2]) - 1 for at in rounds]


@contextmanager
def no_collections() -> Iterator[None]:
    """Python's garbage collector would stop one of the two, now and then, for milliseconds."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def compare_pair(
    one: Callable[[], float],
    other: Callable[[], float],
    precision: float,
    seconds: float,
    rounds: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Ratio, str, list[float], list[float]]:
    """Times two functions that give seconds, in rounds A B B A, until the interval's half width is `precision`.

    It must be so at two looks in a row, with a quarter more rounds at the second: of a width that goes up and down, the
    first narrow one is narrow by chance too often (89% of such intervals hold the true ratio, 94% of the second).

    Returns:
        (ratio minus one, why it stopped, seconds of the one, of the other)
    """
    times: tuple[list[float], list[float]] = ([], [])
    for function in (one, other):
        function()
    began, next_look, was_narrow, done = clock(), LEAST_ROUNDS, False, 0
    while True:
        # the order turns around from round to round: A B B A, B A A B
        for index in (0, 1, 1, 0) if done % 2 == 0 else (1, 0, 0, 1):
            times[index].append((one, other)[index]())
        done += 1
        if rounds is not None:
            if done == rounds:
                return bootstrap(round_ratios(*times)), "rounds", *times
            continue
        # After an even number each has followed itself as often as the other: within one round only one of them does,
        # and what of its weights a cache still holds is an advantage.
        if done < LEAST_ROUNDS or done % 2:
            continue
        late = clock() - began > seconds
        if late or done >= next_look:
            ratio = bootstrap(round_ratios(*times))
            is_narrow = ratio.high - ratio.low <= 2 * precision
            if is_narrow and (was_narrow or late):
                return ratio, "interval", *times
            if late:
                return ratio, "time", *times
            was_narrow = is_narrow
            next_look = int(1.25 * done) + 1  # looking costs as much as some rounds


def run_bench(
    made: BenchModels,
    settings: BenchSettings,
    progress: Progress | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measures everything that is asked for; a plain JSON object.

    Args:
        on_row: called with what there is so far (its "complete" still false) after each mode, batch and phase.

    Raises:
        TacoError: settings that do not fit the model, its context or the memory.
    """
    settings.check()
    progress = progress or Silent()
    models = made.models
    pairs = [pair for pair in settings.pairs if set(pair) <= set(models)]
    if not pairs:
        raise TacoError("There is nothing to compare: of a model whose layers are all compressed only --against dense.")
    model = models["compressed"]
    limit = context_length(model)
    if settings.length > limit:
        decoded = f" and {settings.decode_steps} decoded ones" if "decode" in settings.phases else ""
        raise TacoError(f"{settings.prompt} prompt tokens{decoded} exceed the context of {limit}.")
    if settings.control and "removal" in models:
        models = {**models, "control": structural_copy(models["removal"])}
        pairs.append(("control", "removal"))
    wanted = {name for pair in pairs for name in pair}
    models = {name: entry for name, entry in models.items() if name in wanted}
    for entry in models.values():
        for mode in settings.modes:
            check_mode(entry, mode)
    check_caches(models, settings)
    record: dict[str, Any] = {
        "format": FORMAT,
        "complete": False,
        **made.description,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        # where this is false, a dense model in float32 is faster than one in its own dtype
        "library_multiplies": not needs_wide_products(model),
        "settings": asdict(settings),
        "weight_bytes": {name: weight_bytes_of(entry) for name, entry in models.items() if name != "control"},
        "results": [],
        "versions": versions(),
        "build": build_digest(),
    }
    for mode in settings.modes:
        for batch in settings.batches:
            for phase in settings.phases:
                with progress.step(f"{mode}, batch {batch}, {phase}") as report:
                    record["results"].append(_measure(models, pairs, settings, mode, batch, phase, report))
                if on_row is not None:
                    on_row(record)
    return {**record, "complete": True}


def check_caches(models: dict[str, PreTrainedModel], settings: BenchSettings) -> None:
    """Refuses caches and intermediate results that do not fit beside the weights.

    Raises:
        TacoError: with what is needed and what is free.
    """
    needed = 0
    for model in models.values():
        for batch in settings.batches:
            windows = set(settings.modes) == {"eager"}  # static caches keep every token
            here = cache_bytes(model.config, batch, settings.length, model.dtype, windows)
            if "prefill" in settings.phases:
                here += working_bytes(model.config, batch, settings.prompt, model.dtype)
            needed = max(needed, 2 * here)  # the two of a pair live side by side
    device = next(iter(models.values())).device
    check_memory(needed, device, f"Caches of batch {max(settings.batches)}, prompt {settings.prompt}")


def _measure(
    models: dict[str, PreTrainedModel],
    pairs: list[tuple[str, str]],
    settings: BenchSettings,
    mode: str,
    batch: int,
    phase: str,
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """One row of the result: all pairs at one mode, batch and phase."""
    times: dict[str, list[float]] = {}
    compared: dict[str, Any] = {}
    memory: dict[str, int] = {}
    energy: dict[str, float] = {}
    device = next(iter(models.values())).device
    counter, energy_source = energy_counter(device) if settings.energy else (None, "not asked for")
    for number, (one, other) in enumerate(pairs):
        samples: dict[str, Callable[..., float]] = {}
        if mode == "compiled":
            # all models run the same code, and torch gives up on code that it has compiled eight times
            torch._dynamo.reset()
        gc.collect()  # runners go by themselves, but what compiling leaves behind of them is in cycles
        for name in (one, other):
            prepare = partial(_ready_sample, models[name], settings, mode, batch, phase)
            samples[name], peak = with_peak(prepare, models[name], device)
            if peak is not None:
                memory[name] = peak
        steps = 1
        if phase == "decode":
            steps = _steps_of_a_sample(list(samples.values()), settings.decode_steps)
            samples = {name: partial(decode, steps) for name, decode in samples.items()}
        precision = settings.precision * (10 if other == "dense" else 1)
        with no_collections():
            ratio, stopped, *both = compare_pair(
                samples[one], samples[other], precision, settings.seconds, settings.rounds
            )
        for name, values in zip((one, other), both, strict=True):
            times.setdefault(name, []).extend(values)
            if counter is not None and name not in energy:
                joules = _joules(samples[name], counter)
                if joules is not None:
                    energy[name] = joules / (batch * (settings.prompt if phase == "prefill" else 1))
        share = work(models[one], phase, batch, settings.prompt) / work(models[other], phase, batch, settings.prompt)
        comparison = PairResult(
            ratio,
            len(both[0]) // 2,
            stopped,
            bytes=share if phase == "decode" else None,
            flops=share if phase == "prefill" else None,
            **_at_bridges(models[one], other, samples[one], steps, mode, settings),
        )
        compared[f"{one}/{other}"] = {
            **{key: value for key, value in asdict(comparison).items() if value is not None},
            "ratios": [round(value, 7) for value in round_ratios(*both)],  # from which another interval can be computed
        }
        samples.clear()
        report(number + 1, len(pairs))
    tokens = batch * (settings.prompt if phase == "prefill" else 1)
    rows = {}
    for name, values in times.items():
        row: dict[str, Any] = {"seconds": percentiles(values), "tokens_per_second": tokens / statistics.median(values)}
        row["cache_bytes"] = cache_bytes(models[name].config, batch, settings.prompt, models[name].dtype)
        if name in memory:
            row["peak_bytes"] = memory[name]
        if name in energy:
            row["joules_per_token"] = energy[name]
        rows[name] = row
    return {
        "mode": mode,
        "batch": batch,
        "phase": phase,
        "prompt": settings.prompt,
        "models": rows,
        "comparisons": compared,
        "energy": energy_source,
    }


def _at_bridges(
    model: PreTrainedModel, other: str, sample: Callable[[], float], steps: int, mode: str, settings: BenchSettings
) -> dict[str, dict[str, float]]:
    """What clocks at the bridges say, under the names that `PairResult` has for them."""
    bridged = any(isinstance(module, LowRankBridge) for module in model.modules())
    if not bridged or other != "removal" or mode != "eager" or model.device.type != "cpu":
        return {}
    found = {}
    with no_collections():
        ratio, number = bridge_share(model, sample, steps, settings.seconds / 4, settings.rounds)
        found["bridges"] = {**asdict(ratio), "samples": number}
        for key in ("windows", "windows_control") if settings.control else ("windows",):
            ratio, number = overhead_in_windows(
                model, sample, steps, settings.seconds / 2, settings.rounds, control=key == "windows_control"
            )
            found[key] = {**asdict(ratio), "rounds": number}
    return found


def _ready_sample(
    model: PreTrainedModel, settings: BenchSettings, mode: str, batch: int, phase: str
) -> Callable[[], float]:
    runner = Runner(model, mode, batch, settings.prompt, settings.decode_steps, (phase,))
    sample: Callable[[], float] = runner.prefill if phase == "prefill" else runner.decode
    sample()  # the first call compiles, packs weights, fills pools
    return sample


def with_peak(
    prepare: Callable[[], Callable[[], float]], model: PreTrainedModel, device: torch.device
) -> tuple[Callable[[], float], int | None]:
    """What `prepare` makes, and on a GPU the bytes that this and its model needed at most.

    What lies on the device beside them, other models and the caches of the one that it is compared with, is not
    counted; what the model's weights share with other models is.
    """
    if device.type != "cuda":
        return prepare(), None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    made = prepare()
    return made, torch.cuda.max_memory_allocated(device) - before + weight_bytes_of(model)


def _steps_of_a_sample(decodes: Sequence[Callable[[], float]], most: int) -> int:
    """Decode steps that make a sample of each of a pair long enough for the clock; at most `most`.

    As many for both: the first step of a sample finds the other model's weights in the caches and the later ones its
    own, and at any time the two caches of keys and values are to be equally long.
    """
    quick = min(decode() for _ in range(3) for decode in decodes)
    return max(1, min(most, int(LEAST_SAMPLE_SECONDS / max(quick, 1e-9)) + 1))


def _joules(sample: Callable[[], float], counter: Callable[[], float], seconds: float = 1.0) -> float | None:
    """Energy per call of what a sample times: counters move every few milliseconds, so it runs for a second."""
    spent: list[float] = []
    before, began = counter(), time.perf_counter()
    while time.perf_counter() - began < seconds or not spent:
        spent.append(sample())
    after = counter()
    elapsed = time.perf_counter() - began
    one = statistics.median(spent)  # of one call: a disturbance of a single one says nothing of the others
    if after <= before or one <= 0:
        return None
    # watts times the seconds of one step: a sample may be several steps, and what lies between them counts too
    return (after - before) / elapsed * one


def weight_bytes_of(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def work(model: PreTrainedModel, phase: str, batch: int, prompt: int) -> float:
    """What bounds a phase from below: bytes read by a decode step, or multiplications of a prefill.

    Decode reads every weight once (of the embeddings of tokens and positions only some rows, which are left out) and
    the cache.
    Prefill multiplies every token with every matrix of the layers and the last token with the head, and attends.
    Of a mixture's experts a token is multiplied with those that it is sent to, and a step reads those that some token
    is sent to, if the router spreads them evenly.
    """
    head: Any = model.get_output_embeddings()
    # rows are picked of these, nothing is multiplied with them: tokens, and positions where those are learned
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        tables.pop(id(head.weight), None)
    share = share_of_experts(model.config)
    if phase == "decode":
        unread: float = sum(weight.numel() * weight.element_size() for weight in tables.values())
        experts = sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in model.named_parameters()
            if is_of_expert(name)
        )
        unread += experts * (1 - share) ** batch
        return float(weight_bytes_of(model) - unread + cache_bytes(model.config, batch, prompt, model.dtype))
    layers = sum(
        parameter.numel() * (share if is_of_expert(name) else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 3) and id(parameter) not in tables and (head is None or parameter is not head.weight)
    )
    config: Any = model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # two products over half of tokens times tokens each, less what lies outside a window
    attention = width * sum(prompt**2 - (prompt - seen) ** 2 for seen in tokens_seen(config, prompt))
    return float(batch * (prompt * layers + attention + (0 if head is None else head.weight.numel())))
