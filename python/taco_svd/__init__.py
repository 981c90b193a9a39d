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
    from .calibration import Calibration, load_calibration
    from .checkpoint import save_compressed
    from .evaluation_run import evaluate_model
    from .export import to_dense
    from .healing import HealingOptions
    from .healing_run import heal_checkpoint
    from .options import CompressionOptions
    from .pipeline import apply_plan, compress
    from .plan import Plan
    from .planning import make_plan
    from .quantisation import quantise

register()
hook()

_LATER = {
    "Calibration": "calibration",
    "CompressionOptions": "options",
    "HealingOptions": "healing",
    "Plan": "plan",
    "apply_plan": "pipeline",
    "compress": "pipeline",
    "evaluate_model": "evaluation_run",
    "heal_checkpoint": "healing_run",
    "load_calibration": "calibration",
    "make_plan": "planning",
    "quantise": "quantisation",
    "save_compressed": "checkpoint",
    "to_dense": "export",
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
    "Calibration",
    "CompressedModel",
    "CompressionOptions",
    "HealingOptions",
    "Plan",
    "Structure",
    "TacoError",
    "UnsupportedModelError",
    "apply_plan",
    "compress",
    "evaluate_model",
    "heal_checkpoint",
    "load_calibration",
    "make_plan",
    "quantise",
    "register",
    "save_compressed",
    "to_dense",
    "with_lora_support",
]
