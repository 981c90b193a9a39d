"""What each linear map costs the model at each rank, and each layer when it is taken out.

The K-FAC metric predicts how a map's loss falls with its rank up to a factor (the tail of its squared weighted singular
values); measurements at a few ranks give the factor. The loss is the divergence KL(dense || changed) of the next
token, nats per token, with one change made at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .architectures import Architecture, LinearSite, linear_shape
from .calibration import embedding_weight, held_out_count, needed_begin_token
from .decomposition import Decomposition, WeightedMap
from .divergence import kl_per_token, mean_of_counted
from .experts import kind_of
from .loss import counted_positions
from .memory import release
from .predictions import Predictions
from .progress import Report
from .run_bridges import LENGTHS, Run, bridge_rank, bridged, fit_run_bridges
from .store import Store
from .surgery import put_factors
from .team import Team
from .walk import Walk

# Ranks that are measured, as shares of the full rank: the curve is bent most where few directions stay.
MEASURED_SHARES = (0.1, 0.4)
# Bytes of reference logits that may be kept, as of float32: large vocabularies are measured on fewer tokens.
REFERENCE_BYTES = 1 << 28
# Changed models climb through all layers above them, most of what the curves cost. On classics-16l at keep 0.8 (KL on
# text that calibration never saw, +-0.0001): 0.0093 with 1024 tokens and with 512, 0.0099 with 256.
MEASURED_TOKENS = 512
# Every map is measured by itself: to measure what reads the same input together (q, k and v; gate and up) would spare
# two in five climbs, and cost 3% to 5% of KL at keep 0.9 and 0.8 (nothing at 0.7; one draw, books).
# Layers whose maps are measured; between them the factor is interpolated. A model twice as deep would else cost four
# times as much to measure.
MEASURED_LAYERS = 16
# Hidden states of changed models that climb through the layers side by side.
STREAM_BYTES = 64 << 20


@dataclass(frozen=True)
class LossCurves:
    """Predicted loss (KL, nats per token) of single changes.

    Attributes:
        maps: per linear map float64 [full rank + 1]: the loss when that many directions stay; 0 at full rank.
        removal: per layer the loss when it is taken out.
        bridged: per run of layers (first, last) the rank and the loss when one bridge stands for it.
    """

    maps: Mapping[LinearSite, torch.Tensor]
    removal: Mapping[int, float]
    bridged: Mapping[Run, tuple[int, float]] = field(default_factory=dict)


def tail_energies(sigma: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of all but the r largest singular values, for r = 0 .. len(sigma): float64."""
    squares = sigma.double().square()
    tail = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


def scaled_curve(tail: torch.Tensor, points: Sequence[tuple[int, float]]) -> torch.Tensor:
    """A tail scaled through measured points (rank, loss): the logarithm of the factor is linear in log tail between
    them and constant beyond.

    Losses that are not positive (rounding, or a change that happens to help) count as a thousandth of the prediction.
    """
    tail = tail.double()
    floor = float(tail[0]) * 1e-12
    scale = max((loss / float(tail[rank]) for rank, loss in points if float(tail[rank]) > floor), default=0.0)
    known = sorted(
        (float(tail[rank].log()), max(loss / float(tail[rank]), 1e-3 * scale))
        for rank, loss in points
        if float(tail[rank]) > floor
    )
    if not known or scale <= 0:
        return tail * 0.0
    x = tail.clamp(min=floor).log()
    xs = torch.tensor([at for at, _ in known], dtype=torch.float64, device="cpu")
    ys = torch.tensor([factor for _, factor in known], dtype=torch.float64, device="cpu").log()
    if len(known) == 1:
        factor = ys.exp().to(tail.device).expand_as(x)
    else:
        right = torch.searchsorted(xs, x.cpu()).clamp(1, len(known) - 1)
        share = ((x.cpu() - xs[right - 1]) / (xs[right] - xs[right - 1])).clamp(0, 1)
        factor = (ys[right - 1] + share * (ys[right] - ys[right - 1])).exp().to(tail.device)
    curve = tail * factor
    # fewer directions never cost less: interpolation must not say so
    return curve.flip(0).cummax(0).values.flip(0)


