"""Models whose weights stay in their files: mapped into memory, read when a layer runs, given back afterwards.

The system keeps of a mapped file what fits and drops the rest, so a model may be larger than memory; `page_out` tells
it what will not be needed soon. Nothing else has to know: a mapped parameter is an ordinary tensor.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .errors import TacoError, first_line
from .untrusted import INDEX_FILE, WEIGHTS_FILE, weight_files

# Numbers that are looked at at once.
BLOCK = 1 << 22
# <linux/mman.h>: give pages back to the system; a written page is never lost by it
MADV_PAGEOUT = 21


def load_mapped(directory: str | Path, dtype: str | torch.dtype = "auto") -> PreTrainedModel | None:
    """A dense model on the CPU whose parameters are mapped from the safetensors files of `directory`.

    None where that is not possible, and the model must be loaded the ordinary way: no safetensors, another dtype than
    the stored one, or a checkpoint whose tensors transformers converts while loading.

    Raises:
        TacoError: the files are damaged, or weights are missing or of another shape.
    """
    directory = Path(directory)
    if not (directory / WEIGHTS_FILE).exists() and not (directory / INDEX_FILE).exists():
        return None
    files, _ = weight_files(directory)
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    stored[key] = opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise TacoError(f"{file} cannot be read ({first_line(error)}); copy it again.") from error
    dtypes = {tensor.dtype for tensor in stored.values()}
    wanted = next(iter(dtypes)) if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if dtypes != {wanted}:
        return None
    model = model_of(stored, AutoConfig.from_pretrained(directory), wanted, str(directory))
    if model is not None and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def model_of(
    stored: Mapping[str, torch.Tensor], config: PreTrainedConfig, wanted: torch.dtype, name: str
) -> PreTrainedModel | None:
    """The model that `config` describes, with `stored` as its parameters, as they are and where they are.

    None where these are not all of its parameters under its own names. `name` is what the model is called, and what
    an error says.

    Raises:
        TacoError: a tensor has another shape than the config describes.
    """
    with _parameters_without_data():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=wanted)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    names = dict(model.named_parameters(remove_duplicate=False))
    if not set(stored) <= set(names):
        return None  # named or shaped otherwise than the model's own: transformers knows how
    if any(key not in stored and key not in tied for key in names):
        return None  # the ordinary way says what is missing, and of which file
    for key, tensor in stored.items():
        if tensor.shape != names[key].shape:
            raise TacoError(
                f"{name}: {key} is {tuple(tensor.shape)} in its file, the config describes "
                f"{tuple(names[key].shape)}; the checkpoint is damaged."
            )
        owner, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    model.tie_weights()
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    model.config._name_or_path = name
    model.taco_mapped = True  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.register_forward_hook(_page_out_after)
    return model.eval()


def save_mapped(model: PreTrainedModel, directory: Path, max_shard_size: int | str = "1GB") -> None:
    """As ``model.save_pretrained(directory)``, with at most a shard in memory.

    For models whose parameters have the names of their checkpoint, as `load_mapped` makes them.
    """
    tensors = {**dict(model.named_parameters()), **lasting_buffers(model)}
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].detach().contiguous() for name in names}, directory / file, {"format": "pt"})
        for name in names:
            page_out_tensor(tensors[name])
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def lasting_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong into a checkpoint, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


@contextmanager
def _parameters_without_data() -> Iterator[None]:
    """While open, new parameters have shapes and no data; buffers (rotary frequencies) are made as always."""
    register = nn.Module.register_parameter

    def without_data(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_data  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found: Callable[[int, int, int], int] = madvise
    return found


_held = 0


@contextmanager
def held() -> Iterator[None]:
    """While open, layers keep their pages when they have run: the caller runs them again, and calls `page_out`."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1


def _page_out_after(layer: nn.Module, _: object, __: object) -> None:
    """A whole forward pass must not leave the whole model in memory."""
    if not _held:
        page_out(layer)


def page_out(module: nn.Module) -> None:
    """Gives the pages of a module's CPU parameters back to the system; they are read again when they are used.

    Only mapped files are affected (and, where there is swap, anything else); contents never change. Does nothing
    where the system has no such call.
    """
    for parameter in module.parameters():
        page_out_tensor(parameter)


def page_out_tensor(tensor: torch.Tensor) -> None:
    """As `page_out`, for one tensor."""
    madvise = _advise()
    if madvise is None or not hasattr(os, "sysconf") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if end > start:
        madvise(start, end - start, MADV_PAGEOUT)


@dataclass(frozen=True)
class WeightSums:
    """What one look at a parameter tells of it.

    Attributes:
        name: of the parameter.
        kind: its shape and dtype.
        sums: float64 sums of its blocks, in order; NaN and infinities come through.
    """

    name: str
    kind: str
    sums: tuple[float, ...]


def weight_sums(model: nn.Module) -> list[WeightSums]:
    """Reads each parameter once, and gives the pages of a mapped one back.

    In blocks, for torch makes a float64 copy of what it sums.
    """
    mapped, found = is_mapped(model), []
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        sums = tuple(float(block.sum(dtype=torch.float64)) for block in values.reshape(-1).split(BLOCK))
        found.append(WeightSums(name, f"{tuple(values.shape)} {values.dtype}", sums))
        if mapped:
            page_out_tensor(values)
    return found


def not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter with NaN or infinite values, None where there is none."""
    return first_not_finite(weight_sums(model))


def first_not_finite(looked: Iterable[WeightSums]) -> str | None:
    """As `not_finite`, of parameters that have been looked at."""
    return next((seen.name for seen in looked if not all(map(math.isfinite, seen.sums))), None)


def is_mapped(model: nn.Module) -> bool:
    """Whether a model was loaded by `load_mapped`, or is a structural copy of such a one."""
    return bool(getattr(model, "taco_mapped", False))
