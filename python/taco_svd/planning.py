"""Decides which layers are redundant and what replaces them; what a plan says of where it comes from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .allocation import Sizes, bridge_structure, low_rank_structure, removal_structure, structure_parameters
from .architectures import Architecture
from .attributed import Attributed
from .baselines import BASELINES, Workspace, choose_run, everywhere, make_budget
from .budget import ByteCosts, Costs, allocate
from .calibration import Calibration
from .checkpoint import parameter_count, weight_bytes
from .choices import check_choices, count_and_ratio, how_many, named_layers, share_of_parameters
from .cost_budget import CostBudget, LatencyCosts, bridges_within
from .experts import EXPERTS, open_modules
from .importance import LayerImportance, rank_layers
from .mapped import is_mapped
from .model_checks import check_model, factorisable
from .one_shot import importance_and_attribution
from .plan import Plan, versions
from .progress import Progress, Silent
from .suffix import SuffixRunner, evaluating
from .taco import BRIDGE_GRADIENT_DAMPING, GRADIENT_DAMPING, INPUT_DAMPING, Analysis
from .untrusted import printable
from .wide_products import in_wide_products

# Greedy removal runs the set once per candidate: a part of it orders the layers as well.
GREEDY_SAMPLES = 16


@in_wide_products
@evaluating
def make_plan(
    model: PreTrainedModel,
    calibration: Calibration,
    method: str = "taco",
    keep: float | None = None,
    layers: int | list[int] | None = None,
    compression_ratio: float | None = None,
    importance: str = "bi",
    bridge_rank: int | None = None,
    consistency: bool = True,
    progress: Progress | None = None,
    one_shot: bool = False,
    workspace: Workspace | None = None,
    _architecture: Architecture | None = None,
    cost: CostBudget | None = None,
    experts: str = EXPERTS[0],
) -> Plan:
    """Decides which layers are redundant and what replaces them; arguments as in `compress`."""
    progress = progress or Silent()
    cost = cost or CostBudget()
    check_choices(method, importance, bridge_rank, one_shot, consistency, layers, keep, cost.max_latency is not None)
    architecture = factorisable(
        _architecture or check_model(model), method, experts, timed=cost.max_latency is not None
    )
    model = architecture.model
    chosen = named_layers(architecture, layers)
    measured: dict[str, Any]
    attributed: Attributed | None = None
    cost.check(method, keep, layers, bridge_rank, compression_ratio)
    if cost.keep_bytes is not None:
        keep = share_of_parameters(model, cost.keep_bytes)
    count, ratio = 0, None
    if cost.max_latency is None:
        count, ratio = count_and_ratio(architecture, method, keep, how_many(layers), compression_ratio, bridge_rank)
    baseline = BASELINES.get(method)
    workspace = workspace or Workspace(model, calibration)
    depth = len(architecture.layers)
    if chosen is not None:
        redundant, measured = sorted(chosen), {"measure": "given"}
    elif everywhere(method, keep) or cost.max_latency is not None:
        redundant, measured = list(range(depth)), {"measure": "all layers"}
    elif method == "replaceme":
        redundant, distances = choose_run(workspace, count, progress)
        measured = {"measure": "cosine distance of runs", "scores": distances}
    else:
        importance = (baseline and baseline.importance) or importance
        tokens = workspace.team.windows(calibration.tokens)
        if importance == "greedy":  # one loss decides after the other: every process finds the same
            tokens = calibration.tokens[:GREEDY_SAMPLES]
        # a streamed model's layers are read one by one; passes over the whole model would read it once per batch
        if one_shot and importance == "bi" and ratio is not None and not is_mapped(model):
            with progress.step("layer importance and gradient attribution") as report:
                ranking, attributed = importance_and_attribution(architecture, tokens, count, ratio, report)
        else:
            step = f"layer importance ({importance})"

            def ranked() -> LayerImportance:
                with progress.step(step) as report:
                    return rank_layers(SuffixRunner(architecture, tokens, 0), importance, count, report, workspace.team)

            # how much each layer changes the hidden states does not depend on how many layers are to go
            ranking = workspace.keep(step if importance == "bi" else f"{step} of {count}", ranked)
        redundant, measured = sorted(ranking.order[:count]), dataclasses.asdict(ranking)
    options: dict[str, Any] = {}
    result: dict[str, Any] = {}
    if method == "removal" or (baseline is not None and baseline.removes):
        structure = removal_structure(architecture, redundant)
    elif method == "bridge" and cost.max_overhead is not None:
        within = bridges_within(model, redundant, cost.max_overhead, progress=progress)
        structure, result = within.structure, {"cost_budget": within.record}
    elif method == "bridge":
        structure = bridge_structure(architecture, redundant, bridge_rank)
    elif baseline is not None and baseline.allocate is not None:
        # entries of an index are int64, whatever the weights are
        index_size = 1.0 if cost.keep_bytes is None else torch.int64.itemsize / model.dtype.itemsize
        budget = make_budget(architecture, method, keep, redundant, ratio, index_size)
        decision = baseline.allocate(workspace, budget, progress)
        structure, options = decision.structure, decision.options
    elif cost.max_latency is not None:
        structure = removal_structure(architecture, [])  # taco's allocator decides below
    else:
        assert ratio is not None
        structure = low_rank_structure(architecture, redundant, ratio)
        workspace.attributed = None if attributed is None else (structure, attributed)
    parameters = structure_parameters(architecture, structure)
    if one_shot:
        options = {"one_shot": True}
    if method == "bridge":
        options = {"gradient_damping": BRIDGE_GRADIENT_DAMPING, "consistency": consistency}
    if method == "taco":
        options = {
            "input_damping": INPUT_DAMPING,
            "gradient_damping": GRADIENT_DAMPING,
            "consistency": consistency,
        }
        # with `layers`, the budget is what the paper's method needs for the same arguments
        most: float = parameters if keep is None else int(keep * parameter_count(model))
        costs: Costs | None = None
        if cost.keep_bytes is not None:
            most = cost.keep_bytes
            costs = ByteCosts(Sizes.of(architecture), model.dtype.itemsize, weight_bytes(model))
        elif cost.max_latency is not None:  # measured before the long work: the budget may be met already
            costs = LatencyCosts(model, progress=progress)
            most = costs.budget(cost.max_latency)
        curves = analysis(workspace, model, calibration).curves(options, progress)
        allocation = allocate(architecture, curves, most, chosen, costs)
        structure, parameters = allocation.structure, allocation.parameters
        result = {"budget": most, "predicted_loss": allocation.predicted_loss}
        if costs is not None:
            result["budget_unit"] = costs.unit
        if isinstance(costs, LatencyCosts):
            result["cost_budget"] = costs.record(most, allocation.cost)
            costs.costs.close()
    return Plan(
        method=method,
        structure=structure,
        redundant=tuple(redundant),
        compression_ratio=ratio,
        importance=_plain(measured),
        calibration=calibration.describe(),
        options=options,
        source=describe_source(model),
        result={"parameters": parameters, "share": parameters / parameter_count(model), **result},
        versions=versions(),
    )


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
