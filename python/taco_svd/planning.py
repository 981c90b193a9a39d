"""Decides which layers are redundant and what replaces them; what a plan says of where it comes from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .allocation import ByteCosts, Costs, allocate, allocate_within
from .baselines import BASELINES, Workspace, choose_run, everywhere, make_budget
from .budget import Sizes, bridge_structure, low_rank_structure, removal_structure, structure_parameters
from .calibration import Calibration
from .cost_budget import LatencyCosts, bridges_within
from .decomposition import numerical_errors_named
from .errors import TacoError
from .experts import open_modules
from .importance import LayerImportance, rank_layers
from .loss import NOTHING
from .mapped import is_mapped
from .methods import METHODS
from .model_checks import check_model
from .model_size import parameter_count, weight_bytes
from .one_shot import importance_and_attribution
from .options import CompressionOptions, Resolved, resolve
from .plan import Plan, versions
from .progress import Progress, Silent
from .structure import Structure
from .suffix import SuffixRunner, evaluating
from .taco import BRIDGE_GRADIENT_DAMPING, GRADIENT_DAMPING, INPUT_DAMPING, Analysis
from .untrusted import printable
from .wide_products import in_wide_products

# Greedy removal runs the set once per candidate: a part of it orders the layers as well.
GREEDY_SAMPLES = 16


@numerical_errors_named()
@in_wide_products
@evaluating
def make_plan(
    model: PreTrainedModel,
    calibration: Calibration,
    options: CompressionOptions | None = None,
    *,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Plan:
    """Decides which layers are redundant and what replaces them; `apply_plan` carries that out.

    Args:
        model: a dense decoder-only transformers model; it stays as it is.
        calibration: the windows that decide.
        options: how much, and how: `CompressionOptions(keep=0.8)`.
        progress: is told of every step; default: nobody is.
        workspace: statistics of the dense model, to be shared by calls on the same model and calibration.

    Raises:
        UnsupportedModelError: the model's structure.
        TacoError: the model is compressed already, not all here or damaged; or the options do not fit it.
    """
    options = options or CompressionOptions()
    if calibration.labels is not None:
        check_counts_completions(options.method, options.importance)
    return decide(
        resolve(options, check_model(model)),
        options,
        workspace or Workspace(model, calibration),
        progress or Silent(),
    )


def decide(resolved: Resolved, options: CompressionOptions, workspace: Workspace, progress: Progress) -> Plan:
    """As `make_plan`, of a model that was checked and options that were held against it."""
    architecture, model = resolved.architecture, resolved.architecture.model
    redundant, measured = _redundant_layers(resolved, options, workspace, progress)
    decision = _replacement(resolved, redundant, options, workspace, progress)
    parameters = decision.result.pop("parameters", None) or structure_parameters(architecture, decision.structure)
    return Plan(
        method=options.method,
        structure=decision.structure,
        redundant=tuple(redundant),
        compression_ratio=resolved.ratio,
        importance=_plain(measured),
        calibration=workspace.calibration.describe(),
        options=decision.options,
        source=describe_source(model),
        result={"parameters": parameters, "share": parameters / parameter_count(model), **decision.result},
        versions=versions(),
    )


def check_counts_completions(method: str, importance: str) -> None:
    """Refuses methods that a loss of completions alone would not change, or that are to be as published.

    Raises:
        TacoError: naming which.
    """
    if method in BASELINES:
        raise TacoError(f"--completions-only: the published method {method} counts all tokens; leave it out.")
    if METHODS[method].removes and not METHODS[method].bridges and importance != "greedy":
        raise TacoError(
            f"--completions-only: with --method {method} no loss decides, unless by --importance greedy; leave it out."
        )


def _redundant_layers(
    resolved: Resolved, options: CompressionOptions, workspace: Workspace, progress: Progress
) -> tuple[list[int], dict[str, Any]]:
    """The layers that may be replaced, in order; and how they were found."""
    architecture, count, ratio = resolved.architecture, resolved.count, resolved.ratio
    if resolved.layers is not None:
        return sorted(resolved.layers), {"measure": "given"}
    if everywhere(options.method, resolved.share) or options.sizes_itself:
        return list(range(len(architecture.layers))), {"measure": "all layers"}
    own = METHODS[options.method].importance
    if own == "runs":
        redundant, distances = choose_run(workspace, count, progress)
        return redundant, {"measure": "cosine distance of runs", "scores": distances}
    importance = own or options.importance
    calibration = workspace.calibration
    tokens, labels = workspace.team.windows(calibration.tokens), calibration.labels
    labels = None if labels is None else workspace.team.windows(labels)
    if importance == "greedy":  # one loss decides after the other: every process finds the same
        tokens, labels = calibration.tokens, calibration.labels
        if labels is not None:  # those windows in which most counts
            order = labels[:, 1:].ne(NOTHING).sum(dim=1).argsort(descending=True, stable=True)
            tokens, labels = tokens[order], labels[order][:GREEDY_SAMPLES]
        tokens = tokens[:GREEDY_SAMPLES]
    # a streamed model's layers are read one by one; passes over the whole model would read it once per batch
    if options.one_shot and importance == "bi" and ratio is not None and not is_mapped(architecture.model):
        with progress.step("layer importance and gradient attribution") as report:
            ranking, attributed = importance_and_attribution(architecture, tokens, count, ratio, report, labels)
        redundant = sorted(ranking.order[:count])
        # for `_carry_out` of the same call, if it carries out this structure
        workspace.attributed = (low_rank_structure(architecture, redundant, ratio), attributed)
        return redundant, dataclasses.asdict(ranking)
    step = f"layer importance ({importance})"

    def ranked() -> LayerImportance:
        with progress.step(step) as report:
            runner = SuffixRunner(architecture, tokens, 0, labels=labels)
            return rank_layers(runner, importance, count, report, workspace.team)

    # how much each layer changes the hidden states does not depend on how many layers are to go
    ranking = workspace.keep(step if importance == "bi" else f"{step} of {count}", ranked)
    return sorted(ranking.order[:count]), dataclasses.asdict(ranking)


@dataclasses.dataclass
class _Replacement:
    """What comes in place of the redundant layers, and what the plan says of how that was decided."""

    structure: Structure
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)


def _replacement(
    resolved: Resolved, redundant: list[int], options: CompressionOptions, workspace: Workspace, progress: Progress
) -> _Replacement:
    architecture, facts = resolved.architecture, METHODS[options.method]
    baseline = BASELINES.get(options.method)
    if facts.whole_model:
        return _taco(resolved, redundant, options, workspace, progress)
    if facts.bridges:
        found = _Replacement(
            bridge_structure(architecture, redundant, options.bridge_rank),
            {"gradient_damping": BRIDGE_GRADIENT_DAMPING, "consistency": options.consistency},
        )
        if options.max_overhead is not None:
            within = bridges_within(architecture.model, redundant, options.max_overhead, progress=progress)
            found.structure, found.result = within.structure, {"cost_budget": within.record}
        return found
    if facts.removes:
        return _Replacement(removal_structure(architecture, redundant))
    if baseline is not None and baseline.allocate is not None:
        # entries of an index are int64, whatever the weights are
        itemsize = architecture.model.dtype.itemsize
        index_size = 1.0 if options.keep_bytes is None else torch.int64.itemsize / itemsize
        budget = make_budget(architecture, options.method, resolved.share, redundant, resolved.ratio, index_size)
        decision = baseline.allocate(workspace, budget, progress)
        return _Replacement(decision.structure, decision.options)
    assert resolved.ratio is not None
    structure = low_rank_structure(architecture, redundant, resolved.ratio)
    return _Replacement(structure, {"one_shot": True} if options.one_shot else {})


def _taco(
    resolved: Resolved, redundant: list[int], options: CompressionOptions, workspace: Workspace, progress: Progress
) -> _Replacement:
    """One budget over the whole model; `redundant` only says what the budget is where it is a number of layers."""
    architecture, model = resolved.architecture, resolved.architecture.model
    costs, most = _budget(resolved, redundant, options, progress)
    settings = {
        "input_damping": INPUT_DAMPING,
        "gradient_damping": GRADIENT_DAMPING,
        "consistency": options.consistency,
    }
    curves = analysis(workspace, model, workspace.calibration).curves(settings, progress)
    unit = None if costs is None else costs.unit
    if options.max_kl is not None:
        found, unit = allocate_within(architecture, curves, most), "nats per token"
    else:
        found = allocate(architecture, curves, most, resolved.layers, costs)
    result: dict[str, Any] = {
        "parameters": found.parameters,
        "budget": most,
        "predicted_loss": found.predicted_loss,
    }
    if unit is not None:
        result["budget_unit"] = unit
    if isinstance(costs, LatencyCosts):
        result["cost_budget"] = costs.record(most, found.cost)
        costs.costs.close()
    return _Replacement(found.structure, settings, result)


def _budget(
    resolved: Resolved, redundant: list[int], options: CompressionOptions, progress: Progress
) -> tuple[Costs | None, float]:
    """(what taco's budget counts, how much of it); None counts parameters, or with `max_kl` the loss itself."""
    architecture, model = resolved.architecture, resolved.architecture.model
    if options.max_kl is not None:
        return None, options.max_kl
    if options.max_latency is not None:  # measured before the long work: the budget may be met already
        costs = LatencyCosts(model, progress=progress)
        return costs, costs.budget(options.max_latency)
    if options.keep_bytes is not None:
        return ByteCosts(Sizes.of(architecture), model.dtype.itemsize, weight_bytes(model)), options.keep_bytes
    if resolved.share is not None:
        return None, int(resolved.share * parameter_count(model))
    assert resolved.ratio is not None  # what the paper's method needs for the same number of layers
    return None, structure_parameters(architecture, low_rank_structure(architecture, redundant, resolved.ratio))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def describe_source(model: PreTrainedModel) -> dict[str, Any]:
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return {
        # of a local path only the last part: a plan must not carry its author's directories
        "name": printable(Path(name).name if Path(name).is_absolute() or Path(name).exists() else name),
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "layers": model.config.num_hidden_layers,
        "parameters": parameter_count(model),
        "bytes": weight_bytes(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": config_of(model),
    }


def config_of(model: PreTrainedModel) -> Any:
    """A model's config as JSON has it (string keys), or a plan would differ from itself once it has been saved."""
    return _without_paths(json.loads(model.config.to_json_string(use_diff=False)))


def _without_paths(values: Any) -> Any:
    """A config without where it was read from, in configs inside of it too."""
    if not isinstance(values, dict):
        return values
    return {key: _without_paths(value) for key, value in values.items() if key not in ("_name_or_path", "name_or_path")}


def analysis(workspace: Workspace, model: PreTrainedModel, calibration: Calibration) -> Analysis:
    """Taco mode's statistics of the dense model, shared like those of the baselines."""
    # of a mixture of experts some methods see the single ones, others the whole block
    key = "taco, experts open" if next(open_modules(model), None) is not None else "taco"
    return workspace.keep(key, lambda: Analysis(model, calibration, workspace.store, workspace.team))
