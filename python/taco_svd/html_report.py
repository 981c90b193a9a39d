"""One self-contained HTML page about a compressed model: no scripts, no network, pictures inside.

`report_data.gather` measures and collects a plain record; `render` turns a record into the page. Everything that comes
from files is escaped; pictures are SVG inside image elements, where nothing in them can run.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import whole_file
from .errors import TacoError
from .methods import METHODS
from .report_files import number as finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
p.about { color: #555; margin: .3rem 0 .8rem; } p.missing { color: #8a5a00; }
table { border-collapse: collapse; margin: .6rem 0; } th, td { padding: .2rem .7rem; border-bottom: 1px solid #e5e5e5; }
th { text-align: left; font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.own { background: #fff4e5; } img { max-width: 100%; height: auto; display: block; margin: .4rem 0; }
.scroll { overflow-x: auto; }
"""


def escape(value: object) -> str:
    """Text of any origin as HTML text."""
    return html.escape(str(value), quote=True)


def number(value: Any, form: str) -> str:
    """A number as text, or a dash where there is none (plans and comparisons are files, anything can be in them)."""
    found = finite(value)
    return "-" if found is None else format(value, form)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], own: int | None = None) -> str:
    """An HTML table; cells are texts, all but the first column right-aligned; row `own` is marked."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = []
    for index, row in enumerate(rows):
        first, *rest = row
        values = f"<td>{escape(first)}</td>" + "".join(f'<td class="number">{escape(cell)}</td>' for cell in rest)
        body.append(f"<tr{' class=own' if index == own else ''}>{values}</tr>")
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(body)}</table></div>'


def picture(figure: Figure, about: str) -> str:
    from .figures import as_svg

    data = base64.b64encode(as_svg(figure)).decode()
    return f'<img alt="{escape(about)}" src="data:image/svg+xml;base64,{data}">'


def check_pictures() -> None:
    """Checks that pictures can be drawn.

    Raises:
        TacoError: matplotlib (extra ``taco-kernels[plot]``) is missing.
    """
    try:
        from . import figures  # noqa: F401
    except ImportError as error:
        raise TacoError("The report's pictures need matplotlib: pip install 'taco-kernels[plot]'.") from error


def render(record: Mapping[str, Any]) -> str:
    """The page of a record that `report_data.gather` made.

    Raises:
        TacoError: see `check_pictures`.
    """
    check_pictures()
    sections: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("Size, speed and quality", _summary),
        ("Layer importance", _importance),
        ("Rank allocation", _allocation),
        ("Spectra and kept directions", _spectra),
        ("Predicted and measured loss", _prediction),
        ("Hidden-state drift by depth", _drift),
        ("Against the alternatives", _alternatives),
        ("Healing", _healing),
        ("How it was made", _origin),
    ]
    parts = [f"<h2>{escape(title)}</h2>\n{section(record)}" for title, section in sections]
    name = escape(record["name"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing may be loaded or run, whatever slips through
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n"
        f'<p class="about">{escape(record["headline"])}</p>\n' + "\n".join(parts) + "\n</body></html>\n"
    )


def missing(reason: object) -> str:
    return f'<p class="missing">{escape(reason)}</p>'


def about(text: str) -> str:
    return f'<p class="about">{escape(text)}</p>'


# -- sections ------------------------------------------------------------------------------------------------


def _summary(record: Mapping[str, Any]) -> str:
    rows = []
    for row in record["models"]:
        latency = row.get("latency") or {}
        rows.append(
            [
                row["name"],
                number(row["parameters"], ","),
                number(row["share"], ".1%"),
                number(row["bytes"] / 1e6, ",.2f"),
                _with_error(row.get("perplexity"), row.get("standard_error"), ".3f"),
                _with_error(row.get("kl"), row.get("kl_standard_error"), ".4f"),
                number(_median(latency, "prefill", 1e3), ".2f"),
                number(_median(latency, "decode", 1e3), ".2f"),
            ]
        )
    head = ["", "parameters", "kept", "MB", "perplexity", "KL to dense", "prefill ms", "decode ms/token"]
    own = next((index for index, row in enumerate(record["models"]) if row["name"] == "this model"), None)
    parts = [table(head, rows, own)]
    if record.get("text"):
        parts.append(about(f"Text: {record['text']}. Errors are standard errors over windows. {record['timing']}"))
    parts += [missing(reason) for reason in record["missing"]]
    back = record.get("won_back")
    if back is not None:
        parts.append(
            about(
                "Of the log-perplexity that bare removal of "
                f"{'the least important' if _everywhere(record) else 'the same'} layers costs, {back:.1%} is won back."
            )
        )
    return "".join(parts)


def _importance(record: Mapping[str, Any]) -> str:
    from .figures import importance_bars

    scores = record["importance"].get("scores")
    if not _numbers(scores) or len(scores) != len(record["states"]):
        return missing("The plan has no importance scores (its layers were given, or chosen by the budget alone).")
    measure = record["importance"].get("measure")
    names = {"bi": "block influence, mean(1 - cos)", "angular": "angular distance", "greedy": "loss when removed"}
    shown = names.get(str(measure), str(measure))
    return picture(importance_bars(scores, record["states"], shown), "importance of each layer") + about(
        "By the least important layers the budget is reckoned; it is spent over all of them."
        if _everywhere(record)
        else "The least important layers are the redundant ones."
    )


def _allocation(record: Mapping[str, Any]) -> str:
    from .figures import allocation_map

    found = record["allocation"]
    cost = {(entry["layer"], entry["path"]): (entry["share"], entry["rank"]) for entry in found["low_rank"]}
    bridges = {entry["after"]: entry["rank"] for entry in found["bridges"]}
    chart = allocation_map(found["paths"], found["layers"], cost, found["removed"], bridges)
    told = "Numbers: ranks (smaller sides of narrowed matrices). Colours: share of a matrix's parameters that is kept."
    return picture(chart, "rank of every matrix") + about(told)


def _spectra(record: Mapping[str, Any]) -> str:
    from .figures import spectra

    found = record["spectra"]
    if not found["panels"]:
        return missing(found["missing"])
    lines = {
        panel["title"]: [(line["label"], line["dense"], line["found"], line["rank"]) for line in panel["lines"]]
        for panel in found["panels"]
    }
    told = (
        "Thin: singular values of the dense matrix. Thick: of what replaced it, as far as its rank goes; both relative "
    )
    told += (
        "to the dense matrix's largest (a bridge's to its own). A replacement fitted to data need not keep the largest."
    )
    return picture(spectra(lines), "spectra of replaced matrices") + about(told + f" {found.get('missing') or ''}")


def _prediction(record: Mapping[str, Any]) -> str:
    from .figures import consistency_steps, predicted_against_measured

    parts = []
    predicted, measured = record["predicted_loss"], record["measured_loss"]
    if predicted is not None and measured is not None:
        parts.append(picture(predicted_against_measured([("this model", predicted, measured)]), "predicted, measured"))
        ratio = f" ({measured / predicted:.2f} times it)" if predicted > 0 else ""
        parts.append(about(f"Predicted {predicted:.4f}, measured {measured:.4f} nats per token{ratio}."))
    else:
        parts.append(missing("The plan holds no predicted and measured loss."))
    records = record["consistency"]
    if records:
        adopted = sum(bool(entry["adopted"]) for entry in records)
        parts.append(picture(consistency_steps(records), "closed-form corrections"))
        parts.append(
            about(f"{adopted} of {len(records)} closed-form corrections lowered the held-out error and stayed.")
        )
    return "".join(parts)


def _drift(record: Mapping[str, Any]) -> str:
    from .figures import drift_by_depth

    if not record["drift"]:
        return missing(record["no_dense"] or "Not measured.")
    lines = {
        name: [(point["until"], point["relative_error"], point["cosine"]) for point in points]
        for name, points in record["drift"].items()
    }
    return picture(drift_by_depth(lines), "drift of hidden states") + about(
        f"Measured in this run on {record['text']}: behind every kept layer, against the dense model's hidden state."
    )


def _alternatives(record: Mapping[str, Any]) -> str:
    from .figures import alternatives

    rows = record["alternatives"]
    if not rows:
        return missing("No comparison given: --compare takes what `taco-svd compare --save` wrote.")
    parts = [picture(alternatives(rows, "this model"), "perplexity over size and latency")]
    cells = [
        [
            row["name"],
            number(row["parameters"], ","),
            _with_error(row["perplexity"], row.get("standard_error"), ".3f"),
            number(row.get("decode"), ".3f"),
        ]
        for row in rows
    ]
    own = next((index for index, row in enumerate(rows) if row["name"] == "this model"), None)
    parts.append(table(["", "parameters", "perplexity", "decode latency / dense"], cells, own))
    if record.get("alternatives_note"):
        parts.append(about(record["alternatives_note"]))
    return "".join(parts)


def _healing(record: Mapping[str, Any]) -> str:
    from .figures import healing_curve

    found = record["healing"]
    if not found:
        return missing("Not healed (taco-svd heal).")
    before, after = found["before"], found["after"]
    told = (
        f"{found['trained_parameters']:,} parameters trained on {found['tokens']:,} tokens of {found['text']}: "
        f"held-out KL to the dense model {before['kl']:.4f} -> {after['kl']:.4f}, "
        f"loss {before['nll']:.4f} -> {after['nll']:.4f} nats per token."
    )
    curve = found.get("curve")
    return (picture(healing_curve(curve), "healing curve") if curve else "") + about(told)


def _origin(record: Mapping[str, Any]) -> str:
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in record["origin"].items()]
    cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows)
    return f'<div class="scroll"><table>{cells}</table></div>'


# -- small things --------------------------------------------------------------------------------------------


def _everywhere(record: Mapping[str, Any]) -> bool:
    """Whether no layer in particular was compressed: taco's way, unless it was told which."""
    whole = METHODS[record["origin"]["method"]].whole_model
    return whole and bool(record["importance"].get("measure") != "given")


def _with_error(value: Any, error: Any, form: str) -> str:
    text = number(value, form)
    return text if number(error, form) == "-" or text == "-" else f"{text} ± {number(error, form)}"


def _median(latency: Any, phase: str, scale: float) -> Any:
    try:
        return latency[phase]["p50"] * scale
    except (KeyError, TypeError):
        return None


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(number(value, "f") != "-" for value in values)


def write_page(record: Mapping[str, Any], out: str | Path) -> None:
    """Writes the page beside its place and moves it there when it is whole."""
    out = Path(out)
    page = render(record)
    try:
        with whole_file(out) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise TacoError(f"{out} cannot be written: {error.strerror}.") from error
