"""Taco-SVD for Hugging Face language models (arXiv 2501.00339)."""

from .modeling import CompressedModel, register

register()
