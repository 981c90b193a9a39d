"""`taco-svd compare`: many methods at one or several sizes, in one table and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_shared import (
    Bars,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    check_result_files,
    duration,
    errors,
    load,
    out_console,
    print_json,
    save_json,
    tell_slow_products,
)

if TYPE_CHECKING:
    from .comparison import Comparison, Setting

DEFAULT_LAYERS = 4


def _settings(keep: str | None, layers: int | None, compression_ratio: float | None) -> list[Setting]:
    from .comparison import Setting
    from .errors import TacoError

    if keep is None:
        return [Setting(None, DEFAULT_LAYERS if layers is None else layers, compression_ratio)]
    if layers is not None:
        raise TacoError("Give --keep or --layers, not both.")
    if compression_ratio is not None:
        raise TacoError("--compression-ratio goes with --layers; with --keep it follows from the budget.")
    try:
        shares = [float(part) for part in keep.split(",") if part.strip()]
    except ValueError as error:
        raise TacoError(f"--keep takes shares with commas, such as 0.9,0.8, got {keep!r}.") from error
    if not shares or not all(0 < share < 1 for share in shares):
        raise TacoError(f"--keep must be above 0 and below 1, got {keep}.")
    return [Setting(share) for share in dict.fromkeys(shares)]


def _texts(text: str) -> list[str]:
    """Names of texts; one that exists as a file with a comma in its name is one name."""
    from .errors import TacoError

    if Path(text).exists():
        return [text]
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise TacoError("--text takes the name of a text, or several with commas.")
    return names


def compare(
    model: ModelArgument = None,
    methods: Annotated[str, typer.Option(help="Comma-separated, or all.")] = "removal,bridge,svd,paper,taco",
    keep: Annotated[
        str | None, typer.Option(help="Share of all parameters that may remain; several with commas: 0.9,0.8,0.7.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of redundant layers (default 4 without --keep).")] = None,
    compression_ratio: Annotated[float | None, typer.Option(help="The paper's c.")] = None,
    calibration: Annotated[str, typer.Option(help="As for compress.")] = "self",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per calibration window.")] = None,
    text: Annotated[
        str,
        typer.Option(help="Text to evaluate on, as for eval; self: what the dense model writes. Several with commas."),
    ] = "self",
    window: Annotated[int | None, typer.Option(help="Tokens per evaluation window.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="At most this many evaluation windows.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once, for latency.")] = 1,
    prompt: Annotated[int, typer.Option(help="Prompt tokens, for latency.")] = 128,
    rounds: Annotated[int, typer.Option(help="Interleaved latency rounds; 0 leaves latency out.")] = 20,
    save: Annotated[
        Path | None, typer.Option(help="Write the JSON to this file, anew after every model; Ctrl-C keeps it.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw perplexity over parameters and over latency (PNG, SVG or PDF).")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Dense and compressed models side by side: perplexity, parameters, bytes, prefill and decode latency.

    With --keep the published low-rank methods compress all layers alike, as their papers do; with --layers and
    --compression-ratio only the redundant ones. A method that cannot handle the model is listed with its reason.

    Example: taco-svd compare --keep 0.9,0.8 --methods all --calibration train.txt --text test.txt --save all.json
    """
    from .calibration import load_calibration
    from .comparison import DECODE_STEPS, Measure, method_names, run_comparison
    from .errors import TacoError
    from .evaluation import resolve_windows
    from .evaluation_run import evaluation_tokens
    from .latency import check_lengths
    from .report import compare_plot, compare_table
    from .texts import check_text_name

    names = method_names(methods)
    settings = _settings(keep, layers, compression_ratio)
    check_result_files(save, plot)
    for name in (calibration, *_texts(text)):
        check_text_name(name)
    bars = Bars(as_json)
    dense, tokenizer = load(model, dtype, device, bars=bars)
    resolve_windows(dense, window, None, max_windows)
    if rounds:
        check_lengths(dense, batch, prompt, DECODE_STEPS, rounds)
        tell_slow_products(dense)
    read = [evaluation_tokens(name, dense, tokenizer, seed, bars, window) for name in _texts(text)]
    texts = {title: tokens for tokens, title in read}
    if len(texts) < len(_texts(text)):
        raise TacoError("--text: two files of the same name; their results could not be told apart.")
    text_name, *others = texts
    tokens = texts[text_name]
    with bars.step("calibration text") as report:
        windows = load_calibration(calibration, dense, tokenizer, samples, seq_len, seed, report)
    latest: list[Comparison] = []

    def keep_result(result: Comparison) -> None:
        latest[:] = [result]
        if save is not None:
            save_json(save, result.to_dict())
        if not as_json and result.finished:
            errors.print(f"{result.finished} of {result.total} done, about {duration(result.seconds_left)} left")

    measure = Measure(
        tokens, text_name, window, max_windows, batch, prompt, rounds, {name: texts[name] for name in others}
    )
    stopped = False
    try:
        result = run_comparison(dense, tokenizer, windows, names, settings, measure, bars, keep_result)
    except KeyboardInterrupt:
        if not latest or not latest[0].finished:
            raise
        result, stopped = latest[0], True
    if result.finished == len(result.refused) > 0:
        raise TacoError(result.refused[0]["reason"])
    if plot is not None:
        compare_plot(result.to_dict(), plot)
    if as_json:
        print_json(result.to_dict())
    else:
        count, length = windows.tokens.shape
        title = f"perplexity on {text_name}, calibrated on {windows.source} ({count} x {length} tokens)"
        out_console().print(compare_table(result.models, title))
        for refusal in result.refused:
            out_console().print(f"{refusal['model']} ({_setting(refusal['setting'])}): {refusal['reason']}")
    if stopped:
        errors.print(f"taco-svd: stopped after {result.finished} of {result.total} models; their results are kept.")
        raise typer.Exit(130)


def _setting(values: dict) -> str:
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
