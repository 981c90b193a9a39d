"""The calibration windows that a plan was made with, to be drawn again where the plan is carried out again."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .errors import TacoError
from .plan import Plan
from .texts import NAMED_CORPORA

# The arguments of `compress` that windows are drawn by, and what a plan calls them.
DRAWN_BY = {
    "calibration": "source",
    "samples": "samples",
    "seq_len": "seq_len",
    "seed": "seed",
    "completions_only": "completions_only",
}
# Sources of which a plan has nothing but the word: documents and tokens that were given in Python.
IN_MEMORY = ("texts", "tokens")


def drawn_as_planned(plan: Plan, given: Collection[str], look: bool = True) -> dict[str, Any]:
    """What a plan says of the arguments in `DRAWN_BY` that are not `given`; those that it does not know are left out.

    A text file is looked for in the working directory: a plan keeps its name without its directories.

    Args:
        given: arguments that the user has given, which win.
        look: whether the text must be there. A run that goes on, or has its windows from another process, reads none.

    Raises:
        TacoError: the text cannot be drawn from again; the message says what to give instead.
    """
    found = {
        name: plan.calibration[key] for name, key in DRAWN_BY.items() if name not in given and key in plan.calibration
    }
    if "calibration" not in given:
        _check_source(found.get("calibration"), look)
    return found


def _check_source(source: str | None, look: bool) -> None:
    if not source:
        raise TacoError("The plan does not say what it was calibrated on; give --calibration.")
    if source in IN_MEMORY:
        raise TacoError(
            f"The plan was calibrated on {source} that were given in Python, and does not hold them; give "
            "--calibration FILE, or carry it out in Python: compress(..., plan=plan, calibration=...)."
        )
    if source == "self" or source in NAMED_CORPORA:
        return
    # a name out of a file must not walk through directories
    if Path(source).name != source or source == ".." or (look and not os.path.isfile(source)):
        raise TacoError(
            f"The plan was calibrated on the file {source[:200]!r}, which is not in the working directory; plans keep "
            "no directories. Say where it is: --calibration FILE."
        )


def draws_differ(plan: Plan, made: Plan) -> bool:
    """Whether windows that were drawn as those of `plan` came out as others: another text, tokenizer or model."""
    there, here = plan.calibration, made.calibration
    alike = all(there.get(key) == here.get(key) for key in DRAWN_BY.values())
    return alike and "sha256" in there and there["sha256"] != here["sha256"]
