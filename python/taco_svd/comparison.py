"""Many methods at many sizes, side by side: perplexity, size and latency, kept as they come in.

`taco-svd compare` calls it. A method that refuses a model is recorded with its reason and does not end the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .baselines import BASELINES, Workspace
from .calibration import Calibration
from .errors import TacoError
from .evaluation import Perplexity, perplexity
from .latency import compare_latency
from .methods import METHODS
from .model_size import parameter_count, weight_bytes
from .pipeline import compress
from .plan import Plan
from .progress import Progress, Silent

DECODE_STEPS = 16


@dataclass(frozen=True)
class Setting:
    """How much is compressed: a share of the parameters to keep, or a number of redundant layers at a ratio."""

    keep: float | None = None
    layers: int | None = None
    compression_ratio: float | None = None

    def describe(self) -> dict[str, Any]:
        values = {"keep": self.keep, "layers": self.layers, "compression_ratio": self.compression_ratio}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Measure:
    """What is measured: the text's tokens and how they are cut, and the shape of the latency runs (0 rounds: none).

    `further` are tokens of other texts, by name; their perplexities stand in a row's `perplexity_on`.
    """

    tokens: torch.Tensor
    text: str
    window: int | None = None
    max_windows: int | None = None
    batch: int = 1
    prompt: int = 128
    rounds: int = 20
    further: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Comparison:
    """Results so far; `to_dict` is what `--json` prints.

    Attributes:
        models: one row per finished model, the dense one first.
        refused: method, setting and reason of those that could not be made.
        latency: of the last setting, as `latency.LatencyReport` has it.
        seconds: how long it has taken.
    """

    text: str
    calibration: dict[str, Any]
    models: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, Any] | None = None
    finished: int = 0
    total: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"text": self.text, "calibration": self.calibration, "models": self.models}
        if self.refused:
            values["refused"] = self.refused
        if self.latency is not None:
            values["latency"] = self.latency
        if self.finished < self.total:
            values["unfinished"] = self.total - self.finished
        return values

    @property
    def seconds_left(self) -> float:
        """Guessed from the mean of what is finished."""
        return self.seconds / max(1, self.finished) * (self.total - self.finished)


def method_names(text: str) -> list[str]:
    """Method names from a comma-separated list; "all" is every method.

    Raises:
        TacoError: a name that is no method.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        # smallest idea first, ours last: what is cheap is on the table early
        order = ["removal", *BASELINES]
        return [*order, *(name for name in METHODS if name not in order and name != "taco"), "taco"]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise TacoError(f"--methods takes all, or some of {', '.join(METHODS)}, got {text!r}.")
    return list(dict.fromkeys(names))


def run_comparison(
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration,
    methods: list[str],
    settings: list[Setting],
    measure: Measure,
    progress: Progress | None = None,
    on_result: Callable[[Comparison], None] | None = None,
    on_model: Callable[[str, PreTrainedModel, Plan], None] | None = None,
) -> Comparison:
    """Compresses `dense` by every method at every setting and measures each; statistics are gathered once for all.

    Latency is measured interleaved for all models of a setting and the dense one, once the setting's models are made;
    until then they are held (their factors only: whatever is untouched is shared).

    Args:
        on_result: called after every model with all results so far.
        on_model: called with every compressed model's method, the model and its plan, to save what is worth it.
    """
    progress = progress or Silent()
    workspace = Workspace(dense, calibration)
    result = Comparison(measure.text, calibration.describe(), total=len(methods) * len(settings))
    start = time.monotonic()
    dense_parameters = parameter_count(dense)

    of_dense: dict[str, Perplexity] = {}

    def measured(name: str, model: PreTrainedModel, setting: Setting | None) -> dict[str, Any]:
        scores = {}
        for text, tokens in {measure.text: measure.tokens, **measure.further}.items():
            with progress.step(f"perplexity: {name}, {text}") as report:
                score = perplexity(
                    model, tokens, window=measure.window, max_windows=measure.max_windows, progress=report
                )
            scores[text] = score.to_dict()
            if setting is None:
                of_dense[text] = score
            else:
                scores[text]["over_dense"] = score.change(of_dense[text]).to_dict()
        parameters = parameter_count(model)
        row = {
            "model": name,
            "perplexity": scores.pop(measure.text),
            "parameters": parameters,
            "share": parameters / dense_parameters,
            "bytes": weight_bytes(model),
        }
        if scores:
            row["perplexity_on"] = scores
        return row if setting is None else {**row, "setting": setting.describe()}

    def tell() -> None:
        result.seconds = time.monotonic() - start
        if on_result is not None:
            on_result(result)

    dense_row = measured("dense", dense, None)
    result.models.append(dense_row)
    tell()
    for setting in settings:
        models, rows = {"dense": dense}, {"dense": dense_row}
        for name in methods:
            try:
                candidate, plan = compress(
                    dense,
                    tokenizer,
                    method=name,
                    keep=setting.keep,
                    layers=setting.layers,
                    compression_ratio=None if METHODS[name].removes else setting.compression_ratio,
                    calibration=calibration,
                    progress=progress,
                    workspace=workspace,
                )
                row = measured(name, candidate, setting)
            except TacoError as error:
                result.refused.append({"model": name, "setting": setting.describe(), "reason": str(error)})
            else:
                result.models.append(row)
                if on_model is not None:
                    on_model(name, candidate, plan)
                if measure.rounds > 0:
                    models[name], rows[name] = candidate, row
            result.finished += 1
            tell()
        if len(models) > 1:
            with progress.step("latency, interleaved") as report:
                pairs = tuple((name, "dense") for name in models if name != "dense")
                latency = compare_latency(
                    models, pairs, measure.batch, measure.prompt, DECODE_STEPS, measure.rounds, report
                )
            result.latency = latency.to_dict()
            for name, row in rows.items():
                row["latency"] = latency.seconds[name]
                if name != "dense":
                    # ratios within rounds: they hold across settings, where seconds drift
                    row["against_dense"] = {
                        phase: {"median": 1 + ratio.median, "low": 1 + ratio.low, "high": 1 + ratio.high}
                        for phase, ratio in latency.overhead[f"{name}/dense"].items()
                    }
            tell()
    return result
