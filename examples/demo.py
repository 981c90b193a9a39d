"""`make demo`: the main job on the model inside the package, offline: compress, save, reload, generate, table.

Everything it prints is measured in this run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

OUT = Path(__file__).resolve().parent.parent / "demo-output"
PROMPT = "The old man looked at her for a moment, and then"

# Runs in a process of its own, which knows the checkpoint only by its directory.
RELOAD = """
import sys, json, torch, transformers
transformers.logging.set_verbosity_error()
import taco_svd
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, prompt, logits_file = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory).eval()
tokenizer = AutoTokenizer.from_pretrained(directory)
ids = tokenizer(prompt, return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits.float()
from safetensors.torch import save_file
save_file({"logits": logits.contiguous()}, logits_file)
torch.manual_seed(0)
text = tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=True, temperature=0.7)[0])
print(json.dumps({"class": type(model).__name__, "text": text}))
"""


def main() -> int:
    from safetensors.torch import load_file

    from taco_svd import compress, save_compressed
    from taco_svd.checkpoint import DEFAULT_MODEL, load_model
    from taco_svd.cli_shared import Bars, quiet_libraries

    console = Console()
    quiet_libraries()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    console.rule("1. compress the demo model, calibrated on text it writes itself")
    dense, tokenizer = load_model(DEFAULT_MODEL)
    compressed, plan = compress(dense, tokenizer, layers=4, seq_len=256, progress=Bars(False))
    directory = OUT / "classics-taco"
    save_compressed(compressed, plan, directory, tokenizer)
    console.print(
        f"{plan.source['parameters']:,} -> {plan.result['parameters']:,} parameters ({plan.result['share']:.1%}: what "
        f"the published method needs with 4 of 16 layers redundant), saved to {directory.name}/"
    )
    console.rule("2. reload it in a new process and compare the logits")
    logits_file = OUT / "logits.safetensors"
    child = subprocess.run(
        [sys.executable, "-c", RELOAD, str(directory), PROMPT, str(logits_file)], capture_output=True, text=True
    )
    if child.returncode != 0:
        console.print(child.stderr)
        return 1
    answer = json.loads(child.stdout.strip().splitlines()[-1])
    assert tokenizer is not None
    with torch.no_grad():
        here = compressed(tokenizer(PROMPT, return_tensors="pt").input_ids).logits.float()
    same = torch.equal(here, load_file(logits_file)["logits"])
    console.print(f"{answer['class']}: logits {'equal bit for bit' if same else 'DIFFER'}")
    console.rule("3. generate with the reloaded model")
    console.print(answer["text"], markup=False)
    console.rule("4. dense and compressed side by side")
    table = subprocess.run(
        [sys.executable, "-m", "taco_svd", "compare", "--layers", "4", "--seq-len", "256", "--window", "256"]
    )
    console.print("The text is what the dense model writes, with another seed than the calibration text.")
    return 0 if same and table.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
