"""``python -m taco_svd.lm_eval`` is lm-evaluation-harness's own command line, able to load compressed checkpoints.

    python -m taco_svd.lm_eval --model hf --model_args pretrained=DIR --tasks arc_easy,hellaswag
    python -m taco_svd.lm_eval --model hf --model_args pretrained=DIR --tasks taco_minimal_pairs \
        --metadata '{"pairs": "FILE.jsonl"}'

It imports `taco_svd`, which registers the checkpoints, and shows the harness this package's task files. Every other
way of starting the harness works as well once `taco_svd` is imported in its process.
"""

from __future__ import annotations

import sys

from .errors import TacoError
from .harness import TASKS, require_harness


def main() -> None:
    """Runs the harness on the process's arguments."""
    try:
        require_harness()
    except TacoError as error:
        print(f"taco-svd: {error}", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    evaluates = len(sys.argv) > 1 and (sys.argv[1] == "run" or sys.argv[1].startswith("-"))
    if evaluates and "--include_path" not in sys.argv and not {"-h", "--help"} & set(sys.argv):
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
