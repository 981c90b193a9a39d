"""`taco-svd eval`: how good a dense or compressed model is, on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_shared import (
    Bars,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    load,
    out_console,
    print_json,
)


def evaluate(
    model: ModelArgument = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="FILE.txt or FILE.jsonl, wikitext2, ptb, c4, or self (text this model writes). Default: wikitext2; "
            "with tasks, none."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Dense model for the KL divergence, or none; default: the one a compressed model came from, if found."
        ),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, comma-separated.")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Minimal pairs as JSON lines (sentence_good, sentence_bad, UID), run through the harness."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many documents per task.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window; default: the context, at most 2048.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between window starts; default: the window (no overlap).")
    ] = None,
    completions_only: Annotated[
        bool,
        typer.Option(
            "--completions-only/--no-completions-only",
            help="Of a .jsonl text with messages, or prompt and completion: only what the model is to write counts.",
        ),
    ] = False,
    max_windows: Annotated[int | None, typer.Option(help="At most this many windows, spread over the text.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a dense or compressed model on a text, its KL divergence from the dense model, and task accuracy.

    Every value has its standard error; --json also gives the versions, seeds and settings that made it.

    Examples: taco-svd eval small --text book.txt --window 512 --stride 256;
    taco-svd eval small --tasks arc_easy,hellaswag; taco-svd eval small --pairs blimp.jsonl
    """
    from .evaluation_run import evaluate_model
    from .report import evaluation_lines

    bars = Bars(as_json)
    loaded, tokenizer = load(model, dtype, device, bars=bars)
    values = evaluate_model(
        loaded,
        tokenizer,
        model,
        text=text,
        against=against,
        tasks=[task.strip() for task in (tasks or "").split(",") if task.strip()],
        pairs=pairs,
        limit=limit,
        window=window,
        stride=stride,
        max_windows=max_windows,
        seed=seed,
        progress=bars,
        completions_only=completions_only,
    )
    if as_json:
        print_json(values)
    else:
        for line in evaluation_lines(values):
            out_console().print(line, highlight=False, markup=False)
