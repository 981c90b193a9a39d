"""What 8-bit factors are worth: their loss on the embedded model, and on this CPU their time against 16-bit factors and
against what torch has for 8-bit weights.

Loss: KL to the dense model on text that calibration never saw, of floating and of 8-bit factors; and of the dense model
with all maps of its layers in 8 bits (a scale per output), or in 4 (a scale per 32 inputs). Time: one row for each
shape, rank and number of rows: our 8-bit kernel against our bfloat16 factors, against two calls of torch's own
weight-only product (`torch._weight_int8pack_mm`), the strongest alternative with the same bytes, and against the dense
map in bfloat16 and in 8 bits. Weights come from memory; pairs take turns.

    python benchmarks/int8_factors.py --calibration ../shared/data/classics-train-sample.txt \\
        --text ../shared/data/classics-test.txt --out benchmarks/results/cpu-zen4/int8-factors.json
    python benchmarks/int8_factors.py --docs FILE.json    # writes docs/deployment.md and benchmarks/README.md
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cpu.timing import Arena, pairs_of, ratio_spread, read_cold, spread
from origin import origin
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers import PreTrainedModel
from whole_models import write_docs

from taco_kernels import dispatch, low_rank_linear, low_rank_linear_int8
from taco_kernels.low_rank_linear_int8 import low_rank_linear_int8_reference
from taco_svd import compress
from taco_svd.architectures import Architecture
from taco_svd.calibration import load_calibration
from taco_svd.checkpoint import DEFAULT_MODEL, load_model
from taco_svd.device_costs import cpu_identity
from taco_svd.devices import device_name
from taco_svd.divergence import divergence
from taco_svd.quantisation import quantise

SHAPES = ((4096, 4096), (4096, 11008))
RANKS, ROWS = (64, 256, 1024), (1, 2, 4, 8, 16, 64, 512)
NAMES = ("16-bit factors", "two 8-bit calls", "dense, 16 bit", "dense, 8 bit", "read")


# Compressions whose factors are quantised
MADE: tuple[dict[str, Any], ...] = (
    {"method": "taco", "keep": 0.8},
    {"method": "taco", "keep": 0.6},
    {"method": "paper", "layers": 4, "compression_ratio": 0.7},
    {"method": "svd", "keep": 0.8},
)
ROOT = Path(__file__).resolve().parent.parent
DOCS, ALL_POINTS = ROOT / "docs" / "deployment.md", ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- int8:begin -->", "<!-- int8:end -->"
# What docs/deployment.md shows of the points: where 8-bit factors gain, and where they lose.
SHOWN_OUT, SHOWN_RANKS, SHOWN_ROWS = 11008, (256, 1024), (1, 8)


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """A weight [out, in] as integers of so many bits with a scale for every `group` inputs of an output."""
    top = 2 ** (bits - 1) - 1
    parts = weight.reshape(weight.shape[0], -1, group)
    scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
    return ((parts / scale).round() * scale).view(weight.shape)


@torch.no_grad()
def quality(calibration: str, text: str, windows: int) -> list[dict[str, Any]]:
    """KL of floating and 8-bit factors, and of dense models in fewer bits."""
    dense, tokenizer = load_model(DEFAULT_MODEL, "float32")
    assert tokenizer is not None
    drawn = load_calibration(calibration, dense, tokenizer, 32, 256, 0, None)
    tokens = torch.tensor(tokenizer(Path(text).read_text(encoding="utf-8")).input_ids)

    def kl(model: PreTrainedModel) -> dict[str, float]:
        found = divergence(dense, model, tokens, 256, None, windows)
        return {"kl": found.kl, "kl_standard_error": found.kl_standard_error}

    rows: list[dict[str, Any]] = []
    for bits, group in ((8, 128), (4, 32)):
        plain = copy.deepcopy(dense)
        for layer in Architecture(plain).layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    size = module.in_features if bits == 8 else group
                    module.weight.copy_(rounded(module.weight, bits, size))
        rows.append({"what": f"dense, {bits} bits", **kl(plain)})
    for arguments in MADE:
        made, plan = compress(dense, tokenizer, calibration=drawn, **arguments)
        what = ", ".join(f"{key} {value}" for key, value in arguments.items() if key != "method")
        rows.append(
            {
                "what": f"{plan.method}, {what}".replace("compression_ratio", "c"),
                **kl(made),
                "8 bit": kl(quantise(made)),
            }
        )
    return rows


def documentation(values: dict[str, Any]) -> str:
    """For docs/deployment.md: the losses, and a few of the times."""
    lines = ["| | KL to the dense model | with 8-bit factors |", "|---|---|---|"]
    for row in values["quality"]:
        eight = f"{row['8 bit']['kl']:.4f}" if "8 bit" in row else "-"
        lines.append(f"| {row['what']} | {row['kl']:.4f} ± {row['kl_standard_error']:.4f} | {eight} |")
    shown = [
        point
        for point in values["points"]
        if point["out"] == SHOWN_OUT and point["rank"] in SHOWN_RANKS and point["rows"] in SHOWN_ROWS
    ]
    return "\n".join([*lines, "", times(values, shown)])


def times(values: dict[str, Any], points: list[dict[str, Any]]) -> str:
    """How much faster than the alternatives, a row for each of the points, in markdown."""
    lines = [
        "| in x out | rank | rows | us | 16-bit factors | two 8-bit calls | dense, 16 bit | dense, 8 bit | of read |",
        "|" + "---|" * 9,
    ]
    for point in points:
        cells = [f"x{point[name]['p50']:.2f}" for name in NAMES[:-1]]
        lines.append(
            f"| {point['in']} x {point['out']} | {point['rank']} | {point['rows']} "
            f"| {point['microseconds']['p50']:.0f} | {' | '.join(cells)} | {point['read']['p50']:.0%} |"
        )
    where = f"{values['device']} ({values['isa']}), {values['threads']} threads"
    told = f"How many times faster than each of the others on {where}, bfloat16, weights out of memory."
    return "\n".join([*lines, "", f"{told} *of read*: share of plain reads."])


def correct(x: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> float:
    """Relative error of the result, in Frobenius norm; nothing is timed where it is no rounding error.

    Raises:
        SystemExit: it is none.
    """
    exact = low_rank_linear_int8_reference(x.double(), *factors)
    error = float((low_rank_linear_int8(x, *factors).double() - exact).norm() / exact.norm())
    if not error <= 2 * torch.finfo(x.dtype).eps:
        raise SystemExit(f"wrong result (relative error {error:.2g}): not timed")
    return error


def measure(shape: tuple[int, int], rank: int, rows: int, arenas: dict[str, Arena], rounds: int) -> dict[str, Any]:
    inputs, outputs = shape
    floats = arenas["16 bit"].matrices((rank, inputs), (outputs, rank))
    scales = torch.full((rank,), 2.0**-7), torch.full((rank,), 2.0**-7)
    integers = [(v, scales[0], u, scales[1]) for v, u in arenas["8 bit"].matrices((rank, inputs), (outputs, rank))]
    dense = arenas["16 bit"].matrices((outputs, inputs))
    dense8 = arenas["8 bit"].matrices((outputs, inputs))
    x = torch.randn(rows, inputs).bfloat16()
    ones, halves = torch.ones(outputs, dtype=x.dtype), torch.full((rank,), 2.0**-7, dtype=x.dtype)

    def ours(k: int) -> object:
        return low_rank_linear_int8(x, *integers[k % len(integers)])

    def two_calls(k: int) -> object:
        v, _, u, _ = integers[k % len(integers)]
        return torch._weight_int8pack_mm(torch._weight_int8pack_mm(x, v, halves).mul_(halves), u, ones)

    others = {
        "16-bit factors": lambda k: low_rank_linear(x, *floats[k % len(floats)]),
        "two 8-bit calls": two_calls,
        "dense, 16 bit": lambda k: functional.linear(x, dense[k % len(dense)][0]),
        "dense, 8 bit": lambda k: torch._weight_int8pack_mm(x, dense8[k % len(dense8)][0], ones),
        "read": read_cold(arenas["8 bit"], rank * (inputs + outputs)),
    }
    found: dict[str, Any] = {"in": inputs, "out": outputs, "rank": rank, "rows": rows, "error": correct(x, integers[0])}
    for name, other in others.items():
        times = pairs_of(ours, other, rounds, seconds=2.0)
        found[name] = ratio_spread(times)
        found.setdefault("microseconds", spread(times[0]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--calibration", help="text file to calibrate on")
    parser.add_argument("--text", help="text file that calibration has not seen")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--docs", type=Path, help="a result: writes its tables into the documents, measures nothing")
    arguments = parser.parse_args()
    if arguments.docs is not None:
        values = json.loads(arguments.docs.read_text())
        write_docs(documentation(values), DOCS, BEGIN, END)
        write_docs(times(values, values["points"]), ALL_POINTS, BEGIN, END)
        return 0
    if (arguments.calibration is None) != (arguments.text is None):
        parser.error("--calibration and --text go together")
    made_with = origin()
    torch.manual_seed(0)
    arenas = {"16 bit": Arena(torch.bfloat16), "8 bit": Arena(torch.bfloat16)}
    # any bytes are integers; of these the halves of random numbers
    arenas["8 bit"].data = arenas["8 bit"].data.view(torch.int8).clamp_(-127)
    table = Table(title="8-bit factors, how many times faster (p50 of pairs); read: share of plain reads")
    for name in ("in x out", "rank", "rows", "us", *NAMES):
        table.add_column(name, justify="right")
    points = []
    with torch.inference_mode():
        for shape in SHAPES:
            for rank in RANKS:
                for rows in ROWS:
                    point = measure(shape, rank, rows, arenas, arguments.rounds)
                    points.append(point)
                    cells = [f"{point[name]['p50']:.2f}" for name in NAMES]
                    table.add_row(
                        f"{shape[0]}x{shape[1]}", str(rank), str(rows), f"{point['microseconds']['p50']:.0f}", *cells
                    )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    losses = quality(arguments.calibration, arguments.text, arguments.windows) if arguments.text else []
    for row in losses:
        print(row)
    if arguments.out is not None:
        values = {
            "device": device_name(torch.device("cpu")), "cpu": cpu_identity(), "threads": torch.get_num_threads(),
            "isa": dispatch.isa, **made_with, "points": points,
            "quality": losses,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(values, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
