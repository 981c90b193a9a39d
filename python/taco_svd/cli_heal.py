"""`taco-svd heal`: trains what stands for the removed parts against the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_shared import (
    Bars,
    DeviceOption,
    DtypeOption,
    JsonOption,
    SeedOption,
    check_dtype,
    out_console,
    print_json,
    quiet_libraries,
)


def token_count(text: str) -> int:
    """1000000, 1M, 500k, 0.5M: a number of tokens.

    Raises:
        TacoError: none of these.
    """
    from .errors import TacoError

    scale = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    try:
        count = float(text[:-1] if scale > 1 else text) * scale
        if 1 <= count < 1e15:
            return round(count)
    except ValueError:
        pass
    raise TacoError(f"--tokens must be a number of tokens such as 1M, 500k or 200000, got {text!r}.")


def heal(
    directory: Annotated[Path, typer.Argument(help="Compressed model.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    text: Annotated[
        str, typer.Option(help="FILE.txt or FILE.jsonl, wikitext2, ptb, c4, or self (text the dense model writes).")
    ],
    completions_only: Annotated[
        bool,
        typer.Option(
            "--completions-only/--no-completions-only",
            help="Of a .jsonl text with messages, or prompt and completion: only what the model is to write counts "
            "(objective logits).",
        ),
    ] = False,
    tokens: Annotated[str, typer.Option(help="Training tokens, e.g. 1M.")] = "1M",
    objective: Annotated[
        str, typer.Option(help="logits: KL to the dense model's predictions. hidden: squared error of hidden states.")
    ] = "logits",
    dense: Annotated[str | None, typer.Option(help="The dense model; default: the plan's source, if found.")] = None,
    lr: Annotated[
        float,
        typer.Option(help="Peak step of AdamW relative to the size of each factor; 0: found before the first step."),
    ] = 0.0,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; 0: as in calibration.")] = 0,
    norms: Annotated[bool, typer.Option("--norms", help="Also train the gains of the layers' norms.")] = False,
    held_out: Annotated[
        int, typer.Option(help="Windows held out, at most a tenth of all; the best parameters on them are kept.")
    ] = 64,
    evaluations: Annotated[int, typer.Option(help="How often the held-out windows are evaluated on the way.")] = 10,
    work: Annotated[Path | None, typer.Option(help="Where a killed run goes on from; default: OUT.healing.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it is a model directory.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the factors and bridges of a compressed model, and nothing else, to predict what the dense model predicts.

    A run that was stopped goes on where it was when the command is given again; the result is the same to the bit.
    The learning curve is in OUT/healing.json, and OUT/healing.png where matplotlib is installed.

    Example: taco-svd heal small --out healed --text train.txt --tokens 1M
    """
    from .healing import HealingOptions
    from .healing_run import heal_checkpoint

    check_dtype(dtype)
    quiet_libraries()
    options = HealingOptions(
        tokens=token_count(tokens),
        objective=objective,
        lr=lr,
        batch=batch,
        seq_len=seq_len,
        seed=seed,
        held_out=held_out,
        evaluations=evaluations,
        norms=norms,
        completions_only=completions_only,
    )
    record = heal_checkpoint(directory, out, text, options, dense, work, dtype, device, force, Bars(as_json))
    if as_json:
        print_json({"directory": str(out), **record})
    else:
        before, after = record["before"], record["after"]
        out_console().print(
            f"KL to the dense model on held-out {'completions' if completions_only else 'text'}: "
            f"{before['kl']:.4f} -> {after['kl']:.4f} nats per token; "
            f"loss {before['nll']:.4f} -> {after['nll']:.4f}. Kept: the factors after {after['tokens']:,} tokens. "
            f"Saved to {out}."
        )
        if not record["best_step"]:
            out_console().print(
                f"No step was better than the start on held-out text: this model is as it was. Try --lr "
                f"{record['lr'] / 3:.1g}, or more --tokens."
            )
