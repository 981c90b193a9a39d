"""Finds the dense model that a compressed one came from, for whoever compares the two."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from .architectures import Architecture
from .calibration import embedding_weight
from .checkpoint import DEFAULT_MODEL, load_model
from .errors import TacoError
from .modeling import CompressedModel
from .plan import Plan


def source_path(plan: Plan, directory: str | Path) -> str:
    """Directory or hub name of the plan's dense model.

    A plan names a local model by the last part of its path only, so it is looked for beside the compressed model, in
    the working directory and in this package; a name with one slash is a hub name, which is to be looked for in the
    hub's cache on this machine only: a file must not make this package fetch what it names.

    Raises:
        TacoError: it is in none of these places.
    """
    name = str(plan.source.get("name") or "")
    # a name out of a file must not walk through directories
    if name and Path(name).name == name and name not in (".", ".."):
        for folder in (Path(directory).resolve().parent, Path.cwd(), DEFAULT_MODEL.parent):
            if (folder / name / "config.json").is_file():
                return str(folder / name)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise TacoError(
        f"The dense model that {directory} came from ({name or 'not named in its plan'}) was not found beside it; "
        "say where it is (--dense, of eval --against)."
    )


def load_source(
    compressed: PreTrainedModel,
    plan: Plan,
    directory: str | Path,
    name: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
) -> PreTrainedModel:
    """The dense model of a compressed one, from `name` or from where the plan says, checked to be that model.

    Raises:
        TacoError: not found, unreadable, or another model.
    """
    path = str(name) if name is not None else source_path(plan, directory)
    # a name out of a file fetches nothing: of the hub's models those that are here already
    dense, _ = load_model(path, dtype, device, here=name is None)
    check_source(compressed, dense, path)
    return dense


def check_source(compressed: PreTrainedModel, dense: PreTrainedModel, name: str, untouched: bool = True) -> None:
    """Refuses a model that cannot be the one that `compressed` came from.

    Args:
        untouched: whether the embeddings must be the same: no step of the method changes them, training on does.

    Raises:
        TacoError: it is compressed itself, has another shape, or other embeddings.
    """
    if not isinstance(compressed, CompressedModel):
        raise TacoError("This is not a compressed model; there is no dense model to compare it with.")
    if isinstance(dense, CompressedModel):
        raise TacoError(f"{name} is a compressed model; pass the dense model that this one came from.")
    layers = len(Architecture(dense).layers)
    if layers != compressed.structure.source_layers:
        raise TacoError(
            f"{name} has {layers} layers, the model that this one came from had {compressed.structure.source_layers}."
        )
    ours, theirs = embedding_weight(compressed), embedding_weight(dense)
    same = ours.shape == theirs.shape
    if same and untouched:
        # the coarsest of their precisions: one of them may have been stored, or loaded, in another dtype
        dtypes = [ours.dtype, theirs.dtype]
        plan = compressed.current_plan
        if plan is not None and plan.result.get("dtype") in ("bfloat16", "float16"):
            dtypes.insert(0, getattr(torch, plan.result["dtype"]))  # what it was compressed and stored in
        coarse = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
        rows = slice(0, 4096)  # the first rows tell two models apart; vocabularies can be gigabytes
        same = torch.equal(ours[rows].to(coarse).cpu(), theirs[rows].to(coarse).cpu())
    if not same:
        raise TacoError(f"{name} has other token embeddings than this model; it is not the model this one came from.")
