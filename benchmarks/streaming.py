"""Memory and time of `compress --stream` on a checkpoint that is left in its files.

    python benchmarks/streaming.py --shape llama-2-7b --method bridge --layers 8
    python benchmarks/streaming.py --shape llama-3-70b --depth 5 --layers 1     # what a layer of that width costs

A checkpoint of random weights is written, one shard in memory at a time, and compressed in a process of its own whose
peak resident set is the kernel's counter (mapped pages of the checkpoint count as long as they are resident). What it
reads is checked: the saved model is loaded again, mapped, and must be finite and of the size that the plan says.

--report prints what --out's file has as a table, --docs writes it into docs/design.md as well. Rows of a cut shape are
extrapolated to the whole one: a decoder layer costs what each of those measured cost, the rest (embeddings, head) is
there once. Re-fits of wide layers (`wide_refit.py`) need more memory than the streamed model: 10 GB at 70B's width.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results" / "cpu" / "streaming.json"
DOCS = Path(__file__).resolve().parent.parent / "docs" / "design.md"
BEGIN, END = "<!-- streaming:begin -->", "<!-- streaming:end -->"


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in markdown."""
    from taco_svd.shapes import shape_config

    lines = ["| shape | method | decoder layers | weights | most resident | minutes | per layer |", "|" + "---|" * 7]
    for row in rows:
        depth, whole = row["decoder_layers"], shape_config(row["shape"]).num_hidden_layers
        minutes = row["seconds"] / 60
        lines.append(
            f"| {row['shape']} | {row['method']} | {depth} of {whole} | {row['model_bytes'] / 1e9:.1f} GB "
            f"| {row['peak_resident'] / 1e9:.2f} GB | {minutes:.0f} | {row['seconds'] / depth:.0f} s |"
        )
        if depth < whole:
            size = whole_bytes(row["shape"]) / 1e9
            lines.append(
                f"| {row['shape']} | {row['method']} | {whole}, extrapolated | {size:.0f} GB | the same "
                f"| {minutes * whole / depth:.0f} | |"
            )
    return "\n".join(lines)


def whole_bytes(shape: str) -> int:
    """Of a shape's weights in bfloat16."""
    import torch

    from taco_svd.shapes import shape_config, skeleton

    return 2 * sum(parameter.numel() for parameter in skeleton(shape_config(shape), torch.bfloat16).parameters())


