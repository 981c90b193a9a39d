"""Taco-SVD for Hugging Face language models (arXiv 2501.00339).

Importing it registers compressed checkpoints with transformers: `AutoModelForCausalLM.from_pretrained(dir)` works.
"""

from .checkpoint import save_compressed
from .errors import TacoError, UnsupportedModelError
from .modeling import CompressedModel, register
from .pipeline import apply_plan, compress, make_plan
from .plan import Plan
from .structure import BridgeSpec, Structure

register()

__all__ = [
    "BridgeSpec",
    "CompressedModel",
    "Plan",
    "Structure",
    "TacoError",
    "UnsupportedModelError",
    "apply_plan",
    "compress",
    "make_plan",
    "register",
    "save_compressed",
]
