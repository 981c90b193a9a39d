"""Taco-SVD for Hugging Face language models (arXiv 2501.00339).

Importing it registers compressed checkpoints with transformers: `AutoModelForCausalLM.from_pretrained(dir)` works, and
so do PEFT's calls on them.
What makes compressed models is imported when it is first asked for: a server that only loads them starts sooner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adapter_hook import hook
from .errors import TacoError, UnsupportedModelError
from .modeling import CompressedModel, register
from .structure import BridgeSpec, Structure

if TYPE_CHECKING:
    from .adapters import with_lora_support
    from .checkpoint import save_compressed
    from .options import CompressionOptions
    from .pipeline import apply_plan, compress
    from .plan import Plan
    from .planning import make_plan

register()
hook()

_LATER = {
    "CompressionOptions": "options",
    "Plan": "plan",
    "apply_plan": "pipeline",
    "compress": "pipeline",
    "make_plan": "planning",
    "save_compressed": "checkpoint",
    "with_lora_support": "adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "BridgeSpec",
    "CompressedModel",
    "CompressionOptions",
    "Plan",
    "Structure",
    "TacoError",
    "UnsupportedModelError",
    "apply_plan",
    "compress",
    "make_plan",
    "register",
    "save_compressed",
    "with_lora_support",
]