def status(key: str) -> int:
    """A line of /proc/self/status in bytes (VmRSS, VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def write_checkpoint(shape: str, directory: Path, depth: int | None = None) -> None:
    """A random-weight checkpoint in bfloat16: a shard per decoder layer (`depth` of them), one for the rest."""
    import torch
    from safetensors.torch import save_file

    from taco_svd.shapes import shape_config, skeleton

    config = shape_config(shape)
    if depth is not None:
        config.num_hidden_layers = depth
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in skeleton(config, torch.bfloat16).named_parameters():
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else "rest", {})[name] = parameter.shape
    places = {}
    for number, (group, shapes) in enumerate(groups.items()):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, size in shapes.items():
            if len(size) == 1:
                tensors[name] = torch.ones(size, dtype=torch.bfloat16)
            else:
                tensors[name] = torch.empty(size, dtype=torch.bfloat16).uniform_(-1, 1, generator=generator)
                tensors[name] *= (3 / size[1]) ** 0.5
        file = f"model-{group}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def child(
    directory: Path, out: Path, method: str, layers: int, keep: float, samples: int, seq_len: int
) -> dict[str, Any]:
    import torch
    from origin import origin

    from taco_svd import compress, save_compressed
    from taco_svd.checkpoint import load_model
    from taco_svd.mapped import is_mapped, not_finite
    from taco_svd.model_size import weight_bytes

    made_with = origin()
    steps: list[dict[str, Any]] = []

    class Steps:
        @contextmanager
        def step(self, name: str) -> Iterator[Any]:
            start = time.perf_counter()
            yield lambda done, total: None
            steps.append({"step": name, "seconds": time.perf_counter() - start, "peak": status("VmHWM")})
            print(f"  {steps[-1]['seconds']:8.1f} s  peak {steps[-1]['peak'] / 1e9:.2f} GB  {name}", file=sys.stderr)

    start = time.perf_counter()
    model, _ = load_model(directory, mapped=True)
    assert is_mapped(model)
    tokens = torch.randint(3, model.config.vocab_size, (samples, seq_len), generator=torch.Generator().manual_seed(0))
    size = {"keep": keep} if keep else {"layers": layers}
    compressed, plan = compress(
        model, method=method, calibration=tokens, progress=Steps(), work_dir=out.with_name("work"), **size
    )
    with Steps().step("saving"):
        save_compressed(compressed, plan, out)
    row = {
        "method": method,
        "layers": len(plan.redundant),
        "model_bytes": weight_bytes(model),
        "compressed_bytes": plan.result["bytes"],
        "peak_resident": status("VmHWM"),
        "seconds": time.perf_counter() - start,
        "samples": samples,
        "seq_len": seq_len,
        "decoder_layers": model.config.num_hidden_layers,
        "threads": torch.get_num_threads(),
        **made_with,
        "work_directory_bytes": sum(file.stat().st_size for file in out.with_name("work").iterdir()),
        "steps": steps,
    }
    saved, _ = load_model(out)
    assert weight_bytes(saved) == row["compressed_bytes"] and not_finite(saved) is None
    return row


def main(
    shape: Annotated[str, typer.Option(help="As for taco-svd bench --shape.")] = "llama-2-7b",
    method: Annotated[str, typer.Option(help="As for taco-svd compress.")] = "bridge",
    layers: Annotated[int, typer.Option(help="Redundant layers.")] = 8,
    keep: Annotated[float, typer.Option(help="Share of the parameters, instead of --layers.")] = 0.0,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 2,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    depth: Annotated[int | None, typer.Option(help="Only so many decoder layers of the shape.")] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Where checkpoints are written; default: a temporary one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of results; default: results/cpu.")] = None,
    just_report: Annotated[
        bool, typer.Option("--report", help="Print the table of --out's file, measure nothing.")
    ] = False,
    docs: Annotated[bool, typer.Option("--docs", help="Write the table into docs/design.md as well.")] = False,
    in_child: Annotated[bool, typer.Option("--in-child", hidden=True)] = False,
) -> None:
    if in_child:
        assert scratch is not None
        print(json.dumps(child(scratch / "model", scratch / "out", method, layers, keep, samples, seq_len)))
        return
    out = out or RESULTS
    if just_report or docs:
        table = report(json.loads(out.read_text())["rows"])
        print(table)
        if docs:
            from whole_models import write_docs

            write_docs(table, DOCS, BEGIN, END)
        return
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        (folder / "model").mkdir()
        print(f"writing a checkpoint of shape {shape} to {folder}", flush=True)
        write_checkpoint(shape, folder / "model", depth)
        command = [sys.executable, __file__, "--in-child", "--scratch", str(folder), "--method", method]
        command += ["--layers", str(layers), "--keep", str(keep), "--samples", str(samples), "--seq-len", str(seq_len)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        shutil.rmtree(folder / "model")
    row = {"shape": shape, **json.loads(done.stdout.splitlines()[-1])}
    print(
        f"{shape}, {method}: {row['model_bytes'] / 1e9:.2f} GB compressed to {row['compressed_bytes'] / 1e9:.2f} GB, "
        f"at most {row['peak_resident'] / 1e9:.2f} GB resident, in {row['seconds'] / 60:.1f} minutes "
        f"({row['seconds'] / row['decoder_layers']:.1f} s per layer)"
    )
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    same = ("shape", "method", "layers", "samples", "seq_len", "decoder_layers")
    rows = [old for old in rows if any(old[key] != row[key] for key in same)]
    out.write_text(json.dumps({"rows": [*rows, row]}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
