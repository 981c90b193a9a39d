"""Calls the steps of the method in order; holds no mathematics of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .architectures import Architecture, slice_config
from .arguments import check_given_model, check_given_tokenizer, whole_number, whole_or_none
from .baselines import BASELINES, Workspace
from .calibration import (
    HELD_OUT_SHARE,
    Calibration,
    CalibrationSource,
    check_activations,
    check_completions_only,
    check_tokens,
    load_calibration,
    recognised,
)
from .decomposition import numerical_errors_named
from .errors import TacoError
from .experts import EXPERTS, set_idle
from .factorise import factorise
from .gathering import gathered, is_scattered
from .loss_curves import divergence_between
from .mapped import not_finite, weight_sums
from .methods import METHODS
from .model_checks import check_structure, check_weights, fitting, refuse_compressed
from .model_size import parameter_count, weight_bytes
from .modeling import as_compressed
from .module_tree import structural_copy
from .options import CompressionOptions, resolve
from .plan import OF_THE_MODEL, Plan, versions
from .plan_calibration import drawn_as_planned
from .planning import analysis, check_counts_completions, config_of, decide, describe_source
from .progress import Progress, Silent
from .quantisation import quantise
from .sequential import held_out_windows
from .shapes import skeleton
from .store import Store
from .suffix import SuffixRunner, evaluating
from .surgery import drop_layers
from .taco import build_upwards
from .team import Team
from .texts import rows_digest
from .wide_products import in_wide_products
from .work_directory import check_work_directory, open_run, weights_digest

# Calibration windows where nothing else is asked for.
SAMPLES = 64


def _calibration_name(calibration: CalibrationSource) -> str:
    """What tells one calibration, as `recognised` gives it, from another before it is loaded."""
    if isinstance(calibration, torch.Tensor):
        calibration = Calibration(calibration, "tokens", 0)
    if isinstance(calibration, Calibration):
        return calibration.digest
    return str(calibration) if isinstance(calibration, (str, Path)) else rows_digest(calibration)


@in_wide_products
@evaluating
def apply_plan(
    model: PreTrainedModel,
    plan: Plan,
    calibration: Calibration,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> PreTrainedModel:
    """Carries a plan out: a compressed model that shares every untouched weight with `model`, which stays as it is.

    Raises:
        UnsupportedModelError: its structure.
        TacoError: the plan is for another kind of model, or the model is compressed already or not all here.
    """
    if calibration.labels is not None:
        check_counts_completions(plan.method, str(plan.importance.get("measure")))
    check_structure(model)  # of weights elsewhere hooks would bring, and run, the layers that are to be replaced
    return _carry_out(model, plan, calibration, progress or Silent(), workspace or Workspace(model, calibration))[0]


@in_wide_products  # a scattered model that was gathered is not the one that `compress` was called with
def _carry_out(
    model: PreTrainedModel, plan: Plan, calibration: Calibration, progress: Progress, workspace: Workspace
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The compressed model, and what its making has to say for the plan's result."""
    record: dict[str, Any] = {}
    int8 = plan.structure.int8
    if int8:  # these are made of floating factors, like all others
        plan = dataclasses.replace(plan, structure=dataclasses.replace(plan.structure, int8={}))
    model = fitting(Architecture(model), plan).model
    working = structural_copy(model)
    architecture = Architecture(working)
    baseline = BASELINES.get(plan.method)
    if baseline is not None and baseline.carry_out is not None:
        baseline.carry_out(workspace, architecture, plan, progress)
    elif METHODS[plan.method].refits:
        record = build_upwards(
            model, architecture, plan, calibration, progress, analysis(workspace, model, calibration)
        )
    elif plan.structure.low_rank:
        factorised = sorted(plan.structure.low_rank)
        runner = SuffixRunner(
            architecture, calibration.tokens, factorised[0], starts=factorised, labels=calibration.labels
        )
        known, workspace.attributed = workspace.attributed, None  # for the call that planned it; it is large
        attributed = None
        if known is not None and known[0] == plan.structure and plan.options.get("one_shot"):
            attributed = known[1]
        factorise(architecture, plan, runner, progress, workspace.store, attributed)
    set_idle(working, False)
    kept = list(plan.structure.kept)
    drop_layers(architecture, kept)
    compressed = as_compressed(working, slice_config(model.config, kept), plan.structure)
    name = not_finite(compressed)
    if name is not None:
        raise TacoError(f"The factors of {name} came out as NaN or infinite; try another --calibration.")
    return quantise(compressed, int8) if int8 else compressed, record


