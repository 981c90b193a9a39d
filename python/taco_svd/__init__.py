"""Taco-SVD for Hugging Face language models (arXiv 2501.00339).

Importing it registers compressed checkpoints with transformers: `AutoModelForCausalLM.from_pretrained(dir)` works.
"""

from .errors import TacoError, UnsupportedModelError
from .modeling import CompressedModel, register
from .plan import Plan
from .structure import BridgeSpec, Structure

register()

__all__ = ["BridgeSpec", "CompressedModel", "Plan", "Structure", "TacoError", "UnsupportedModelError", "register"]
