"""Gathers what the report shows: what the plan says, and what is measured on a text in the report's own run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .architectures import Architecture, LinearSite, dense_weight, linear_shape
from .budget import removal_structure
from .calibration import Calibration, context_length
from .checkpoint import load_model
from .decomposition import singular_values
from .divergence import divergence
from .drift import measure_drift
from .errors import TacoError
from .evaluation import WindowBatches, perplexity, resolve_windows
from .evaluation_run import evaluation_tokens
from .experts import expert_number, kind_of, opened
from .export import multiply_out
from .int8_linear import Int8LowRankLinear
from .latency import compare_latency
from .model_size import parameter_count, weight_bytes
from .pipeline import apply_plan
from .plan import Plan, versions
from .progress import Progress, Silent
from .replacement import LowRankBridge, LowRankLinear, in_floats
from .report_files import comparison_cut, comparison_note, comparison_rows, consistency, healing, number
from .source_model import load_source
from .structure import Structure

THIS, DENSE, REMOVAL = "this model", "dense", "layers removed"
# Spectra cost an SVD per matrix: as many lines per picture as can be told apart, and no more work than this in all
# (a few seconds per 1e11 multiplications on a CPU).
LINES_PER_PANEL = 6
SPECTRA_WORK = 3e11
DRIFT_WINDOWS = 16
MAX_WINDOWS = 64


def gather(
    directory: str | Path,
    text: str | None = None,
    dense: str | Path | None = None,
    compare: str | Path | None = None,
    window: int | None = None,
    max_windows: int | None = None,
    rounds: int = 10,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The record of a compressed model's report: plain JSON that `html_report.render` turns into a page.

    Args:
        directory: compressed checkpoint.
        text: what to measure on: a file, wikitext2, ptb, c4; default: text that the dense model writes.
        dense: the dense model; default: the plan's source. Where it is not found, what needs it says so.
        compare: what ``taco-svd compare --save`` wrote.
        window, max_windows: how the text is cut; default: as in the comparison, else the context and 64 windows.
        rounds: interleaved latency rounds; 0 measures none.

    Raises:
        TacoError: unreadable files, or a dense model given that is not this one's.
    """
    progress = progress or Silent()
    plan = Plan.load(directory)
    rows = comparison_rows(compare)
    model, tokenizer = load_model(directory, dtype, device)
    cut = comparison_cut(compare)
    max_windows = cut[1] or MAX_WINDOWS if max_windows is None else max_windows
    window, _ = resolve_windows(model, cut[0] if window is None else window, None, max_windows)
    if rounds < 0:
        raise TacoError(f"--rounds must be at least 0, got {rounds}.")
    absent: list[str] = []
    source: PreTrainedModel | None = None
    try:
        source = load_source(model, plan, directory, dense, dtype, device)
    except TacoError as error:
        if dense is not None:
            raise
        absent.append(f"{error} (--dense) Without it there is no KL divergence, no drift and no dense spectrum.")
    models = {THIS: model}
    structures = {THIS: plan.structure}
    if source is not None:
        models = {DENSE: source, THIS: model}
        if 0 < len(plan.redundant) < plan.structure.source_layers and plan.structure.source_layers > 1:
            bare = _removal(source, plan.redundant)
            models[REMOVAL], structures[REMOVAL] = bare, bare.structure
    tokens, text_name = evaluation_tokens(text or "self", source or model, tokenizer, seed, progress, window)
    measured = _measure(models, source, tokens, window, max_windows, progress)
    latency, timing = _latency(models, rounds, progress)
    reference = parameter_count(source) if source is not None else plan.source.get("parameters")
    for name, row in measured.items():
        row["share"] = row["parameters"] / reference if isinstance(reference, int) and reference > 0 else None
        row |= latency.get(name, {"latency": None})
    drift = {}
    if source is not None:
        batches = WindowBatches(model, tokens, window, None, min(max_windows, DRIFT_WINDOWS), 1 << 40)
        windows = next(iter(batches)).ids
        for name, structure in structures.items():
            with progress.step(f"hidden states: {name}") as report:
                found = measure_drift(source, models[name], structure, windows, progress=report)
            drift[name] = [point.to_dict() for point in found]
    with progress.step("spectra"):
        spectra = _spectra(model, source, plan.structure)
    architecture = Architecture(model)
    return {
        "name": Path(directory).resolve().name,
        "headline": _headline(plan, model),
        "text": text_name,
        "timing": timing,
        "missing": absent,
        "no_dense": absent[0] if absent else None,
        "models": list(measured.values()),
        "won_back": _won_back(measured),
        "importance": plan.importance,
        "states": _states(plan),
        "allocation": _allocation(architecture, plan.structure),
        "spectra": spectra,
        "predicted_loss": number(plan.result.get("predicted_loss")),
        "measured_loss": number(plan.result.get("measured_loss")),
        "consistency": consistency(plan),
        "drift": drift,
        "alternatives": _alternatives(rows, measured),
        "alternatives_note": comparison_note(compare, text_name),
        "healing": healing(directory, plan),
        "origin": {
            "dense model": str(plan.source.get("name")),
            "method": plan.method,
            "calibration": {key: value for key, value in plan.calibration.items() if key != "sha256"},
            "options": plan.options,
            "made with": plan.versions,
            "this report": versions(python=True) | {"seed": str(seed), "device": str(model.device)},
        },
    }


