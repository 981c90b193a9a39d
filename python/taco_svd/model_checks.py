"""What can be wrong with a model that is to be compressed, and how a method sees it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .architectures import Architecture, LinearSite
from .arguments import check_given_model
from .errors import TacoError, UnsupportedModelError, first_line
from .experts import names_experts, opened
from .factorise import check_ranks
from .gathering import is_scattered
from .mapped import WeightSums, first_not_finite, weight_sums
from .methods import METHODS
from .modeling import CompressedModel
from .plan import Plan
from .suffix import SuffixRunner


def check_model(model: PreTrainedModel) -> Architecture:
    """Everything that can be wrong with a model, found before any long work.

    Raises:
        UnsupportedModelError: its structure.
        TacoError: already compressed, weights that are not finite, or a forward that does not run.
    """
    architecture = check_structure(model)
    check_weights(architecture, weight_sums(model))
    return architecture


def check_structure(model: PreTrainedModel) -> Architecture:
    """What can be told without reading the weights."""
    check_given_model(model)
    refuse_compressed(model)
    if is_scattered(model):
        raise TacoError(
            "The model's weights are not all here, or on several devices; compress() brings them together (plan=... "
            "carries out a plan), this does not."
        )
    architecture = Architecture(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TacoError(f"{name} has no data (meta device); load the model with its weights.")
    return architecture


def refuse_compressed(model: PreTrainedModel) -> None:
    if isinstance(model, CompressedModel):
        raise TacoError("This model is compressed already; compress the dense model it came from.")


def check_weights(architecture: Architecture, looked: list[WeightSums]) -> None:
    damaged = first_not_finite(looked)
    if damaged is not None:
        raise TacoError(f"{damaged} has NaN or infinite weights; the checkpoint is damaged.")
    _probe(architecture)


def factorisable(architecture: Architecture, method: str, experts: str, timed: bool) -> Architecture:
    """The model as a method sees it: with single experts as linear maps of their own, or whole.

    Args:
        timed: whether the budget is one of time.

    Raises:
        TacoError: single experts cannot be timed.
    """
    if not METHODS[method].opens_experts or experts == "whole" or architecture.experts_block is None:
        return architecture
    if timed:
        raise TacoError(
            "--max-latency cannot price experts that are factorised one by one: which of them run depends on the "
            "tokens. Take --experts whole, or --keep."
        )
    return Architecture(opened(architecture.model))


def _probe(architecture: Architecture) -> None:
    """Runs two tokens forward and backward: every linear map must be seen, and layers must do what is assumed.

    Only the first token has a next one to be predicted. So in the last layer nothing may come back to the second,
    unless the first one sees it: then the model predicts from what it is to predict, and no score of it means anything.
    """
    tokens = torch.zeros((1, 2), dtype=torch.int64)
    sees_later = False

    def look(site: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
        nonlocal sees_later
        rows = gradient.reshape(-1, gradient.shape[-1])
        # an overflow gives NaN everywhere, and is named where it is found
        sees_later |= len(rows) == 2 and bool((rows[1].isfinite() & (rows[1] != 0)).any())

    try:
        runner = SuffixRunner(architecture, tokens, len(architecture.layers) - 1)
        runner.backward(architecture.sites([len(architecture.layers) - 1]), look)
    except Exception as error:
        raise TacoError(
            f"{type(architecture.model).__name__}: a trial run of two tokens failed "
            f"({type(error).__name__}: {first_line(error)}); the model cannot be handled."
        ) from error
    if sees_later:
        raise UnsupportedModelError(
            f"{type(architecture.model).__name__}: tokens see those that come after them, so it is no causal language "
            "model; one of BERT's kind becomes one by is_decoder=True in its config.json."
        )


def fitting(architecture: Architecture, plan: Plan) -> Architecture:
    """What a plan's structure names: the model, with its experts opened where the plan factorises them one by one.

    Raises:
        TacoError: the plan is for another model.
    """
    depth = len(architecture.layers)
    if plan.structure.source_layers != depth:
        raise TacoError(f"The plan is for a model of {plan.structure.source_layers} layers, this one has {depth}.")
    if names_experts(plan.structure):
        architecture = Architecture(opened(architecture.model))
    check_ranks(architecture, plan.structure)
    return architecture
