"""Taco mode: what the whole-model analysis finds, and how it is turned into a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .allocation import runs
from .architectures import Architecture, LinearSite, dense_weight
from .calibration import Calibration
from .decomposition import Decomposition, damped, weighted_svd
from .loss_curves import LossCurves, measure_curves
from .memory import release
from .plan import Plan
from .progress import Progress, Report
from .replacement import structural_copy
from .sequential import UpwardPass
from .statistics import SecondMoments, groups_within_memory
from .suffix import SuffixRunner

# Shrinkage of the second moments in taco mode: on classics-16l's validation text 0.1 / 0.01 was the best of
# {0, 0.01, 0.1} x {0.01, 0.1, 0.3}, within 0.1 perplexity of each other.
INPUT_DAMPING = 0.1
GRADIENT_DAMPING = 0.01
# Output gradients for bridges: one matrix of the hidden size, fewer effective samples.
BRIDGE_GRADIENT_DAMPING = 0.1


class Analysis:
    """Statistics of a dense model, gathered once however often they are needed: second moments and loss curves."""

    def __init__(self, model: PreTrainedModel, calibration: Calibration) -> None:
        self.model, self.calibration = model, calibration
        self.architecture = Architecture(structural_copy(model))
        self._groups: list[list[LinearSite]] = []
        self._moments: SecondMoments | None = None
        self._held: set[LinearSite] = set()
        self._curves: LossCurves | None = None

    def prepare(self, sites: list[LinearSite], progress: Progress) -> None:
        """Says which maps' statistics will be asked for, in the order of their layers.

        Where memory holds them all they are gathered now, in one backward pass; else group by group, when the first
        map of each is asked for.
        """
        if self._held >= set(sites):
            return
        self._groups = groups_within_memory(self.architecture, sites)
        if len(self._groups) == 1:
            with progress.step("activation and gradient statistics") as report:
                self._gather(self._groups[0], report)

    def _gather(self, sites: list[LinearSite], report: Report | None = None) -> None:
        self._moments, self._held = None, set()  # what was held is let go before the next group is gathered
        moments = SecondMoments()
        runner = SuffixRunner(self.architecture, self.calibration.tokens, min(site.layer for site in sites))
        runner.backward(sites, moments, report)
        moments.finish()
        release()
        self._moments, self._held = moments, set(sites)

    def _moments_of(self, site: LinearSite) -> SecondMoments:
        if site not in self._held:
            self._gather(next(group for group in self._groups if site in group))
        assert self._moments is not None
        return self._moments

    def gradients(self, site: LinearSite, options: Mapping[str, Any]) -> torch.Tensor | None:
        """Damped E[g g^T] of a map, [out, out]; None where no gradient reaches its output."""
        moment = self._moments_of(site).gradients(site)
        if not float(moment.diagonal().sum()) > 0:
            return None
        return damped(moment, float(options.get("gradient_damping", GRADIENT_DAMPING)))

    def curves(self, options: Mapping[str, Any], progress: Progress) -> LossCurves:
        """Loss over rank of every map, and of every layer's removal."""
        if self._curves is None:
            sites = self.architecture.sites()
            self.prepare(sites, progress)
            input_damping = float(options.get("input_damping", INPUT_DAMPING))

            def decompose(site: LinearSite) -> Decomposition:
                weight = dense_weight(self.architecture.module(site)).detach()
                inputs = damped(self._moments_of(site).inputs(site), input_damping)
                return weighted_svd(weight, inputs, self.gradients(site, options))

            with progress.step("loss over rank, map by map") as report:
                self._curves = measure_curves(self.architecture, self.calibration.tokens, sites, decompose, report)
        return self._curves


def build_upwards(
    model: PreTrainedModel,
    working: Architecture,
    plan: Plan,
    calibration: Calibration,
    progress: Progress,
    analysis: Analysis | None = None,
) -> dict[str, Any]:
    """Carries out a plan of method "taco" or "bridge" on `working`, a structural copy of `model`.

    Returns what the plan's result should say of it: `consistency`, `drift`.
    """
    structure = plan.structure
    analysis = analysis or Analysis(model, calibration)
    sites = [site for site in working.sites() if site.path in structure.low_rank.get(site.layer, {})]
    if sites:
        analysis.prepare(sites, progress)
    upwards = UpwardPass(
        Architecture(model),
        working,
        structure,
        calibration.tokens,
        lambda site: analysis.gradients(site, plan.options),
        _bridge_gradients(model, plan, calibration, progress),
        float(plan.options.get("input_damping", INPUT_DAMPING)),
        bool(plan.options.get("consistency", True)),
    )
    with progress.step("building, layer by layer") as report:
        upwards.run(report)
    return {"consistency": upwards.records, "drift": upwards.drift}


def _bridge_gradients(
    model: PreTrainedModel, plan: Plan, calibration: Calibration, progress: Progress
) -> dict[int, torch.Tensor]:
    """Damped second moments of dL/dh where each bridged run ends, by the run's last layer."""
    places = {bridge.after for bridge in plan.structure.bridges}
    ends = [last for first, last in runs(list(plan.structure.removed)) if first - 1 in places]
    if not ends:
        return {}
    found: dict[int, torch.Tensor] = {}

    def collect(layer: int, _: torch.Tensor, gradient: torch.Tensor) -> None:
        rows = gradient.flatten(0, -2).float()
        found[layer] = found.get(layer, torch.zeros((), device=rows.device)) + rows.T @ rows

    runner = SuffixRunner(Architecture(model), calibration.tokens, min(ends))
    with progress.step("gradients at the bridges") as report:
        runner.backward([], lambda site, x, gradient: None, report, collect, ends)
    damping = float(plan.options.get("gradient_damping", BRIDGE_GRADIENT_DAMPING))
    return {layer: damped(moment, damping) for layer, moment in found.items()}