@numerical_errors_named()
@in_wide_products
@evaluating
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = "taco",
    keep: float | str | None = None,
    layers: int | list[int] | None = None,
    compression_ratio: float | None = None,
    calibration: CalibrationSource | None = None,
    samples: int = SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    importance: str = "bi",
    bridge_rank: int | None = None,
    one_shot: bool = False,
    consistency: bool = True,
    plan: Plan | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    max_overhead: float | None = None,
    max_latency: str | float | None = None,
    max_kl: float | None = None,
    team: Team | None = None,
    experts: str = EXPERTS[0],
    completions_only: bool | None = None,
) -> tuple[PreTrainedModel, Plan]:
    """Compresses a language model.

    Args:
        model: a decoder-only transformers model in float32, bfloat16 or float16; it stays as it is, and the
            compressed model shares the weights of its untouched layers. Of a model that is sharded over processes
            (FSDP2, tensor parallelism: all of them must call this) or offloaded by accelerate, the compressed model
            is a whole one, mapped from files (`gathering`).
        tokenizer: needed when calibrating on text.
        method: "taco" (one budget over the whole model, factors weighted on both sides, re-fitted), "paper"
            (arXiv 2501.00339), "svd" (plain), "removal" (layers out, nothing in their place) or "bridge" (layers out,
            one low-rank map per run of them); or a published method to compare with (`baselines.BASELINES`), which
            with `keep` compresses all layers alike.
        keep: share of all parameters that may remain, or bytes as text ("4.2GB"); or
        layers: number of redundant layers, or which ones; with
        compression_ratio: the paper's c for their matrices (default 0.7).
        calibration: "self" (text the model writes), "wikitext2", "ptb", "c4", a text file or one of JSON lines, a
            list of texts, rows of a data set (dicts with ``text``, ``messages``, or ``prompt`` and ``completion``),
            int64 tokens [samples, seq_len], or a `Calibration`. Default: "self", and with `plan` what the plan was
            made with (a text file is looked for in the working directory).
        samples, seq_len, seed: number and length of calibration windows, and the seed of their draw.
        importance: how redundant layers are found: "bi", "angular" or "greedy".
        bridge_rank: rank of the bridges; default: all of them cost 0.3% of the layers that stay.
        max_overhead: method "bridge": instead of a rank, what all bridges may cost over bare removal, in measured
            time (0.003 is 0.3%), see `cost_budget`.
        max_latency: method "taco": a budget of measured time instead of `keep`; a fraction of the dense model's
            latency (0.8) or milliseconds per decoded token ("12.5ms").
        max_kl: method "taco": a budget of quality instead of `keep`: the smallest model whose predicted KL divergence
            from the dense one, on the calibration windows, is at most this (nats per token, e.g. 0.01).
        one_shot: paper method only: one pass over the dense model attributes all maps, instead of one pass per block
            on the model compressed so far.
        progress: is told of every step (`progress.Progress`); default: nobody is.
        workspace: statistics of the dense model, to be shared by calls on the same model and calibration.
        consistency: methods "taco" and "bridge" re-fit the maps that write to the residual stream (see `consistency`).
        plan: carries out this plan instead of making one; method, keep, layers ... are then left out.
        work_dir: keeps finished steps in this directory, so that the same call with `resume` goes on from them after
            an interruption and gives the same bits. The compressed model's factors are mapped from its files: delete
            it once the model is saved (`taco-svd compress` does both).
        resume: goes on from what `work_dir` has.
        team: the processes that do this together (methods taco, bridge and removal), each with a `work_dir` of its
            own; all return the same model.
        experts: of a mixture: "factorised" (methods taco, paper and svd: each expert's maps like any other) or "whole".
        completions_only: only what the model is to write counts in the loss that decides (and in the divergence that is
            measured): an assistant's turns in ``messages``, or ``completion``. All tokens are read, and the re-fits are
            to the hidden states of all. Default: no; with `plan` and no `calibration`, as the plan was made.

    Returns:
        (compressed model, plan); save with `taco_svd.save_compressed` or the model's `save_pretrained`. Of methods
        "taco" and "bridge" on a CPU, what a large model's layers do not share with `model` is mapped from temporary
        files (deleted already), so that it takes memory only where it is used.

    Raises:
        TacoError: anything wrong with the arguments, the model, the tokenizer or the text, before long work.
    """
    progress, team = progress or Silent(), team or Team()
    check_given_model(model)
    check_given_tokenizer(tokenizer)
    samples, seed, seq_len = (
        whole_number("samples", samples),
        whole_number("seed", seed),
        whole_or_none("seq_len", seq_len),
    )
    options = CompressionOptions(
        method=method,
        keep=keep,
        layers=layers,
        compression_ratio=compression_ratio,
        importance=importance,
        bridge_rank=bridge_rank,
        one_shot=one_shot,
        consistency=consistency,
        max_overhead=max_overhead,
        max_latency=max_latency,
        max_kl=max_kl,
        experts=experts,
    )
    _check_given_plan(plan, options)
    if work_dir is not None and not isinstance(work_dir, (str, Path)):
        raise TacoError(f"work_dir must be the name of a directory, got {work_dir!r:.80}.")
    if calibration is None:
        calibration = "self"
        if plan is not None and plan.calibration:
            other = {"samples": samples != SAMPLES, "seq_len": seq_len is not None, "seed": seed != 0}
            given = [name for name, differs in other.items() if differs]
            if completions_only is not None:
                given.append("completions_only")
            drawn = drawn_as_planned(plan, given, look=team.rank == 0 and not resume)
            calibration, samples = drawn["calibration"], drawn.get("samples", samples)
            seq_len, seed = drawn.get("seq_len", seq_len), drawn.get("seed", seed)
            completions_only = drawn.get("completions_only", completions_only)
    if not isinstance(calibration, (str, Path)) or (team.rank == 0 and not resume):  # see where it is loaded
        calibration = recognised(calibration)
    completions_only = _checked_completions(
        calibration,
        completions_only,
        method if plan is None else plan.method,
        importance if plan is None else str(plan.importance.get("measure", importance)),
    )
    _check_team(team, plan, options)
    if work_dir is not None:
        check_work_directory(work_dir, resume)
        if workspace is not None:
            raise TacoError("A workspace serves many runs, a work directory keeps the steps of one; pass one of them.")
    elif resume:
        raise TacoError("resume needs the work_dir of the run that was stopped.")
    scattered = is_scattered(model)
    if scattered:
        refuse_compressed(model)
        if workspace is not None:
            raise TacoError("The model's weights are not all here; a workspace serves only a model that is whole.")
    if isinstance(calibration, (torch.Tensor, Calibration)):
        check_tokens(calibration if isinstance(calibration, torch.Tensor) else calibration.tokens, model)
    # all that follows until the weights are read goes by shapes
    architecture = Architecture(skeleton(model.config, model.dtype)) if scattered else check_structure(model)
    resolved = None
    if plan is not None:
        fitting(architecture, plan)
    else:  # what the arguments alone can tell, before calibration takes its time
        resolved = resolve(options, architecture, model)
    if scattered:
        with progress.step("bringing the weights together") as report:
            model = gathered(model, None if work_dir is None else Path(work_dir).absolute().parent, team, report)
        architecture = check_structure(model)
        resolved = resolved and resolve(options, architecture)
    with progress.step("looking at the weights"):
        looked = weight_sums(model)  # once: of a streamed model that is all that is in its files
        check_weights(architecture, looked)
    store = None
    if work_dir is not None:
        arguments = {
            **dataclasses.asdict(options),
            "calibration": _calibration_name(calibration),
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
            **({"completions_only": True} if completions_only else {}),
            "plan": None if plan is None else hashlib.sha256(json.dumps(plan.to_dict()).encode()).hexdigest(),
        }
        digest = hashlib.sha256(json.dumps(config_of(model), sort_keys=True).encode()).hexdigest()
        run = {**arguments, "weights": weights_digest(looked), "config": digest, "versions": versions()}
        store = open_run(work_dir, {**run, "processes": team.size}, resume, team)
    draw = (samples, seq_len, seed, completions_only)
    windows = _calibrated(calibration, model, tokenizer, draw, store, team, progress)
    check_activations(model, windows)
    if workspace is None:
        workspace = Workspace(model, windows, store, team)
    elif not workspace.is_for(model, windows):
        raise TacoError("The workspace belongs to another model or another calibration set.")
    if plan is None and store is not None and "plan" in store:
        plan = Plan.from_dict(store.note("plan"))
    if plan is None:
        assert resolved is not None
        plan = team.broadcast(decide(resolved, options, workspace, progress))  # measured costs differ by process
        if store is not None:
            store.put("plan", {}, plan.to_dict())
    compressed, record = _carry_out(model, plan, windows, progress, workspace)
    held_out = held_out_windows(windows.tokens)
    labels = None if windows.labels is None else held_out_windows(windows.labels)
    if METHODS[plan.method].refits and len(held_out) and "measured_loss" not in record:
        with progress.step("measuring the loss on held-out windows"):
            record["measured_loss"] = divergence_between(model, compressed, held_out, labels)
    plan = dataclasses.replace(
        plan,
        calibration=windows.describe(),
        source=describe_source(model),
        result={
            **{key: value for key, value in plan.result.items() if key not in OF_THE_MODEL},
            **record,
            "parameters": parameter_count(compressed),
            "bytes": weight_bytes(compressed),
            "dtype": str(compressed.dtype).removeprefix("torch."),
            "share": parameter_count(compressed) / parameter_count(model),
        },
    )
    compressed.taco_plan = plan  # type: ignore[assignment]
    return compressed, plan


