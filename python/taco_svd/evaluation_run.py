"""Evaluates a model as `taco-svd eval` does: a text, the dense model, tasks; one record with what made the values."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration import check_vocabulary, context_length, embedding_weight, sample_from_model, tokenize
from .checkpoint import load_model
from .divergence import divergence
from .errors import TacoError
from .evaluation import perplexity, resolve_windows
from .harness import require_harness, run_tasks
from .model_size import parameter_count, weight_bytes
from .modeling import CompressedModel
from .plan import Plan, versions
from .progress import Progress, Silent
from .report import NOT_ASKED
from .source_model import check_source, source_path
from .texts import check_text_name, named_text, recorded_name

DEFAULT_TEXT = "wikitext2"
# `self` for evaluation draws from another seed than calibration does: text that calibration never saw.
SELF_SEED = 1_000_003
# Windows that the model writes, and tokens of each
WRITTEN, LONGEST_WRITTEN = 64, 512


def evaluation_tokens(
    text: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int = 0,
    progress: Progress | None = None,
    window: int | None = None,
    completions_only: bool = False,
) -> tuple[torch.Tensor, str]:
    """(int64 tokens, name) of a text to evaluate on: "self", or as for `texts.named_text`.

    What the model writes itself is as long as the windows that it will be read in, where that is said, at most
    `LONGEST_WRITTEN`: what a model trained on short windows writes beyond them is no text. With `completions_only` the
    tokens outside completions are marked, as `calibration.tokenize` does it.

    Raises:
        TacoError: unreadable text, no tokenizer, or one that does not fit the model.
    """
    if text == "self":
        with (progress or Silent()).step("text that the model writes") as report:
            length = min(window or context_length(model), LONGEST_WRITTEN)
            windows = sample_from_model(model, WRITTEN, length, seed + SELF_SEED, progress=report)
        return windows.flatten(), "self"
    check_text_name(text)
    if tokenizer is None:
        raise TacoError("The model has no tokenizer; a text cannot be evaluated.")
    found = named_text(text, tokenizer, test=True, completions=completions_only)
    tokens = tokenize(found.text, tokenizer, found.completions)
    check_vocabulary(tokens, model)
    return tokens, recorded_name(text)


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str | None = None,
    *,
    text: str | None = None,
    against: str | None = None,
    tasks: list[str] | None = None,
    pairs: str | Path | None = None,
    limit: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    completions_only: bool = False,
) -> dict[str, Any]:
    """Perplexity, KL divergence from the dense model and task accuracies, as one JSON object.

    Args:
        model, tokenizer, name: a dense or compressed model and the directory or hub name it was loaded from.
        text: see `evaluation_tokens`; default: wikitext2, or no text where tasks or pairs are given.
        against: dense model for the KL divergence; "none" leaves it out. Default: for a compressed model the one its
            plan names, where it is found (`source_model.source_path`).
        tasks, pairs, limit: see `harness.run_tasks`.
        window, stride, max_windows: see `evaluation.perplexity`.
        completions_only: of a text of conversations, or of prompts with completions, only what a model is to write
            counts; the rest is read.

    Returns:
        ``model``, ``parameters``, ``bytes``, ``dtype``, ``device``, ``seed``, ``versions``; with a text the fields of
        `Perplexity`, ``text``, ``text_sha256`` (of the tokens; with `completions_only` of their marks too) and
        ``divergence`` (the fields of `Divergence` and ``against``), or ``divergence_missing`` with the reason; with
        tasks ``harness``.

    Raises:
        TacoError: whatever is wrong with the arguments, before long work.
    """
    progress = progress or Silent()
    asked = [task for task in tasks or [] if task]
    wants_tasks = bool(asked) or pairs is not None
    if text is None and not wants_tasks:
        text = DEFAULT_TEXT
    if limit is not None and not wants_tasks:
        raise TacoError("--limit counts documents of tasks; a text takes --max-windows.")
    of_text: dict[str, Any] = {
        "--window": window,
        "--stride": stride,
        "--max-windows": max_windows,
        "--against": against,
    }
    of_text["--completions-only"] = completions_only or None
    unused = [option for option, value in of_text.items() if value is not None]
    if text is None and unused:
        raise TacoError(f"{', '.join(unused)}: only with --text.")
    if wants_tasks:
        require_harness()
    values: dict[str, Any] = {
        "model": name,
        "parameters": parameter_count(model),
        "bytes": weight_bytes(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "versions": versions(python=True),
    }
    if text is not None:
        check_text_name(text, completions_only)
        window, stride = resolve_windows(model, window, stride, max_windows)
        dense, origin = _dense(model, name, against)
        tokens, text_name = evaluation_tokens(text, model, tokenizer, seed, progress, window, completions_only)
        digest = hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
        with progress.step("perplexity") as report:
            score = perplexity(model, tokens, window, stride, max_windows, progress=report)
        values |= {"text": text_name, "text_sha256": digest, **score.to_dict()}
        if completions_only:
            values["completions_only"] = True
        if dense is None:
            values["divergence_missing"] = origin
        else:
            with progress.step("KL divergence") as report:
                found = divergence(dense, model, tokens, window, stride, max_windows, progress=report)
            values["divergence"] = {"against": origin, **found.to_dict()}
    if wants_tasks:
        with progress.step("tasks"):
            values["harness"] = run_tasks(model, tokenizer, asked, pairs, limit, seed=seed)
    return values


def _dense(model: PreTrainedModel, name: str | None, against: str | None) -> tuple[PreTrainedModel | None, str]:
    """(dense model or None, its name or why there is none)."""
    if against == "none":
        return None, NOT_ASKED
    compressed = isinstance(model, CompressedModel)
    if against is None:
        if not compressed:
            return None, "this is a dense model; --against MODEL compares it with another one"
        if name is None:
            return (
                None,
                "it is not known which directory the model came from; --against MODEL (against=) names the dense one",
            )
        try:
            # of a model from the hub there is no file of that name
            plan = model.current_plan if isinstance(model, CompressedModel) else None
            against = source_path(plan or Plan.load(name), name)
            dense, _ = load_model(against, model.dtype, str(model.device), here=True)
            check_source(model, dense, against)
        except TacoError as error:  # also of a model that was trained on, or given other tokens: its perplexity counts
            return None, f"{error} --against MODEL compares it with one all the same."
    else:
        dense, _ = load_model(against, model.dtype, str(model.device))
        if compressed:
            check_source(model, dense, against, untouched=False)
        sizes = [embedding_weight(side).shape[0] for side in (model, dense)]
        if sizes[0] != sizes[1]:
            raise TacoError(
                f"--against {against} has {sizes[1]:,} tokens and this model {sizes[0]:,}: their predictions cannot be "
                "compared. Leave it out for the perplexity alone."
            )
    # of a local path only its last part, as in plans
    return dense, Path(against).name if Path(against).exists() else against
