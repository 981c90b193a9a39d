"""Serves compressed checkpoints in vLLM: ``vllm serve DIR``, with DIR as `taco-svd compress` wrote it.

vLLM finds `register` through the entry point group ``vllm.general_plugins``, in each of its processes. How it works and
what it supports: docs/vllm.md.
"""

from __future__ import annotations

import logging

__all__ = ["register"]


def register() -> None:
    """Teaches this process's vLLM to read compressed checkpoints. Harmless when repeated.

    Never raises: vLLM calls it on every start, also where a dense model is served. If this vLLM does not fit, a warning
    says so, and vLLM refuses compressed checkpoints, since it then knows no such architecture.
    """
    try:
        from .registration import register as register_all

        register_all()
    except Exception as error:
        import vllm

        logging.getLogger("vllm.taco_svd").warning(
            "taco-kernels does not fit vLLM %s (%s: %s); Taco-SVD checkpoints cannot be served.",
            getattr(vllm, "__version__", "?"),
            type(error).__name__,
            error,
        )