def _check_given_plan(plan: Any, options: CompressionOptions) -> None:
    """A plan has decided what options would."""
    if plan is None:
        return
    if not isinstance(plan, Plan):
        raise TacoError(f"plan must be a Plan, got {type(plan).__name__}; Plan.load reads one from a file.")
    if options.given():
        raise TacoError(
            f"The plan has decided what is compressed, how and how much; leave out {', '.join(options.given())}."
        )


def _checked_completions(calibration: Any, completions_only: bool | None, method: str, importance: str) -> bool:
    """Whether only completions count.

    Raises:
        TacoError: neither is said, the calibration does not tell which they are, or the method weighs no loss by them.
    """
    if completions_only not in (None, False, True):
        raise TacoError(f"completions_only must be True or False, got {completions_only!r:.80}.")
    labelled = isinstance(calibration, Calibration) and calibration.labels is not None
    wanted = labelled if completions_only is None else bool(completions_only)
    if labelled and not wanted:
        raise TacoError("The calibration has labels, which say what counts; leave out completions_only=False.")
    if wanted:
        check_counts_completions(method, importance)
    check_completions_only(calibration, wanted)
    return wanted


def _check_team(team: Team, plan: Plan | None, options: CompressionOptions) -> None:
    """What several processes cannot do together."""
    if team.size == 1:
        return
    if options.max_overhead is not None or options.max_latency is not None:
        raise TacoError(
            "A budget of time is measured by one process that has the machine to itself: start one, or give --keep."
        )
    method = options.method if plan is None else plan.method
    if not METHODS[method].several_processes:
        able = ", ".join(name for name, facts in METHODS.items() if facts.several_processes)
        raise TacoError(f"Several processes work on --method {able} only; start one for {method}.")


