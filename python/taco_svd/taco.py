"""Taco mode: what the whole-model analysis finds, and how it is turned into a compressed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .architectures import Architecture, LinearSite, dense_weight
from .budget import runs
from .calibration import Calibration, embedding_weight
from .decomposition import WeightedMap, damped
from .experts import expert_number, kind_of
from .layerwise import LayerwisePass
from .loss_curves import CurveMeasurement, LossCurves
from .mapped import is_mapped
from .memory import host_room, release
from .methods import METHODS
from .model_size import weight_bytes
from .module_tree import structural_copy
from .plan import Plan
from .progress import Progress
from .sequential import UpwardPass
from .statistics import SecondMoments
from .store import Store
from .team import Team

# Shrinkage of the second moments in taco mode: on classics-16l's validation text 0.1 / 0.01 was the best of
# {0, 0.01, 0.1} x {0.01, 0.1, 0.3}, within 0.1 perplexity of each other.
INPUT_DAMPING = 0.1
GRADIENT_DAMPING = 0.01
# Output gradients for bridges: one matrix of the hidden size, fewer effective samples.
BRIDGE_GRADIENT_DAMPING = 0.1


# Moments and hidden states that an analysis without a work directory may hold in memory, and finished layers as much
# again, as a share of the model's bytes and at least; what is more goes to a temporary directory. Of a model on a GPU
# the machine's memory is not what is scarce.
MEMORY_SHARE = 0.015
LEAST_MEMORY = 32 << 20


# Of the average expert's tokens, how many every expert is taken to have seen beside those that it was sent.
PRIOR_SHARE = 0.1


def memory_for(model: PreTrainedModel, processes: int = 1) -> int:
    """Bytes that a store without a directory may hold, where as many processes of the machine have one."""
    if embedding_weight(model).device.type == "cuda":
        return max(LEAST_MEMORY, host_room(processes))
    return max(LEAST_MEMORY, int(MEMORY_SHARE * weight_bytes(model)))


class Analysis:
    """Statistics of a dense model, gathered once however often they are needed: second moments and loss curves.

    Args:
        store: keeps what is finished; by default in memory and in a temporary directory.
        team: splits the windows and the maps between processes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        store: Store | None = None,
        team: Team | None = None,
    ) -> None:
        self.team = team or Team()
        self.model, self.calibration = model, calibration
        self.architecture = Architecture(structural_copy(model))
        self.store = store or Store(memory=memory_for(model, self.team.size))
        self._last: tuple[int, SecondMoments] | None = None
        self._curves: LossCurves | None = None

    def prepare(self, sites: list[LinearSite], progress: Progress) -> None:
        """Gathers the statistics of these maps, where they are not there yet: one forward and one backward pass."""
        missing = [site for site in sites if not self._has(site)]
        if not missing:
            return
        layers = {site.layer for site in missing}
        # whole layers: what else is wanted of them later comes without another pass
        wanted = [site for site in self.architecture.sites() if site.layer in layers]
        gathered: dict[int, SecondMoments] = {}

        def collect(site: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
            gathered.setdefault(site.layer, SecondMoments())(site, x, gradient)

        def finished(layer: int) -> None:
            moments = gathered.pop(layer, None)
            if moments is not None:
                moments.finish()
                moments.sum_over(self.team)
                self.store.put(f"moments/{layer}", *moments.state())
                release()

        tokens = self.calibration.tokens
        passes = LayerwisePass(
            self.architecture, self.team.windows(tokens), self.store, "statistics", samples=len(tokens)
        )
        with progress.step("activation and gradient statistics, layer by layer") as report:
            passes.backward(wanted, collect, finished=finished, report=report)

    def _has(self, site: LinearSite) -> bool:
        entry = f"moments/{site.layer}"
        return entry in self.store and site.name in self.store.note(entry)["owners"]

    def _moments_of(self, site: LinearSite) -> SecondMoments:
        if self._last is None or self._last[0] != site.layer:
            entry = f"moments/{site.layer}"
            note = self.store.note(entry)
            sites = [other for other in self.architecture.sites([site.layer]) if other.name in note["owners"]]
            moments = SecondMoments.of_state(sites, self.store.get(entry), note)
            self._last = (site.layer, moments)
        return self._last[1]

    def let_go(self) -> None:
        """Unmaps a layer's moments: what has been read of them counts as this process's memory until then."""
        self._last = None

    def gradients(self, site: LinearSite, options: Mapping[str, Any]) -> torch.Tensor | None:
        """Damped E[g g^T] of a map, [out, out]; None where no gradient reaches its output."""
        moment = self._moment(site, SecondMoments.gradients)
        if not float(moment.diagonal().sum()) > 0:
            return None
        return damped(moment, float(options.get("gradient_damping", GRADIENT_DAMPING)), own=True)

    def _inputs(self, site: LinearSite, options: Mapping[str, Any]) -> torch.Tensor:
        moment = self._moment(site, SecondMoments.inputs)
        return damped(moment, float(options.get("input_damping", INPUT_DAMPING)), own=True)

    def _moment(self, site: LinearSite, of: Callable[..., torch.Tensor]) -> torch.Tensor:
        """A new tensor on the map's device; an expert that saw no token gets the others' average size.

        of: `SecondMoments.inputs` or `SecondMoments.gradients`.
        """
        moments = self._moments_of(site)
        device = dense_weight(self.architecture.module(site)).device
        moment = of(moments, site, device)
        if not moments.tokens(site):
            others = [other for other in self._experts(site) if moments.tokens(other)]
            mean = sum(float(of(moments, other, device).diagonal().mean()) for other in others) / max(1, len(others))
            moment.diagonal().fill_(mean)
        return moment

    def _experts(self, site: LinearSite) -> list[LinearSite]:
        """The same map of all the layer's experts; empty where the site is no expert's."""
        if expert_number(site.path) is None:
            return []
        kind = kind_of(site.path)
        return [other for other in self.architecture.sites([site.layer]) if kind_of(other.path) == kind]

    def _weight(self, site: LinearSite) -> float:
        """The share of the tokens that a map sees: all of them, or those that are sent to its expert."""
        experts = self._experts(site)
        if not experts:
            return 1.0
        moments = self._moments_of(site)
        counts = [moments.tokens(other) for other in experts]
        # other texts will use what this one leaves idle
        prior = PRIOR_SHARE * sum(counts) / len(counts)
        return (moments.tokens(site) + prior) / (sum(counts) + prior * len(counts))

    def curves(self, options: Mapping[str, Any], progress: Progress) -> LossCurves:
        """Loss over rank of every map, and of every layer's removal."""
        if self._curves is None:
            sites = self.architecture.sites()
            self.prepare(sites, progress)

            def weighted(site: LinearSite) -> WeightedMap:
                weight = dense_weight(self.architecture.module(site)).detach()
                moments = self._inputs(site, options), self.gradients(site, options)
                self.let_go()
                return WeightedMap(weight, *moments, own=True)

            measurement = CurveMeasurement(
                self.architecture,
                self.calibration.tokens,
                weighted,
                self.store,
                team=self.team,
                weight=self._weight,
            )
            with progress.step("loss over rank, map by map") as report:
                self._curves = measurement.run(sites, report)
            release()
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

    Returns what the plan's result should say of it: `consistency`, `drift`, `measured_loss`.
    """
    structure = plan.structure
    analysis = analysis or Analysis(model, calibration)
    sites = [site for site in working.sites() if site.path in structure.low_rank.get(site.layer, {})]
    if sites:
        analysis.prepare(sites, progress)

    def gradients(site: LinearSite) -> torch.Tensor | None:
        found = analysis.gradients(site, plan.options)
        analysis.let_go()
        return found

    # Where all layers change, the result is almost as large as the model: what is finished need not stay in memory.
    store: Store | None = analysis.store
    if not analysis.store.lasting:
        on_cpu = next(model.parameters()).device.type == "cpu"
        store = Store(memory=memory_for(model)) if on_cpu else None
    upwards = UpwardPass(
        Architecture(model),
        working,
        structure,
        calibration.tokens,
        gradients,
        _bridge_gradients(model, plan, calibration, progress, analysis),
        float(plan.options.get("input_damping", INPUT_DAMPING)),
        bool(plan.options.get("consistency", True)),
        store,
        analysis.team,
    )
    with progress.step("building, layer by layer") as report:
        upwards.run(report)
    if store is not None and not store.lasting:
        store.delete()  # files that are mapped stay until their last tensor is gone
    record: dict[str, Any] = {"consistency": upwards.records, "drift": upwards.drift}
    # running both models again would read each once per window
    if is_mapped(model) or upwards.mapped or analysis.team.size > 1:
        record["measured_loss"] = upwards.held_out_loss()
    return record


def _bridge_gradients(
    model: PreTrainedModel, plan: Plan, calibration: Calibration, progress: Progress, analysis: Analysis
) -> dict[int, torch.Tensor]:
    """Damped second moments of dL/dh where each bridged run ends, by the run's last layer."""
    places = {bridge.after for bridge in plan.structure.bridges}
    ends = [last for first, last in runs(list(plan.structure.removed)) if first - 1 in places]
    if not ends:
        return {}
    found: dict[int, torch.Tensor] = {}
    store, team = analysis.store, analysis.team

    def collect(layer: int, gradient: torch.Tensor) -> None:
        if layer in ends:
            rows = gradient.flatten(0, -2).float()
            found[layer] = found.get(layer, torch.zeros((), device=rows.device)) + rows.T @ rows

    def finished(layer: int) -> None:
        if layer in ends:
            store.put(f"bridge-gradients/{layer}", {"moment": team.sum_(found[layer])})

    if not all([f"bridge-gradients/{layer}" in store for layer in ends]):  # noqa: C419 - every process asks for all
        tokens = calibration.tokens
        passes = LayerwisePass(
            Architecture(model), team.windows(tokens), store, "bridge-gradients", samples=len(tokens)
        )
        with progress.step("gradients at the bridges, layer by layer") as report:
            passes.backward([], lambda site, x, gradient: None, min(ends), collect, finished, report)
    # in taco mode the option is that of the factorised maps
    own = plan.options.get("gradient_damping", BRIDGE_GRADIENT_DAMPING)
    damping = float(own) if METHODS[plan.method].bridges else BRIDGE_GRADIENT_DAMPING
    device = next(model.parameters()).device
    return {layer: damped(store.get(f"bridge-gradients/{layer}")["moment"].to(device), damping) for layer in ends}
