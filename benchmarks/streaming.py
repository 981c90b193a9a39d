"""Memory and time of `compress --stream` on a checkpoint that is left in its files.

    python benchmarks/streaming.py --shape llama-2-7b --method bridge --layers 8
    python benchmarks/streaming.py --shape llama-3-70b --depth 5 --layers 1     # what a layer of that width costs

A checkpoint of random weights is written, one shard in memory at a time, and compressed in a process of its own whose
peak resident set is the kernel's counter (mapped pages of the checkpoint count as long as they are resident). What it
reads is checked: the saved model is loaded again, mapped, and must be finite and of the size that the plan says.
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

    from taco_svd import compress, save_compressed
    from taco_svd.checkpoint import load_model, weight_bytes
    from taco_svd.mapped import is_mapped, not_finite

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
        "torch": str(torch.__version__),
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
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    in_child: Annotated[bool, typer.Option("--in-child", hidden=True)] = False,
) -> None:
    if in_child:
        assert scratch is not None
        print(json.dumps(child(scratch / "model", scratch / "out", method, layers, keep, samples, seq_len)))
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
    if out:
        rows = json.loads(out.read_text())["rows"] if out.is_file() else []
        same = ("shape", "method", "layers", "samples", "seq_len", "decoder_layers")
        rows = [old for old in rows if any(old[key] != row[key] for key in same)]
        out.write_text(json.dumps({"rows": [*rows, row]}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