def _calibrated(
    given: CalibrationSource,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draw: tuple[int, int | None, int, bool],
    store: Store | None,
    team: Team,
    progress: Progress,
) -> Calibration:
    """The windows that decide, the same in every process of a team; from the store where it has them.

    Args:
        given: as `recognised` gives it.
        draw: samples, tokens per window, seed, whether only completions count.
    """
    if store is not None and "calibration" in store:
        kept = store.note("calibration")
        held = store.get("calibration")
        given = Calibration(held["tokens"], kept["source"], kept["seed"], held.get("labels"))
    if isinstance(given, Calibration):
        found = given
    else:
        with progress.step("calibration text") as report:
            drawn = None
            if team.rank == 0:
                drawn = load_calibration(given, model, tokenizer, *draw[:3], report, completions_only=draw[3])
        shared = team.broadcast(drawn)
        assert isinstance(shared, Calibration)
        found = shared
    if team.size > 1 and len(found.tokens) < HELD_OUT_SHARE * team.size:
        raise TacoError(
            f"{team.size} processes need at least {HELD_OUT_SHARE * team.size} calibration windows, there are "
            f"{len(found.tokens)}."
        )
    if store is not None and "calibration" not in store:
        held = {"tokens": found.tokens} | ({} if found.labels is None else {"labels": found.labels})
        store.put("calibration", held, {"source": found.source, "seed": found.seed})
    return found
