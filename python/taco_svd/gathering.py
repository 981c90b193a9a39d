"""Brings a model together whose weights are not all here, so that it can be compressed.

Sharded over processes (DTensor parameters: FSDP2's `fully_shard`, tensor parallelism), put aside by accelerate (meta
parameters with hooks: `device_map` with CPU or disk offloading), or on several devices. The whole model may be larger
than the memory of a device or a process, so it is never put together in memory: each parameter is gathered by itself,
written to a file and mapped from there (`mapped`), which is how the layer-by-layer passes read any model that is too
large. The files are deleted as soon as they are mapped: the system keeps their contents for as long as somebody looks
at them, and a process that dies leaves nothing behind (one that is killed while it writes: one parameter).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .atomic import disk_full
from .errors import DiskFullError, TacoError
from .mapped import lasting_buffers, model_of
from .model_size import weight_bytes
from .progress import Report
from .team import Team

# A gathered model goes back to a GPU where it takes no more than this share of what is free there.
GPU_SHARE = 0.5


def is_scattered(model: nn.Module) -> bool:
    """Whether weights of a model lie in other processes, where accelerate has put them aside, or on several devices."""
    found = [(module, parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]
    if any(parameter.is_meta and not hasattr(module, "_hf_hook") for module, parameter in found):
        return False  # they are nowhere
    spread = any(parameter.is_meta or isinstance(parameter, DTensor) for _, parameter in found)
    return spread or len({parameter.device for _, parameter in found}) > 1


def gathered(
    model: PreTrainedModel, directory: str | Path | None = None, team: Team | None = None, report: Report | None = None
) -> PreTrainedModel:
    """The whole of a scattered model, with its weights mapped from files; `model` stays as it is.

    Every process of a sharded model must call this. On each machine one of the `team` writes the files, all of them map
    them. A model of GPUs goes back to this process's GPU where that has the space, and stays on the CPU otherwise.

    Args:
        directory: on a disk with space for the model, made where it is missing; default: the system's for temporary
            files.

    Raises:
        TacoError: its parameters are not those that its config describes.
        DiskFullError: there is no space for it.
    """
    team = team or Team()
    parameters = dict(model.named_parameters())  # shared ones once
    stored: dict[str, torch.Tensor] = {}
    with _shared_folder(directory, team) as (folder, writes):
        for number, name in enumerate(parameters):
            file = folder / f"{number}.safetensors"
            whole = _whole(model, name)
            failed: Exception | None = None
            if writes:
                try:
                    save_file({name: whole}, file)
                except Exception as error:
                    failed = error
            del whole
            if not team.all(failed is None):
                if failed is None or disk_full(failed):
                    raise DiskFullError(f"The weights could not be written to {folder.parent}; free some space.")
                raise failed
            with safe_open(file, framework="pt") as opened:
                stored[name] = opened.get_tensor(name)
            team.all(True)  # everybody has it
            if writes:
                file.unlink()
            if report is not None:
                report(number + 1, len(parameters))
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    made = model_of(stored, copy.deepcopy(model.config), model.dtype, name)
    if made is None:
        raise TacoError(
            f"{type(model).__name__}: its parameters are not those that its config describes, so it cannot be put "
            "together; save it whole (torch.distributed.checkpoint, save_pretrained) and compress that."
        )
    for name, buffer in lasting_buffers(model).items():
        made.get_buffer(name).copy_(buffer.full_tensor() if isinstance(buffer, DTensor) else buffer)
    if model.generation_config is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return _where_it_was(made, next(iter(parameters.values())).device, team)


def _whole(model: nn.Module, name: str) -> torch.Tensor:
    """All of one parameter, contiguous, on the CPU."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    brought = nullcontext()
    if getattr(owner, leaf).is_meta:
        from accelerate.utils import align_module_device

        brought = align_module_device(owner, torch.device("cpu"))
    with torch.no_grad(), brought:
        value = getattr(owner, leaf)
        if value.is_meta:
            raise TacoError(f"A parameter of {type(owner).__name__} has no data (meta device); load the model with it.")
        value = value.full_tensor() if isinstance(value, DTensor) else value
        plain: torch.Tensor = value.detach().cpu().contiguous()
        return plain


@contextmanager
def _shared_folder(directory: str | Path | None, team: Team) -> Iterator[tuple[Path, bool]]:
    """(a new folder that goes at the end, whether this process is the one to write) for processes that share a disk."""
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".taco-svd-weights-", dir=directory) as own:
        folders = team.gather(own)
        first = next(rank for rank, folder in enumerate(folders) if Path(folder).is_dir())
        yield Path(folders[first]), first == team.rank


def _where_it_was(model: PreTrainedModel, device: torch.device, team: Team) -> PreTrainedModel:
    fits = device.type == "cuda" and weight_bytes(model) <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    # the same everywhere: what processes sum and hand to each other must be on the same kind of device
    if team.all(fits):
        model.taco_mapped = False  # type: ignore[assignment]
        return model.to(device)  # type: ignore[arg-type]
    return model
