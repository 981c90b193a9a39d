"""What `compress` is asked for, and what that means for a model: words, budgets and layers, checked before any work."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from .architectures import Architecture
from .arguments import fraction_or_none, given_layers, whole_or_none
from .baselines import everywhere, uniform_budget
from .budget import Sizes, layers_and_ratio
from .errors import TacoError
from .experts import EXPERTS
from .importance import MEASURES
from .methods import METHODS
from .model_checks import factorisable
from .model_size import parameter_count, weight_bytes

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class CompressionOptions:
    """How much of a model goes, and how; numbers of any library are taken as Python's own.

    Attributes:
        method: "taco", "paper", "svd", "removal", "bridge", or a published method (`baselines.BASELINES`).
        keep: share of all parameters that may remain (0.8), or bytes as text ("4.2GB"); or
        layers: number of redundant layers, or which ones; with
        compression_ratio: the paper's c for their matrices (default 0.7).
        importance: how redundant layers are found: "bi", "angular" or "greedy".
        bridge_rank: rank of the bridges; default: all of them cost 0.3% of the layers that stay.
        one_shot: method "paper": one pass over the dense model attributes all linear layers.
        consistency: methods "taco" and "bridge": re-fit what writes to the residual stream.
        max_overhead: method "bridge": what all bridges may cost over bare removal, in measured time (0.003 is 0.3%).
        max_latency: method "taco": a fraction of the dense model's latency (0.8), or milliseconds per decoded token
            ("12.5ms"), instead of `keep`.
        max_kl: method "taco": instead of `keep`, the KL divergence from the dense model (nats per token, predicted on
            the calibration windows) that the smallest model may have.
        experts: of a mixture: "factorised" (methods taco, paper and svd: each expert's maps like any other) or "whole".

    Raises:
        TacoError: a word that is unknown, a value of another type, an option of another method, or budgets that
            contradict each other.
    """

    method: str = "taco"
    keep: float | str | None = None
    layers: int | list[int] | None = None
    compression_ratio: float | None = None
    importance: str = MEASURES[0]
    bridge_rank: int | None = None
    one_shot: bool = False
    consistency: bool = True
    max_overhead: float | None = None
    max_latency: float | str | None = None
    max_kl: float | None = None
    experts: str = EXPERTS[0]

    def __post_init__(self) -> None:
        plain = {
            "keep": self.keep if isinstance(self.keep, str) else fraction_or_none("keep", self.keep),
            "layers": given_layers(self.layers),
            "compression_ratio": fraction_or_none("compression_ratio", self.compression_ratio),
            "bridge_rank": whole_or_none("bridge_rank", self.bridge_rank),
            "max_overhead": fraction_or_none("max_overhead", self.max_overhead),
            "max_kl": fraction_or_none("max_kl", self.max_kl),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        self._check_words()
        self._check_budgets()

    @property
    def share(self) -> float | None:
        """Of the parameters, what may remain; None where `keep` is not such a share."""
        return None if self.keep is None else parse_keep(self.keep)[0]

    @property
    def keep_bytes(self) -> int | None:
        """Of all weights, the bytes that may remain; None where `keep` is not given in bytes."""
        return None if self.keep is None else parse_keep(self.keep)[1]

    @property
    def sizes_itself(self) -> bool:
        """Whether the budget is none of size, so that the allocator finds how large the model may be."""
        return self.max_latency is not None or self.max_kl is not None

    def given(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    def _check_words(self) -> None:
        method, importance = self.method, self.importance
        if method not in METHODS:
            raise TacoError(f"--method must be one of {', '.join(METHODS)}, got {method!r}.")
        facts = METHODS[method]
        if importance not in MEASURES:
            raise TacoError(f"--importance must be one of {', '.join(MEASURES)}, got {importance!r}.")
        if self.experts not in EXPERTS:
            raise TacoError(f"--experts must be one of {', '.join(EXPERTS)}, got {self.experts!r}.")
        if self.bridge_rank is not None and not facts.bridges:
            raise TacoError("--bridge-rank goes with --method bridge.")
        if self.one_shot and not facts.attributes:
            raise TacoError("--one-shot goes with --method paper (the other methods need one pass at most anyway).")
        if not self.consistency and not facts.refits:
            raise TacoError("--no-consistency goes with --method taco or bridge; the others re-fit nothing.")
        if importance != MEASURES[0]:
            if isinstance(self.layers, list):
                raise TacoError("--importance finds redundant layers, and these are named.")
            own = facts.importance is not None
            if own or self.sizes_itself or everywhere(method, None if self.keep is None else 1.0):
                what = "has its own way to find redundant layers" if own else "compresses all layers here"
                raise TacoError(f"--importance has nothing to decide: --method {method} {what}.")

    def _check_budgets(self) -> None:
        if self.keep is not None:
            parse_keep(self.keep)
        if self.max_overhead is not None:
            if not METHODS[self.method].bridges:
                raise TacoError(
                    "--max-overhead goes with --method bridge; --method taco takes --max-latency, or a --keep."
                )
            if self.bridge_rank is not None:
                raise TacoError("Give --max-overhead or --bridge-rank, not both.")
            if not 0 < self.max_overhead < 1:
                raise TacoError(f"--max-overhead must be above 0 and below 1 (0.003 is 0.3%), got {self.max_overhead}.")
        for name, value in (("--max-latency", self.max_latency), ("--max-kl", self.max_kl)):
            if value is None:
                continue
            if not METHODS[self.method].whole_model:
                raise TacoError(f"{name} goes with --method taco.")
            if self.keep is not None or self.layers is not None:
                raise TacoError(f"{name} is a budget of its own: leave out --keep and --layers.")
            if self.compression_ratio is not None:
                raise TacoError(f"--compression-ratio goes with --layers; {name} decides every rank by itself.")
        if self.max_latency is not None:
            parse_latency(self.max_latency)
            if self.max_kl is not None:
                raise TacoError("Give --max-latency or --max-kl, not both.")
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise TacoError(f"--max-kl must be above 0 (nats per token, e.g. 0.01), got {self.max_kl}.")


@dataclass(frozen=True)
class Resolved:
    """What options mean for one model.

    Attributes:
        architecture: the model as the method sees it: experts as linear layers of their own, or whole.
        layers: the layers that were named; None where there are none, or only their number.
        share: of the parameters, what may remain; None without such a budget.
        count: number of redundant layers; 0 where the budget is none of size.
        ratio: the paper's c; None for methods that remove layers whole or have no ratio.
    """

    architecture: Architecture
    layers: list[int] | None
    share: float | None
    count: int
    ratio: float | None


def resolve(options: CompressionOptions, architecture: Architecture, model: PreTrainedModel | None = None) -> Resolved:
    """Holds options against a model, by shapes alone.

    Args:
        model: whose weights count; default `architecture.model`, which may be a skeleton.

    Raises:
        TacoError: layers that are not there, sizes out of reach, experts that cannot be timed.
    """
    model = model or architecture.model
    layers = _named(options, architecture)
    timed = options.max_latency is not None
    seen = factorisable(architecture, options.method, options.experts, timed=timed)
    if options.sizes_itself:
        return Resolved(seen, layers, None, 0, None)
    share, keep_bytes = options.share, options.keep_bytes
    if keep_bytes is not None:
        whole = weight_bytes(model)
        if not 0 < keep_bytes < whole:
            raise TacoError(f"--keep {options.keep} must be above 0 and below the model's {whole:,} bytes of weights.")
        # what goes has the model's dtype, the rest need not
        share = 1 - (whole - keep_bytes) / (model.dtype.itemsize * parameter_count(model))
    number = len(layers) if layers is not None else options.layers
    assert not isinstance(number, list)
    if everywhere(options.method, share) and number is None and options.compression_ratio is None:
        assert share is not None
        uniform_budget(seen, share, options.method)
        return Resolved(seen, layers, share, len(seen.layers), None)
    count, ratio = layers_and_ratio(
        Sizes.of(seen), options.method, share, number, options.compression_ratio, options.bridge_rank
    )
    return Resolved(seen, layers, share, count, ratio)


def _named(options: CompressionOptions, architecture: Architecture) -> list[int] | None:
    if not isinstance(options.layers, list):
        return None
    chosen, depth = options.layers, len(architecture.layers)
    if len(set(chosen)) != len(chosen) or not all(0 <= layer < depth for layer in chosen):
        raise TacoError(f"The layers to replace must be different and in 0..{depth - 1}, got {chosen}.")
    return list(chosen)


def parse_keep(text: str | float) -> tuple[float | None, int | None]:
    """(share, bytes), one of them None: ``0.8`` is a share of the parameters, ``4.2GB`` or ``900MiB`` are bytes.

    Raises:
        TacoError: neither.
    """
    if not isinstance(text, str):
        return float(text), None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match and not match[2]:
        return float(match[1]), None
    if match and match[2].lower() in _UNITS:
        return None, int(float(match[1]) * _UNITS[match[2].lower()])
    raise TacoError(f"--keep takes a share of the parameters (0.8) or bytes (4.2GB, 900MiB), got {text!r}.")


def parse_latency(text: str | float) -> tuple[float | None, float | None]:
    """(fraction of the dense model's, seconds per decoded token), one of them None: ``0.8``, or ``12.5ms``.

    Raises:
        TacoError: neither, or not above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms)?\s*", str(text))
    if not match or float(match[1]) <= 0:
        raise TacoError(
            f"--max-latency takes a fraction of the dense model's (0.8) or milliseconds per decoded token (12.5ms), "
            f"got {text!r}."
        )
    value = float(match[1])
    if match[2]:
        return None, value / 1e3
    if value >= 1:
        raise TacoError(f"--max-latency as a fraction must be below 1, got {text}; milliseconds are written {text}ms.")
    return value, None
