"""Builds a compressed model from the bottom up: every replacement sees what the compressed model really feeds it.

Two streams of hidden states walk up side by side, the dense model's and the compressed one's. In each layer that
stays, maps that read the stream are factorised on the inputs they will get; maps that write to it are first re-fitted
so that the stream comes back to the dense model's (`consistency`), then factorised; a bridge is fitted where layers
were taken out. Windows that no fit sees decide whether a re-fit is kept, and tell how far the streams have drifted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .architectures import Architecture, LinearSite, dense_weight
from .bridging import BridgeMoments, fit_bridge
from .built import own_tensors, restore_layer, save_layer, with_own_parameters
from .calibration import held_out_count
from .consistency import FitMoments, HeldOutMoments, refit
from .decomposition import Decomposition, WeightedMap, damped
from .divergence import kl_per_token, mean_of_counted
from .errors import DiskFullError
from .experts import MAPS, expert_number
from .loss import counted_positions
from .mapped import page_out_tensor
from .memory import release
from .progress import Report
from .replacement import LowRankBridge, attach_bridge
from .statistics import same_inputs
from .store import Store
from .structure import BridgeSpec, Structure
from .surgery import empty_factors, put_factors
from .team import Team
from .walk import Walk, residual_writers, watching


def split_held_out(
    tokens: torch.Tensor, batch_tokens: int = 4096, team: Team | None = None
) -> tuple[list[torch.Tensor], int]:
    """(batches, how many of them, from the end, are held out) of calibration windows [samples, seq_len].

    A single window cannot be split: then nothing is held out. Of both kinds a `team`'s process gets its share.
    """
    team = team or Team()
    rows = max(1, batch_tokens // tokens.shape[1])
    kept_back = held_out_windows(tokens)
    fit = list(team.windows(tokens[: len(tokens) - len(kept_back)]).split(rows))
    last = list(team.windows(kept_back).split(rows)) if len(kept_back) else []
    return fit + last, len(last)


def held_out_windows(tokens: torch.Tensor) -> torch.Tensor:
    """The calibration windows that no re-fit sees: the last ones, [held, seq_len]."""
    return tokens[len(tokens) - held_out_count(len(tokens)) :]


class UpwardPass:
    """One walk up a model that turns a structural copy of it into the compressed model, in place.

    Args:
        dense: the model as it is.
        working: a structural copy of it, whose modules are replaced.
        structure: what to build.
        tokens: calibration windows, int64 [samples, seq_len].
        gradients: gives a factorised map's damped second moments of the output gradients, [out, out]; where it
            gives None the map is weighted by its inputs only. Asked once per map, in the order of the layers.
        bridge_gradients: damped second moments of dL/dh leaving each run's last layer, by that layer.
        input_damping: shrinkage of the inputs' second moments.
        labels: which predictions count where the loss is measured, as for `Calibration`; default: all. The re-fits are
            to hidden states, of all tokens.
        with_refit: whether maps that stay, and those that are factorised, are re-fitted (`consistency`).
        store: keeps every finished layer; those that it has are taken from there. What it does not hold in memory the
            built model maps from its files.
        team: every process fits on its share of the windows and decomposes its share of the maps.
    """

    def __init__(
        self,
        dense: Architecture,
        working: Architecture,
        structure: Structure,
        tokens: torch.Tensor,
        gradients: Callable[[LinearSite], torch.Tensor | None],
        bridge_gradients: Mapping[int, torch.Tensor],
        input_damping: float,
        with_refit: bool = True,
        store: Store | None = None,
        team: Team | None = None,
        labels: torch.Tensor | None = None,
    ) -> None:
        self.team = team or Team()
        self.dense, self.working, self.structure = dense, working, structure
        self.gradients, self.bridge_gradients = gradients, bridge_gradients
        self.input_damping = input_damping
        batches, held = split_held_out(tokens, team=self.team)
        self.walk = Walk(dense, batches)
        self.fit_batches = range(len(batches) - held)
        self.held_batches = range(len(batches) - held, len(batches))
        # of every held-out window that is this process's, which positions count
        shared = None if labels is None else self.team.windows(held_out_windows(labels))
        self.counted = None if shared is None else counted_positions(shared)
        self.with_refit = with_refit and held > 0
        self.bridges: dict[int, BridgeSpec] = {bridge.after: bridge for bridge in structure.bridges}
        self.records: list[dict[str, Any]] = []
        self.drift: list[dict[str, Any]] = []
        self.store = store
        # whether layers of the built model are mapped from files
        self.mapped = False
        # the streams that leave the last layer, once `run` has returned
        self.final: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def run(self, report: Report) -> None:
        """Builds everything; `records` and `drift` then tell what each re-fit did and how far the streams differ."""
        depth = self.structure.source_layers
        lowest = self._lowest_change()
        writers = residual_writers(self.dense, self.walk, lowest) if self.with_refit else None
        truth = list(self.walk.entering)  # the dense stream
        ours = list(truth)
        for layer in range(depth):
            if layer in self.structure.removed:
                # below the first layer that stays nothing of ours has been changed, and nothing can make up for it
                truth = self.walk.through(layer, truth)
            elif layer < lowest:
                truth = self.walk.through(layer, truth)
                ours = truth
            else:
                truth, ours = self._finished_layer(layer, truth, ours, writers)
                release()
            report(layer + 1, depth)
        self.final = truth, ours

    def _finished_layer(
        self, layer: int, truth: list[torch.Tensor], ours: list[torch.Tensor], writers: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """As `_layer`, unless the store has the layer; what is made is kept there, and its memory with it."""
        entry = f"built/{layer}"
        if self.store is None:
            return self._layer(layer, truth, ours, writers)
        if entry in self.store:
            note = restore_layer(self.store, entry, self.working, self.structure, layer)
            self.records += note["records"]
            self.drift += note["drift"]
            truth, ours = self.walk.through(layer, truth), self.walk.through(layer, ours, self.working)
            self._let_go(entry, layer)
            return truth, ours
        records, drift = len(self.records), len(self.drift)
        truth, ours = self._layer(layer, truth, ours, writers)
        note = {"records": self.records[records:], "drift": self.drift[drift:]}
        try:
            save_layer(self.store, entry, self.dense.layers[layer], self.working.layers[layer], note)
        except DiskFullError:
            if self.store.lasting:
                raise
            self.store = None  # it would have saved memory, no more
            return truth, ours
        restore_layer(self.store, entry, self.working, self.structure, layer)
        self._let_go(entry, layer)
        return truth, ours

    def _let_go(self, entry: str, layer: int) -> None:
        """Gives the pages of a finished layer back, if it is mapped; what it shares, `walk` has let go."""
        assert self.store is not None
        if not self.store.in_memory(entry):
            self.mapped = True
            for tensor in own_tensors(self.dense.layers[layer], self.working.layers[layer]).values():
                page_out_tensor(tensor)

    def _lowest_change(self) -> int:
        """The lowest layer that differs from the dense model's: factorised, or the last before a removed one."""
        changed = [layer for layer in self.structure.low_rank if self.structure.low_rank[layer]]
        changed += [max(layer - 1, 0) for layer in self.structure.removed]
        return min(changed, default=self.structure.source_layers)

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """Mean KL(dense || compressed) of the next token over the held-out windows; None where there are none."""
        truth, ours = self.final
        total, weight, number = 0.0, 0, 0
        for batch in self.held_batches:
            for window in range(len(truth[batch])):
                part = slice(window, window + 1)
                dense, compressed = (self.walk.logits(batch, stream[batch], part) for stream in (truth, ours))
                counted = None if self.counted is None else self.counted[number]
                mean, share = mean_of_counted(kl_per_token(dense, compressed), counted)
                total, weight, number = total + mean * share, weight + share, number + 1
        total, weight = self.team.sum(total), round(self.team.sum(weight))
        return total / weight if weight else None

    # -- one layer ---------------------------------------------------------------------------------------------

    def _layer(
        self, layer: int, truth: list[torch.Tensor], ours: list[torch.Tensor], writers: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Replaces and re-fits one layer that stays; returns both streams as they leave it (and its run's end)."""
        attention = _at(writers.attention, layer) if writers else None
        mlp = _at(writers.mlp, layer) if writers else None
        added = _at(writers.added, layer) if writers else None
        middle: list[torch.Tensor] = []
        leaving: list[torch.Tensor] = []
        for batch, hidden in enumerate(truth):
            out, written = self._run_watching(self.dense, layer, batch, hidden, [added] if added else [])
            leaving.append(out)
            if added is not None:
                middle.append(out - written[added][1].view_as(out))  # some models flatten batch and tokens inside
        leaves_layer, run_end = leaving, layer
        while run_end + 1 in self.structure.removed:
            run_end += 1
            leaving = self.walk.through(run_end, leaving)

        for block, writer in (("attention", attention), ("mlp", mlp)):
            sites = [site for site in self.working.sites([layer], block) if site != writer]
            # an expert's second map on what its first, already factorised, gives it
            last = [site for site in sites if expert_number(site.path) is not None and site.path.endswith(MAPS[-1])]
            self._factorise([site for site in sites if site not in last], ours)
            self._factorise(last, ours)
            if writer is not None:
                self._refit(writer, added, ours, middle if block == "attention" else leaving)
        spec = self.bridges.get(layer)
        ours = self.walk.through(layer, ours, self.working)
        if spec is not None:
            self._bridge(layer, run_end, spec, ours, leaving)
            bridge: Any = self.working.layers[layer].bridge
            with torch.no_grad():
                ours = [bridge(hidden) for hidden in ours]
        self._note_drift(run_end, leaving, ours)
        return leaves_layer, ours  # run() walks the dense stream through what was taken out after this layer

    def _run_watching(
        self, architecture: Architecture, layer: int, batch: int, hidden: torch.Tensor, sites: list[LinearSite]
    ) -> tuple[torch.Tensor, dict[LinearSite, tuple[torch.Tensor, torch.Tensor]]]:
        seen: dict[LinearSite, tuple[torch.Tensor, torch.Tensor]] = {}
        with ExitStack() as stack:
            for site in sites:

                def watch(inputs: torch.Tensor, output: torch.Tensor, site: LinearSite = site) -> None:
                    seen[site] = (inputs, output)

                stack.enter_context(watching(architecture.module(site), watch))
            out = self.walk.run(architecture.layers[layer], layer, batch, hidden)
        return out, seen

    def _rank(self, site: LinearSite) -> int | None:
        return self.structure.low_rank.get(site.layer, {}).get(site.path)

    def _factorise(self, sites: list[LinearSite], ours: list[torch.Tensor]) -> None:
        """Factorises maps on the inputs that they get now; maps that read the same tensor share its moments."""
        sites = [site for site in sites if self._rank(site) is not None]
        if not sites:
            return
        moments: dict[LinearSite, FitMoments] = {}
        owner: dict[LinearSite, LinearSite] = {}
        for batch in self.fit_batches:
            _, seen = self._run_watching(self.working, sites[0].layer, batch, ours[batch], sites)
            for site in sites:
                inputs = seen[site][0]
                if site not in owner:
                    same = [other for other in moments if same_inputs(seen[other][0], inputs)]
                    owner[site] = same[0] if same else site
                    if not same:
                        moments[site] = FitMoments()
                if owner[site] == site:
                    moments[site].add(inputs, inputs[..., :0])
        for shared in moments.values():
            shared.sum_over(self.team)
        for number, site in enumerate(sites):
            if self.team.deals(number):
                self._truncate(site, dense_weight(self.working.module(site)), moments[owner[site]].second_moment())
        for number, site in enumerate(sites):
            self._hand_over(site, number % self.team.size)

    def _hand_over(self, site: LinearSite, owner: int) -> None:
        """Gives the factors that one process has put in a map's place to the others."""
        if self.team.size == 1:
            return
        module = self.working.module(site)
        if self.team.rank != owner:
            rank = self._rank(site)
            assert rank is not None
            device = dense_weight(self.dense.module(site)).device
            pivoted = self.structure.is_pivoted(site.layer, site.path)
            module = empty_factors(module, rank, pivoted).to_empty(device=device)
            self.working.replace(site, module)
        for tensor in [*module.parameters(), *module.buffers()]:
            self.team.broadcast_(tensor.detach(), owner)

    def _truncate(self, site: LinearSite, weight: torch.Tensor, inputs: torch.Tensor) -> None:
        """Puts factors of `weight` [out, in] in a map's place; its `inputs`' second moments are overwritten."""
        rank = self._rank(site)
        assert rank is not None
        release()
        inputs = damped(inputs, self.input_damping, own=True)
        weighted = WeightedMap(weight.detach(), inputs, self.gradients(site), own=True)
        del inputs  # its root, in the same memory, goes with `weighted`
        parts: Decomposition = weighted.svd(rank)
        del weighted
        directions = torch.arange(rank, device=parts.sigma.device)
        pivoted = self.structure.is_pivoted(site.layer, site.path)
        put_factors(self.working, site, *parts.factors(directions), pivoted)

    def _refit(
        self, writer: LinearSite, added: LinearSite | None, ours: list[torch.Tensor], target: list[torch.Tensor]
    ) -> None:
        """Re-fits a map that writes to the stream towards `target`, then factorises it where the plan says so."""
        module = self.working.module(writer)
        affine = isinstance(getattr(module, "bias", None), torch.Tensor)
        fit, held_out = FitMoments(affine), HeldOutMoments(affine)
        watched = [writer] if added is None or added == writer else [writer, added]
        for batch, hidden in enumerate(ours):
            out, seen = self._run_watching(self.working, writer.layer, batch, hidden, watched)
            reached = out - seen[added][1].view_as(out) if added is not None and added != writer else out
            moments = fit if batch in self.fit_batches else held_out
            moments.add(seen[writer][0], target[batch].float() - reached.float())
        fit.sum_over(self.team)
        held_out.sum_over(self.team)
        found = refit(fit, held_out, team=self.team)
        self.records.append(
            {
                "layer": writer.layer,
                "path": writer.path,
                "before": found.before,
                "after": found.after,
                "adopted": found.change is not None,
                "ridge": found.ridge,
            }
        )
        weight = dense_weight(module).detach().float()
        if found.change is not None:
            change = found.change.float()
            weight = change[:, : weight.shape[1]].add_(weight)  # in its memory
            self._change(writer, weight, change[:, -1] if affine else None)
            del change
        del held_out, moments, found, seen, out, reached  # of a wide map several times the layer
        if self._rank(writer) is not None:
            if self.team.rank == 0:
                self._truncate(writer, weight, fit.take_second_moment())
            self._hand_over(writer, 0)
        del fit, weight
        release()

    def _change(self, site: LinearSite, weight: torch.Tensor, bias_change: torch.Tensor | None) -> None:
        """Gives a map a new weight [out, in] (and bias) of its own: the one it has belongs to the dense model too."""
        old = self.working.module(site)
        new = with_own_parameters(old)
        stored: Any = old.weight
        as_stored = weight if dense_weight(old) is stored else weight.T
        new.weight = nn.Parameter(as_stored.to(stored.dtype).contiguous(), requires_grad=stored.requires_grad)
        if bias_change is not None:
            bias: Any = old.bias
            new.bias = nn.Parameter((bias.detach().float() + bias_change).to(bias.dtype), bias.requires_grad)
        self.working.replace(site, new)

    def _bridge(
        self, layer: int, run_end: int, spec: BridgeSpec, ours: list[torch.Tensor], leaving: list[torch.Tensor]
    ) -> None:
        moments = BridgeMoments(spec.eps)
        for batch in self.fit_batches:
            moments.add(ours[batch], leaving[batch])
        moments.sum_over(self.team)
        module = self.working.layers[layer]
        like = next(module.parameters())
        bridge = LowRankBridge(
            ours[0].shape[-1], spec.rank, spec.bias, spec.eps, device="meta", dtype=like.dtype
        ).to_empty(device=like.device)
        if self.team.rank == 0:
            u, v, bias = fit_bridge(moments, spec.rank, self.bridge_gradients.get(run_end))
            with torch.no_grad():
                bridge.u.copy_(u)
                bridge.v.copy_(v)
                if bridge.bias is not None:
                    bridge.bias.copy_(bias)
        for parameter in bridge.parameters():
            self.team.broadcast_(parameter.detach(), 0)
        attach_bridge(module, bridge)

    def _note_drift(self, layer: int, truth: list[torch.Tensor], ours: list[torch.Tensor]) -> None:
        """|h - h_dense|^2 / |h_dense|^2 where `layer` ends, on the held-out windows."""
        batches = self.held_batches or self.fit_batches
        difference = sum(float((ours[b].double() - truth[b].double()).square().sum()) for b in batches)
        size = sum(float(truth[b].double().square().sum()) for b in batches)
        difference, size = self.team.sum(difference), self.team.sum(size)
        self.drift.append({"layer": layer, "relative_error": difference / size if size else 0.0})


def _at(site: LinearSite | None, layer: int) -> LinearSite | None:
    return None if site is None else LinearSite(layer, site.path, site.block)