# What is changed at once: one linear map, or the same map of all experts of a layer.
Unit = tuple[LinearSite, ...]


def units_of(sites: Sequence[LinearSite]) -> list[Unit]:
    """The maps of one layer as they are measured: experts see different tokens, so what they lose adds up, and one
    measurement of all of them tells what each would have told by itself with less noise."""
    found: dict[str, list[LinearSite]] = {}
    for site in sites:
        found.setdefault(kind_of(site.path), []).append(site)
    return [tuple(unit) for unit in found.values()]


@dataclass(frozen=True)
class _Change:
    """A single change of the model (maps factorised, a run bridged, or a layer removed), and the hidden states that it
    leads to so far, per batch."""

    site: Unit | Run | None
    layer: int
    rank: int
    hidden: list[torch.Tensor]


class CurveMeasurement:
    """Measures maps at a few ranks and layers' removal, one change at a time, on a few calibration windows.

    Changed streams of hidden states climb through the dense model side by side, so each layer is read once for all
    changes below it. Layers are measured in groups whose streams fit in memory; each finished group is kept in `store`.

    Args:
        architecture: a copy whose modules may be replaced; it is as before when `run` returns.
        tokens: calibration windows; the first `MEASURED_TOKENS` tokens are used, fewer for large vocabularies.
        weighted: map -> its weight with the moments of both its sides. Called once per map.
        shares: ranks to measure, as shares of the full rank.
        team: every process measures its share of the changes.
        labels: which predictions count, as for `Calibration`; windows in which most do come first then. Default: all.
        weight: by what a map's squared singular values count: the share of the tokens that an expert sees.
    """

    def __init__(
        self,
        architecture: Architecture,
        tokens: torch.Tensor,
        weighted: Callable[[LinearSite], WeightedMap],
        store: Store | None = None,
        shares: Sequence[float] = MEASURED_SHARES,
        team: Team | None = None,
        weight: Callable[[LinearSite], float] = lambda site: 1.0,
        labels: torch.Tensor | None = None,
    ) -> None:
        self.team, self.weight = team or Team(), weight
        self.architecture, self.weighted, self.shares = architecture, weighted, shares
        self.store = store or Store()
        self.depth = len(architecture.layers)
        vocabulary = embedding_weight(architecture.model).shape[0]
        most = max(2, min(MEASURED_TOKENS, REFERENCE_BYTES // (4 * vocabulary)))
        length = min(tokens.shape[1], most)
        count, shortened = max(1, most // length), tokens[:, :length]
        self.counted: torch.Tensor | None = None
        if labels is not None:
            tokens, shortened, counted = _where_most_counts(
                tokens, labels, length, needed_begin_token(architecture.model)
            )
            self.counted = counted[:count].flatten()
        self.tokens = shortened[:count]
        # what is measured must not have been fitted on the same windows
        self.unused = tokens[len(self.tokens) :]
        self._bridged: list[Run] = []
        self.walk = Walk(architecture, [self.tokens])

    def run(self, sites: Sequence[LinearSite], report: Report) -> LossCurves:
        """The curves of `sites`, and the loss of every layer's removal."""
        self._bridged = fit_run_bridges(self.architecture, self.unused, self.store, lambda done, of: None, self.team)
        spans: dict[Run, tuple[int, float]] = {}
        measured_layers = layers_to_measure(sites, self.depth)
        stream = self._climb(0, 0, self.walk.entering)
        reference: list[torch.Tensor] | None = None
        points: dict[LinearSite, list[tuple[int, float]]] = {}
        removal: dict[int, float] = {}
        tails: dict[LinearSite, torch.Tensor] = {}
        for first, last in self._groups(sites, measured_layers, stream):
            entry = f"curves/{first}-{last}"
            here = [site for site in sites if first <= site.layer <= last]
            if entry not in self.store:
                if reference is None:
                    reference = list(self._logits(self._climb(first, self.depth, stream)))
                found, costs, spectra, spanned = self._group(first, last, here, measured_layers, stream, reference)
                tensors = {site.name: spectrum for site, spectrum in spectra.items()}
                note = {
                    "points": {site.name: values for site, values in found.items()},
                    "removal": {str(layer): loss for layer, loss in costs.items()},
                    "bridged": [[*run, loss] for run, loss in sorted(spanned.items())],
                }
                self.store.put(entry, tensors, note)
            kept, note = self.store.get(entry), self.store.note(entry)
            for site in here:
                tails[site] = self.weight(site) * tail_energies(kept[site.name])
            for unit in [unit for layer in range(first, last + 1) for unit in units_of(_of_layer(here, layer))]:
                if unit[0].name in note["points"]:
                    values = [(int(rank), float(loss)) for rank, loss in note["points"][unit[0].name]]
                    points |= shared_out(unit, values, tails)
            removal |= {int(layer): float(loss) for layer, loss in note["removal"].items()}
            rank = bridge_rank(self.architecture.model.config.hidden_size)
            spans |= {(int(start), int(end)): (rank, float(loss)) for start, end, loss in note["bridged"]}
            stream = self._climb(first, last + 1, stream)
            report(last + 1, self.depth)
        curves = {
            site: scaled_curve(tail, points.get(site) or _between(site, tail, points, tails, self.shares)).cpu()
            for site, tail in tails.items()
        }
        return LossCurves(curves, removal, spans)

    # -- one group of layers ----------------------------------------------------------------------------------------

    def _groups(
        self, sites: Sequence[LinearSite], measured: set[int], stream: list[torch.Tensor]
    ) -> list[tuple[int, int]]:
        """(first, last) layers of groups whose changed streams take at most `STREAM_BYTES`."""
        one = sum(hidden.numel() * hidden.element_size() for hidden in stream)
        groups: list[tuple[int, int]] = []
        used = 0
        for layer in range(self.depth):
            streams = 1 + len(LENGTHS) + len(self.shares) * len(units_of(_of_layer(sites, layer))) * (layer in measured)
            if not groups or used + streams * one > STREAM_BYTES:
                groups.append((layer, layer))
                used = 0
            groups[-1] = (groups[-1][0], layer)
            used += streams * one
        return groups

    @torch.no_grad()
    def _group(
        self,
        first: int,
        last: int,
        sites: Sequence[LinearSite],
        measured: set[int],
        stream: list[torch.Tensor],
        reference: list[torch.Tensor],
    ) -> tuple[
        dict[LinearSite, list[tuple[int, float]]], dict[int, float], dict[LinearSite, torch.Tensor], dict[Run, float]
    ]:
        """Measured points, losses of removal and spectra of the layers first .. last, into which `stream` enters; and
        losses of the bridged runs that begin there."""
        changes: list[_Change] = []
        waiting: list[_Change] = []
        runs = [run for number, run in enumerate(self._bridged) if first <= run[0] <= last and self.team.deals(number)]
        spectra: dict[LinearSite, torch.Tensor] = {}
        for layer in range(first, self.depth):
            module = self.architecture.layers[layer]
            changes = [self._higher(change, module, layer) for change in changes]
            if layer <= last:
                # a bridge gives what leaves its run: it climbs on from there
                for run in [run for run in runs if run[0] == layer]:
                    waiting.append(_Change(run, layer, 0, [bridged(self.store, run, hidden) for hidden in stream]))
                here = units_of(_of_layer(sites, layer))
                for number, unit in enumerate(here):
                    if self.team.deals(number):
                        made, found = self._changed(unit, stream, layer in measured)
                        changes += made
                        spectra |= found
                if self.team.deals(len(here)):
                    changes.append(_Change(None, layer, 0, stream))
                stream = [self.walk.run(module, layer, batch, hidden) for batch, hidden in enumerate(stream)]
            changes += [change for change in waiting if change.site is not None and change.site[1] == layer]
            self.walk.let_go(module)
        points: dict[LinearSite, list[tuple[int, float]]] = {}
        removal: dict[int, float] = {}
        spanned: dict[Run, float] = {}
        for change in changes:
            loss = self._divergence(reference, change.hidden)
            if change.site is None:
                removal[change.layer] = loss
            elif isinstance(change.site[0], LinearSite):
                points.setdefault(change.site[0], []).append((change.rank, loss))
            else:
                spanned[change.site] = loss
        for other_points, other_removal, other_spectra, other_spanned in self.team.gather(
            (points, removal, {site: sigma.cpu() for site, sigma in spectra.items()}, spanned)
        ):
            points |= other_points
            removal |= other_removal
            spectra |= other_spectra
            spanned |= other_spanned
        return points, removal, spectra, spanned

    def _higher(self, change: _Change, module: nn.Module, layer: int) -> _Change:
        hidden = [self.walk.run(module, layer, batch, h) for batch, h in enumerate(change.hidden)]
        return _Change(change.site, change.layer, change.rank, hidden)

    def _changed(
        self, unit: Unit, stream: list[torch.Tensor], measure: bool
    ) -> tuple[list[_Change], dict[LinearSite, torch.Tensor]]:
        """What leaves the maps' layer when they are factorised, at every rank to measure; and their spectra."""
        dense = {site: self.architecture.module(site) for site in unit}
        layer, full = unit[0].layer, min(linear_shape(dense[unit[0]]))
        ranks = ranks_to_measure(full, self.shares) if measure else []
        parts: dict[LinearSite, Decomposition] = {}
        spectra: dict[LinearSite, torch.Tensor] = {}
        for site in unit:
            weighted = self.weighted(site)
            if ranks:
                parts[site], spectra[site] = weighted.svd_and_spectrum(ranks[-1])
            else:
                spectra[site] = weighted.spectrum()
            del weighted  # before the next one is made: of a wide map its roots are among the largest things here
            release()
        changes = []
        for rank in ranks:
            try:
                for site in unit:
                    directions = torch.arange(rank, device=parts[site].sigma.device)
                    put_factors(self.architecture, site, *parts[site].factors(directions))
                module = self.architecture.layers[layer]
                hidden = [self.walk.run(module, layer, batch, h) for batch, h in enumerate(stream)]
            finally:
                for site in unit:
                    self.architecture.replace(site, dense[site])
            changes.append(_Change(unit, layer, rank, hidden))
        return changes, spectra

    def _climb(self, start: int, end: int, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        """The dense stream that enters layer `end`, from the one that enters `start`."""
        for layer in range(start, end):
            stream = self.walk.through(layer, stream)
        return stream

    @torch.no_grad()
    def _logits(self, stream: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Logits [positions, vocabulary] of a stream that leaves the last layer, a piece of the positions at a time."""
        for batch, hidden in enumerate(stream):
            run = partial(self.walk.output, batch, hidden)
            found = Predictions(self.architecture.model, self.walk.batches[batch], run, last=True)
            yield from map(found.logits, found.pieces)

    @torch.no_grad()
    def _divergence(self, reference: Sequence[torch.Tensor], stream: Sequence[torch.Tensor]) -> float:
        """Mean KL(dense || changed) per token; `reference`: dense logits, `stream` leaves the changed model."""
        pairs = zip(reference, self._logits(stream), strict=True)
        if self.counted is None:
            return sum(float(kl_per_token(truth, ours).double().sum()) for truth, ours in pairs) / self.tokens.numel()
        found = torch.cat([kl_per_token(truth, ours) for truth, ours in pairs])
        return float(found[self.counted.to(found.device)].double().mean())


def _where_most_counts(
    tokens: torch.Tensor, labels: torch.Tensor, length: int, begin: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The windows in another order: those first in whose best `length` tokens most predictions count.

    Windows that are held out from the fits stay behind the others. A model that needs its begin-of-text token (`begin`)
    has it before each part.

    Returns:
        (all windows [samples, seq_len], of each its best part [samples, length], which positions of that count).
    """
    positions = counted_positions(labels)
    fitted = len(tokens) - held_out_count(len(tokens))
    sums = functional.pad(positions.cumsum(dim=1), (1, 0))
    found = sums[:, length:] - sums[:, :-length]  # in the `length` tokens from each place on
    most, starts = found.max(dim=1)
    order = most[:fitted].argsort(descending=True, stable=True)
    order = torch.cat([order, torch.arange(fitted, len(tokens))])
    places = starts[order, None] + torch.arange(length)
    parts, counted = tokens[order].gather(1, places), positions[order].gather(1, places)
    if begin is not None:
        parts[:, 0] = begin
    return tokens[order], parts, counted


def _of_layer(sites: Sequence[LinearSite], layer: int) -> list[LinearSite]:
    return [site for site in sites if site.layer == layer]


def shared_out(
    unit: Unit, points: Sequence[tuple[int, float]], tails: Mapping[LinearSite, torch.Tensor]
) -> dict[LinearSite, list[tuple[int, float]]]:
    """Measured losses of a unit as losses of its maps, each in proportion to what the metric predicts for it."""
    found: dict[LinearSite, list[tuple[int, float]]] = {site: [] for site in unit}
    for rank, loss in points:
        whole = sum(float(tails[site][rank]) for site in unit)
        for site in unit:
            share = float(tails[site][rank]) / whole if whole > 0 else 1 / len(unit)
            found[site].append((rank, loss * share))
    return found


def ranks_to_measure(full: int, shares: Sequence[float]) -> list[int]:
    """Ranks at those shares of the full rank, below it, ascending."""
    return sorted({max(1, min(full - 1, round(share * full))) for share in shares}) if full > 1 else []


def layers_to_measure(sites: Sequence[LinearSite], depth: int) -> set[int]:
    """Evenly spaced layers, at most `MEASURED_LAYERS`, and for each map's path at least one layer that has it."""
    count = min(depth, MEASURED_LAYERS)
    chosen = {round(number * (depth - 1) / max(1, count - 1)) for number in range(count)}
    for path in dict.fromkeys(site.path for site in sites):
        layers = [site.layer for site in sites if site.path == path]
        if not chosen & set(layers):
            chosen.add(layers[len(layers) // 2])
    return chosen


def _between(
    site: LinearSite,
    tail: torch.Tensor,
    points: Mapping[LinearSite, list[tuple[int, float]]],
    tails: Mapping[LinearSite, torch.Tensor],
    shares: Sequence[float],
) -> list[tuple[int, float]]:
    """Points for a map that was not measured: the logarithm of measured over predicted loss is taken as linear in
    depth between the nearest layers whose map of the same path was measured."""
    found = []
    for number, rank in enumerate(ranks_to_measure(len(tail) - 1, shares)):
        known = sorted(
            (other.layer, max(values[number][1], 1e-12) / float(tails[other][values[number][0]]))
            for other, values in points.items()
            if other.path == site.path and number < len(values) and float(tails[other][values[number][0]]) > 0
        )
        below = [entry for entry in known if entry[0] <= site.layer] or known[:1]
        above = [entry for entry in known if entry[0] >= site.layer] or known[-1:]
        if not known:
            continue
        (low, at_low), (high, at_high) = below[-1], above[0]
        share = (site.layer - low) / (high - low) if high > low else 0.0
        factor = math.exp((1 - share) * math.log(at_low) + share * math.log(at_high))
        found.append((rank, factor * float(tail[rank])))
    return found


@torch.no_grad()
def divergence_between(
    dense: PreTrainedModel, other: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor | None = None
) -> float:
    """Mean KL(dense || other) of the next token over windows [samples, seq_len], nats per token.

    `labels` as for `Calibration`: which predictions count; default: all.
    """
    total, weight = 0.0, 0
    device = embedding_weight(dense).device
    counted = None if labels is None else counted_positions(labels)
    for number, window in enumerate(tokens.split(1)):
        batch = window.to(device)
        truth = dense(input_ids=batch, use_cache=False).logits
        ours = other(input_ids=batch, use_cache=False).logits
        mean, share = mean_of_counted(kl_per_token(truth, ours), None if counted is None else counted[number])
        total, weight = total + mean * share, weight + share
    return total / max(1, weight)
