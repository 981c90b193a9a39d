"""Zero-shot tasks through EleutherAI's lm-evaluation-harness (extra ``taco-kernels[eval]``), on a loaded model.

The harness scores; nothing is scored here. What is added: compressed models, minimal pairs from a local file, and
results with confidence intervals, versions and seeds.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration import needed_begin_token
from .errors import TacoError, first_line

# Task files of this package, for the harness's `include_path`.
TASKS = Path(__file__).parent / "lm_eval_tasks"
PAIRS_TASK = "taco_minimal_pairs"
# Normal quantile of a two-sided 95% interval.
Z95 = 1.959963984540054


def require_harness() -> None:
    """Checks that lm-evaluation-harness can be imported.

    Raises:
        TacoError: lm-evaluation-harness is not installed.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.models import huggingface  # noqa: F401 - newer ones import what they need only here
    except ImportError as error:
        raise TacoError(
            f"Tasks are run by lm-evaluation-harness, which cannot be imported ({error}): "
            "pip install 'taco-kernels[eval]'."
        ) from error


def read_pairs(path: str | Path | None) -> list[dict[str, str]]:
    """Minimal pairs of a JSON-lines file: dicts of sentence_good, sentence_bad and UID ("" where there is none).

    Raises:
        TacoError: no file given, unreadable, empty, or a line without both sentences.
    """
    if path is None:
        raise TacoError('The task taco_minimal_pairs needs a file: --metadata \'{"pairs": "FILE.jsonl"}\'.')
    try:
        # a sentence may hold what ends lines elsewhere (U+2028), and a file may begin with a mark
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TacoError(f"{path} cannot be read as minimal pairs ({error}).") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            good, bad = pair["sentence_good"], pair["sentence_bad"]
        except (ValueError, KeyError, TypeError) as error:
            raise TacoError(
                f"{path}, line {number}: expected a JSON object with sentence_good and sentence_bad."
            ) from error
        if not isinstance(good, str) or not isinstance(bad, str) or not good or not bad:
            raise TacoError(f"{path}, line {number}: sentence_good and sentence_bad must be texts.")
        found.append({"sentence_good": good, "sentence_bad": bad, "UID": str(pair.get("UID", ""))})
    if not found:
        raise TacoError(f"{path} has no minimal pairs.")
    return found


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: list[str],
    pairs: str | Path | None = None,
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs harness tasks on a model that is loaded already.

    Args:
        tasks: names that the harness knows.
        pairs: file of minimal pairs; adds the task `taco_minimal_pairs`, reported per phenomenon too.
        limit: at most this many documents per task.
        batch: sequences at once.
        seed: of few-shot draws and of everything else that the harness draws.

    Returns:
        ``{"tasks": {name: {metric: {value, standard_error, low, high}}}, "phenomena": {UID: {value, count}},
        "correct": [bool per pair, in the file's order], "limit", "seed", "versions"}``; `low` and `high` are the 95%
        interval; phenomena and correct are there with `pairs` only.

    Raises:
        TacoError: the harness is missing, has no such task, or fails; no tokenizer; unreadable pairs.
    """
    require_harness()
    if tokenizer is None:
        raise TacoError("The model has no tokenizer; harness tasks cannot be run.")
    names = list(dict.fromkeys(tasks))
    if pairs is not None:
        read_pairs(pairs)
        names = list(dict.fromkeys([*names, PAIRS_TASK]))
    if not names:
        raise TacoError("No task given.")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(
        include_path=str(TASKS),
        # the harness reads all of its thousands of task files otherwise, which takes longer than a small model's run
        include_defaults=names != [PAIRS_TASK],
        metadata={"pairs": str(pairs)} if pairs is not None else None,
    )
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise TacoError(f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them.")
    # what the harness does for such models itself, where it knows them: a compressed model's type is our own
    begins = {} if needed_begin_token(model) is None else {"add_bos_token": True}
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, **begins)
    try:
        results = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=names,
            limit=limit,
            task_manager=manager,
            log_samples=pairs is not None,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except TacoError:
        raise
    except Exception as error:  # tasks are other people's code: network, data sets, formats
        first = first_line(error)
        raise TacoError(f"lm-evaluation-harness failed ({type(error).__name__}: {first}).") from error
    assert results is not None
    values: dict[str, Any] = {"tasks": {name: _metrics(found) for name, found in results["results"].items()}}
    if pairs is not None:
        values.update(_phenomena(results["samples"][PAIRS_TASK]))
    values |= {"limit": limit, "seed": seed, "versions": _versions()}
    return values


def _metrics(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{metric: value with its interval} of one task; the harness's keys are ``"acc,none"``, ``"acc_stderr,none"``."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = found.get(f"{metric}_stderr,{filtered}")
        error = float(error) if isinstance(error, (int, float)) else None
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        spread = None if error is None else Z95 * error
        metrics[name] = {
            "value": float(value),
            "standard_error": error,
            "low": None if spread is None else value - spread,
            "high": None if spread is None else value + spread,
        }
    return metrics


def _phenomena(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy per UID, and which pairs were right (for paired comparisons of two models)."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    correct = [bool(sample["acc"]) for sample in ordered]
    groups: dict[str, list[bool]] = {}
    for sample, right in zip(ordered, correct, strict=True):
        groups.setdefault(sample["doc"]["UID"], []).append(right)
    phenomena = {uid: {"value": sum(rights) / len(rights), "count": len(rights)} for uid, rights in groups.items()}
    return {"phenomena": dict(sorted(phenomena.items())), "correct": correct}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"lm_eval": version("lm_eval"), "datasets": version("datasets")}
