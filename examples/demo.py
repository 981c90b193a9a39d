"""`make demo`: the main job on the model inside the package, offline: compress, table, save, reload, generate.

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
WINDOW = 256  # tokens that the model was trained on at a time
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

    from taco_kernels.dispatch import library_multiplies
    from taco_svd import save_compressed
    from taco_svd.calibration import load_calibration
    from taco_svd.checkpoint import DEFAULT_MODEL, load_model
    from taco_svd.cli_shared import Bars, quiet_libraries
    from taco_svd.comparison import Measure, Setting, run_comparison
    from taco_svd.evaluation_run import evaluation_tokens
    from taco_svd.report import compare_table

    console = Console(width=None if sys.stdout.isatty() else 140)
    quiet_libraries()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    bars = Bars(False)
    console.rule("1. compress the demo model by five methods, calibrated on text it writes itself")
    slow = not library_multiplies(torch.bfloat16)
    if slow:
        console.print("This CPU has no fast bfloat16 products: the model runs in float32.")
    dense, tokenizer = load_model(DEFAULT_MODEL, dtype="float32" if slow else "auto")
    assert tokenizer is not None
    with bars.step("calibration text") as report:
        calibration = load_calibration("self", dense, tokenizer, seq_len=WINDOW, progress=report)
    tokens, name = evaluation_tokens("self", dense, tokenizer, progress=bars, window=WINDOW)
    made = {}
    result = run_comparison(
        dense,
        tokenizer,
        calibration,
        ["removal", "bridge", "svd", "paper", "taco"],
        [Setting(layers=4)],
        Measure(tokens, name, window=WINDOW, rounds=10),
        bars,
        on_model=lambda method, model, plan: made.update({method: (model, plan)}),
    )
    console.print(compare_table(result.models, "perplexity on text that the dense model writes, not the calibration's"))
    compressed, plan = made["taco"]
    directory = OUT / "classics-taco"
    save_compressed(compressed, plan, directory, tokenizer)
    console.print(
        f"taco: {plan.source['parameters']:,} -> {plan.result['parameters']:,} parameters "
        f"({plan.result['share']:.1%}: what the published method needs with 4 of 16 layers redundant), "
        f"saved to {directory.name}/"
    )
    console.rule("2. reload it in a new process and compare the logits")
    logits_file = OUT / "logits.safetensors"
    child = subprocess.run(
        [sys.executable, "-c", RELOAD, str(directory), PROMPT, str(logits_file)], capture_output=True, text=True
    )
    if child.returncode != 0:
        console.print(child.stderr, markup=False)
        return 1
    answer = json.loads(child.stdout.strip().splitlines()[-1])
    with torch.no_grad():
        here = compressed(tokenizer(PROMPT, return_tensors="pt").input_ids).logits.float()
    same = torch.equal(here, load_file(logits_file)["logits"])
    console.print(f"{answer['class']}: logits {'equal bit for bit' if same else 'DIFFER'}")
    console.rule("3. generate with the reloaded model")
    console.print(answer["text"], markup=False)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
