"""`taco-svd report`: one self-contained HTML page about a compressed model."""

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
    can_be_replaced,
    check_dtype,
    out_console,
    print_json,
    quiet_libraries,
)


def report(
    directory: Annotated[Path, typer.Argument(help="Compressed model.")],
    out: Annotated[Path, typer.Option(help="HTML file to write; replaced if it exists.")] = Path("report.html"),
    text: Annotated[
        str | None,
        typer.Option(help="FILE.txt or FILE.jsonl, wikitext2, ptb or c4; default: text that the dense model writes."),
    ] = None,
    dense: Annotated[str | None, typer.Option(help="The dense model; default: the plan's source, if found.")] = None,
    compare: Annotated[Path | None, typer.Option(help="What `taco-svd compare --save` wrote, as a file.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens per window; default: the comparison's, else the context, at most 2048.")
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Most windows, spread over the text; default: the comparison's, else 64.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved latency rounds; 0 leaves latency out.")] = 10,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page: importance, spectra, ranks, predicted and measured loss, drift by depth, alternatives.

    What it shows of quality and speed is measured in the same run. It loads nothing from anywhere.

    Example: taco-svd report small --text book.txt --out report.html
    """
    from .errors import TacoError
    from .html_report import check_pictures, write_page
    from .report_data import gather

    check_dtype(dtype)
    if not can_be_replaced(out):
        raise TacoError(f"--out {out} cannot be written: it must be an ordinary file in a directory that can be.")
    check_pictures()
    quiet_libraries()
    record = gather(
        directory, text, dense, compare, window, max_windows, rounds, dtype, device, seed, progress=Bars(as_json)
    )
    write_page(record, out)
    if as_json:
        print_json(record)
    else:
        out_console().print(f"Wrote {out} ({out.stat().st_size / 1e3:.0f} kB).", highlight=False, markup=False)
