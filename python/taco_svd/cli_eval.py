"""`taco-svd eval`: how good a dense or compressed model is, on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .evaluation import Perplexity


def text_tokens(
    text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, bars: Bars, seed: int
) -> tuple[Any, str]:
    """Tokens of a text to evaluate on, and what to call it."""
    from .calibration import (
        NAMED_TEST_CORPORA,
        check_vocabulary,
        context_length,
        corpus_text,
        read_text,
        sample_from_model,
        tokenize,
    )
    from .errors import TacoError

    if text == "self":
        # another seed than calibration's: text that calibration never saw
        with bars.step("text that the dense model writes") as report:
            windows = sample_from_model(model, 64, min(context_length(model), 512), seed + 1_000_003, progress=report)
        return windows.flatten(), "self"
    raw = corpus_text(text, test=True) if text in NAMED_TEST_CORPORA else read_text(text)
    if tokenizer is None:
        raise TacoError("The model has no tokenizer; a text cannot be evaluated.")
    check_vocabulary(tokenizer, model)
    return tokenize(raw, tokenizer), text if text in NAMED_TEST_CORPORA else Path(text).name


def perplexity_of(model: PreTrainedModel, tokens: Any, bars: Bars, title: str, **options: Any) -> Perplexity:
    from .evaluation import perplexity

    with bars.step(title) as report:
        return perplexity(model, tokens, progress=report, **options)


def evaluate(
    model: ModelArgument = None,
    text: Annotated[str, typer.Option(help="FILE.txt, wikitext2, c4, or self (text this model writes).")] = "wikitext2",
    window: Annotated[int | None, typer.Option(help="Tokens per window; default: the context, at most 2048.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between window starts; default: the window (no overlap).")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="At most this many windows, spread over the text.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a dense or compressed model on a text, with its standard error.

    Example: taco-svd eval small --text book.txt --window 512 --stride 256
    """
    bars = Bars(as_json)
    from .evaluation import resolve_windows

    loaded, tokenizer = load(model, dtype, device)
    window, stride = resolve_windows(loaded, window, stride)
    tokens, name = text_tokens(text, loaded, tokenizer, bars, seed)
    score = perplexity_of(loaded, tokens, bars, "perplexity", window=window, stride=stride, max_windows=max_windows)
    if as_json:
        print_json({"model": model, "text": name, **score.to_dict()})
    else:
        out_console().print(
            f"perplexity {score.perplexity:.3f} ± {score.standard_error:.3f} on {name}: {score.tokens:,} tokens in "
            f"{score.windows} windows of {score.window}, stride {score.stride}"
        )
