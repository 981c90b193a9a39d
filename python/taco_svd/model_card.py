"""The model card of a compressed checkpoint: the README.md that the Hugging Face hub shows."""

from __future__ import annotations

import re
from pathlib import Path

from .plan import Plan
from .structure import Structure
from .untrusted import printable

CARD_FILE = "README.md"
# What the hub takes for "organisation/model". Old names without an organisation look like those of directories.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LONGEST_NAME = 120
# Runs of layers beyond this many say less than their number.
_MOST_RUNS = 12


def write_card(directory: Path, structure: Structure, plan: Plan | None) -> None:
    """Writes the model card into a directory that has none; one that is there is somebody's.

    Args:
        structure: of the model.
        plan: how it was made, where that is known.
    """
    path = directory / CARD_FILE
    if not path.exists():
        path.write_text(model_card(structure, plan), encoding="utf-8")


def model_card(structure: Structure, plan: Plan | None) -> str:
    """The text of the card: front matter, how to load the model, what was done to it.

    Names out of plans are anybody's: they stand as code, limited and without what could end it.
    """
    source = str(plan.source.get("name") or "") if plan is not None else ""
    front = ["library_name: transformers", "tags:", "- taco-svd", "- low-rank", "- compressed"]
    if _HUB_NAME.fullmatch(source):
        front.append(f"base_model: {source}")
    return CARD.format(
        front="\n".join(front),
        source=_code(source) if source else "a language model",
        facts="\n".join(f"- {name}: {value}" for name, value in _facts(structure, plan).items()),
    )


CARD = """---
{front}
---

# A compressed language model

This is {source}, compressed by [Taco-SVD](https://arxiv.org/abs/2501.00339) with the package `taco-kernels`. It has
fewer parameters than the original model, and its outputs differ from the original's.

## Load it

Install `taco-kernels`, and import `taco_svd` before you load the model:

```python
import taco_svd  # registers compressed checkpoints with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("...")  # this directory, or its name on the hub
```

## What was compressed

{facts}

`taco_plan.json`, where it is there, has all of it: `taco-svd info` shows it.
"""


def _facts(structure: Structure, plan: Plan | None) -> dict[str, str]:
    facts: dict[str, str] = {}
    if plan is not None:
        facts["Method"] = f"`{plan.method}`"
        parameters, share = plan.result.get("parameters"), plan.result.get("share")
        if isinstance(parameters, int) and isinstance(share, (int, float)):
            facts["Parameters"] = f"{parameters:,} ({share:.1%} of the original model's)"
    facts["Layers removed"] = f"{_layers(structure.removed)} of {structure.source_layers}"
    if structure.low_rank:
        ranks = [rank for maps in structure.low_rank.values() for rank in maps.values()]
        facts["Factorised linear maps"] = f"{len(ranks)}, of rank {_range(ranks)}"
    if structure.narrow:
        facts["Narrower linear maps"] = str(sum(map(len, structure.narrow.values())))
    if structure.bridges:
        ranks = [bridge.rank for bridge in structure.bridges]
        facts["Low-rank bridges in place of removed layers"] = f"{len(ranks)}, of rank {_range(ranks)}"
    if structure.int8:
        facts["Maps with factors of 8-bit integers"] = str(sum(map(len, structure.int8.values())))
    if plan is not None and plan.calibration.get("source"):
        windows = "{samples} windows of {seq_len} tokens".format_map(
            {"samples": "?", "seq_len": "?", **plan.calibration}
        )
        only = ", of which completions alone count" if plan.calibration.get("completions_only") else ""
        facts["Calibrated on"] = f"{_code(str(plan.calibration['source']))}, {windows}{only}"
    return facts


def _layers(removed: tuple[int, ...]) -> str:
    """none; 1 (5); 4 (3, 5-7): how many layers, and which."""
    if not removed:
        return "none"
    runs: list[list[int]] = []
    for layer in removed:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    which = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{len(removed)} ({which})" if len(runs) <= _MOST_RUNS else str(len(removed))


def _range(ranks: list[int]) -> str:
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _code(text: str) -> str:
    """A name as Markdown shows it: whatever could end the code, or the line, is taken out."""
    return f"`{' '.join(printable(text).replace('`', chr(39)).split())[:_LONGEST_NAME]}`"
