"""Heals a checkpoint: from a compressed directory and a text to a healed directory, through a resumable run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .calibration import context_length
from .checkpoint import load_model, write_model
from .errors import TacoError
from .healing import HealingOptions, heal, trainable_names
from .healing_files import HealingFiles, healing_windows
from .output_directory import check_output, write_whole
from .plan import PLAN_FILE, Plan, versions
from .progress import Progress, Silent
from .source_model import load_source
from .texts import check_text_name
from .work_directory import check_apart, check_can_be_made

CURVE_FILE = "healing.json"
CURVE_PICTURE = "healing.png"


def heal_checkpoint(
    directory: str | Path,
    out: str | Path,
    text: str,
    options: HealingOptions | None = None,
    dense: str | Path | None = None,
    work: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains what stands for the removed parts of a compressed checkpoint, and writes the result as a new one.

    Given again after it was stopped or killed, it goes on from the last state in the work directory, to the same bits
    (on one machine, with one number of threads).

    Args:
        directory, out: compressed checkpoint to heal, and where the healed one goes.
        text: a file, "wikitext2", "c4", or "self" (text that the dense model writes).
        dense: the dense model; default: the plan's source where it is found (`source_model.source_path`).
        work: where the run keeps its state; default: beside `out`; taken away when `out` is written.
        dtype: of the frozen weights and the arithmetic; factors are always trained in float32.

    Returns:
        The record that goes into the plan's `result["healing"]`, with the curve and the versions; also `healing.json`
        in `out` (and `healing.png` where matplotlib is installed).

    Raises:
        TacoError: anything wrong with arguments and files, before long work; divergence.
    """
    progress = progress or Silent()
    options = options or HealingOptions()
    out = check_output(out, force).resolve()
    work = Path(work) if work else out.with_name(out.name + ".healing")
    check_apart(work, out, "--work")
    check_can_be_made(work, "--work")
    check_text_name(text, options.completions_only)
    plan = Plan.load(directory)
    student, tokenizer = load_model(directory, dtype, device)
    limit = context_length(student)
    if not options.seq_len:
        options = dataclasses.replace(options, seq_len=min(int(plan.calibration.get("seq_len") or 512), limit))
    if options.seq_len > limit:
        raise TacoError(f"--seq-len {options.seq_len} is longer than the model's context of {limit} tokens.")
    trainable_names(student, options.norms)
    teacher = load_source(student, plan, directory, dense, dtype, device)
    files = HealingFiles(work, options, student, teacher, text)
    windows = files.windows()
    if windows is None:
        with progress.step("training text") as report:
            windows = healing_windows(text, teacher, tokenizer, options, report)
        files.begin(*windows)
    # what is saved is the checkpoint as it is stored, with nothing but the trained parameters changed
    final, _ = load_model(directory, "auto", "cpu")
    try:
        with progress.step("healing") as report:
            state = heal(student, teacher, *windows, options, final.dtype, files.state(), files.keep, report)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the same command goes on with what is in {files.path}.") from stop
    files.write(state)
    parameters = dict(final.named_parameters())
    for name, tensor in state.best.items():
        parameters[name].data.copy_(tensor)
    record: dict[str, Any] = {
        **options.to_dict(),
        "lr": state.lr,
        "text": files.identity["text"],
        "windows": len(windows[0]),
        "held_out_windows": len(windows[1]),
        "trained_parameters": sum(tensor.numel() for tensor in state.best.values()),
        "best_step": state.best_step,
        "before": state.curve[0],
        "after": next(point for point in state.curve if point["step"] == state.best_step),
    }
    details = {**record, "curve": state.curve, "versions": versions(python=True)}

    def write(path: Path) -> None:
        write_model(final, tokenizer, path)
        dataclasses.replace(plan, result={**plan.result, "healing": record}).save(path / PLAN_FILE)
        (path / CURVE_FILE).write_text(json.dumps(details, indent=2) + "\n", encoding="utf-8")
        _draw(state.curve, path / CURVE_PICTURE)

    write_whole(out, write, force)
    files.remove()
    return details


def _draw(curve: list[dict[str, Any]], path: Path) -> None:
    try:
        from .figures import healing_curve
    except ImportError:  # matplotlib is an extra
        return
    healing_curve(curve).savefig(path, dpi=120)