def _removal(dense: PreTrainedModel, redundant: tuple[int, ...]) -> Any:
    """The dense model without the redundant layers, nothing in their place."""
    structure = removal_structure(Architecture(dense), list(redundant))
    nothing = Calibration(torch.zeros((1, 2), dtype=torch.int64), "none", 0)  # removal looks at no text
    return apply_plan(dense, Plan("removal", structure, redundant), nothing)


def _measure(
    models: dict[str, PreTrainedModel],
    source: PreTrainedModel | None,
    tokens: torch.Tensor,
    window: int,
    max_windows: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        with progress.step(f"perplexity: {name}") as report:
            score = perplexity(model, tokens, window, None, max_windows, progress=report)
        rows[name] = {
            "name": name,
            "parameters": parameter_count(model),
            "bytes": weight_bytes(model),
            "perplexity": score.perplexity,
            "standard_error": score.standard_error,
            "nll": score.nll,
        }
        if source is not None and model is not source:
            with progress.step(f"KL divergence: {name}") as report:
                found = divergence(source, model, tokens, window, None, max_windows, progress=report)
            rows[name] |= {"kl": found.kl, "kl_standard_error": found.kl_standard_error}
    return rows


def _latency(models: dict[str, PreTrainedModel], rounds: int, progress: Progress) -> tuple[dict[str, Any], str]:
    if rounds < 1:
        return {}, ""
    limit = min(context_length(model) for model in models.values())
    decode = min(16, limit // 2)
    prompt = min(128, limit - decode)
    with progress.step("latency, interleaved") as report:
        pairs = ((THIS, DENSE),) if DENSE in models else ()
        found = compare_latency(models, pairs, 1, prompt, decode, rounds, report)
    told = (
        f"Latency: batch 1, prompt {prompt}, median of {rounds} interleaved rounds, {found.device}, "
        f"{found.threads} threads."
    )
    ratios = {pair: phases["decode"].median + 1 for pair, phases in found.overhead.items()}
    return {
        name: {"latency": seconds, "decode_over_dense": ratios.get(f"{name}/{DENSE}")}
        for name, seconds in found.seconds.items()
    }, told


def _won_back(rows: dict[str, dict[str, Any]]) -> float | None:
    if REMOVAL not in rows or DENSE not in rows:
        return None
    gap = rows[REMOVAL]["nll"] - rows[DENSE]["nll"]
    return (rows[REMOVAL]["nll"] - rows[THIS]["nll"]) / gap if gap > 0 else None


def _headline(plan: Plan, model: PreTrainedModel) -> str:
    structure = plan.structure
    parts = [f"{plan.source.get('name')} compressed by {plan.method}"]
    if structure.removed:
        parts.append(f"layers {', '.join(map(str, structure.removed))} removed")
    if structure.bridges:
        parts.append(f"{len(structure.bridges)} bridges")
    if structure.low_rank:
        matrices = sum(len(ranks) for ranks in structure.low_rank.values())
        parts.append(f"{matrices} matrices of {len(structure.low_rank)} layers factorised")
    return "; ".join(parts) + f"; {parameter_count(model):,} parameters"


def _states(plan: Plan) -> list[str]:
    structure = plan.structure
    factorised = {*structure.low_rank, *structure.narrow}
    return [
        "removed" if layer in structure.removed else "factorised" if layer in factorised else "kept"
        for layer in range(structure.source_layers)
    ]


def _allocation(architecture: Architecture, structure: Structure) -> dict[str, Any]:
    low_rank = []
    for layer, ranks in structure.low_rank.items():
        for path, rank in ranks.items():
            module = architecture.module(architecture.site(structure.position(layer), path))
            out_features, in_features = linear_shape(module)
            used = sum(parameter.numel() for name, parameter in module.named_parameters() if name != "bias")
            share = used / (out_features * in_features)
            low_rank.append({"layer": layer, "path": path, "rank": rank, "share": share})
    for layer, specs in structure.narrow.items():
        for path, narrow in specs.items():
            size = narrow.rows * narrow.columns
            share = size / max(
                size, *(_weights(architecture, place, path) for place in range(len(architecture.layers)))
            )
            low_rank.append({"layer": layer, "path": path, "rank": min(narrow.rows, narrow.columns), "share": share})
    return {
        "paths": list(dict.fromkeys(kind_of(path) for path in architecture.paths)),
        "layers": structure.source_layers,
        "removed": list(structure.removed),
        "low_rank": _experts_together(architecture, low_rank),
        "bridges": [{"after": bridge.after, "rank": bridge.rank} for bridge in structure.bridges],
    }


def _experts_together(architecture: Architecture, low_rank: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for the same map of all experts of a layer, with their means; experts that stay whole count as such."""
    experts = [path for path in architecture.paths if expert_number(path) is not None]
    count = {kind: sum(kind_of(path) == kind for path in experts) for kind in {kind_of(path) for path in experts}}
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for entry in low_rank:
        found.setdefault((entry["layer"], kind_of(entry["path"])), []).append(entry)
    together = []
    for (layer, kind), entries in found.items():
        whole = count.get(kind, len(entries)) - len(entries)
        share = (sum(entry["share"] for entry in entries) + whole) / (len(entries) + whole)
        rank = round(sum(entry["rank"] for entry in entries) / len(entries))
        together.append({"layer": layer, "path": kind, "rank": rank, "share": share})
    return together


def _alternatives(rows: list[dict[str, Any]], measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparison's rows and this model's; latency as a ratio to the dense model's in the same run."""
    if not rows:
        return []
    own = measured[THIS]
    this = {key: own[key] for key in ("name", "perplexity", "standard_error", "parameters")}
    # as the comparison has it: the median of ratios within rounds
    return [*rows, {**this, "decode": own.get("decode_over_dense")}]


def _weights(architecture: Architecture, position: int, path: str) -> int:
    """Elements of a matrix; of its dense form where the module remembers its outer sizes."""
    module = architecture.module(architecture.site(position, path))
    out_features, in_features = linear_shape(module)
    return out_features * in_features


# -- spectra -------------------------------------------------------------------------------------------------


@torch.no_grad()
def product_spectrum(module: LowRankLinear | LowRankBridge) -> list[float]:
    """Singular values of what a replacement multiplies by: rank values, in float64, without its product."""
    if getattr(module, "pivot", None) is not None:
        assert isinstance(module, LowRankLinear)
        weight = multiply_out(module, False).weight
        assert isinstance(weight, torch.Tensor)
        values = singular_values(weight.double())[: module.rank]
    else:
        left = torch.linalg.qr(module.u.double()).R
        right = torch.linalg.qr(module.v.double().T).R
        values = singular_values(left @ right.T)
    found: list[float] = values.tolist()
    return found


@torch.no_grad()
def _spectra(model: PreTrainedModel, dense: PreTrainedModel | None, structure: Structure) -> dict[str, Any]:
    """Panels of lines, one panel per matrix path, and one for the bridges."""
    architecture = Architecture(model)
    theirs = Architecture(opened(dense)) if dense is not None else None
    layers_of: dict[str, list[int]] = {}
    for layer, ranks in sorted(structure.low_rank.items()):
        for path in ranks:
            layers_of.setdefault(path, []).append(layer)
    panels, work, skipped = [], 0.0, 0
    for path in architecture.paths:
        lines = []
        chosen = _spread(layers_of.get(path, []), LINES_PER_PANEL)
        skipped += len(layers_of.get(path, [])) - len(chosen)
        for layer in chosen:
            site = architecture.site(structure.position(layer), path)
            module = architecture.module(site)
            if isinstance(module, Int8LowRankLinear):
                module = in_floats(module, torch.float32)
            if not isinstance(module, LowRankLinear):
                continue
            sides = sorted(linear_shape(module))
            work += 4.0 * sides[0] ** 2 * sides[1]
            if work > SPECTRA_WORK:
                skipped += 1
                continue
            values: list[float] = []
            if theirs is not None:
                weight = dense_weight(theirs.module(LinearSite(layer, path, site.block)))
                values = singular_values(weight.float()).tolist()
            found = product_spectrum(module)
            lines.append({"label": f"layer {layer}", "dense": values, "found": found, "rank": len(found)})
        if lines:
            panels.append({"title": path, "lines": lines})
    bridges = []
    for bridge in structure.bridges[:LINES_PER_PANEL]:
        stands = getattr(architecture.layers[structure.position(bridge.after)], "bridge", None)
        if isinstance(stands, LowRankBridge):
            found = product_spectrum(stands)
            bridges.append({"label": f"after {bridge.after}", "dense": [], "found": found, "rank": len(found)})
    if bridges:
        panels.append({"title": "bridges (of their own largest)", "lines": bridges})
    reason = f"{skipped} more matrices are not shown." if skipped else ""
    return {"panels": panels, "missing": reason if panels else "No matrix of this model is factorised."}


def _spread(values: list[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spread, first and last among them."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
