"""Saves compressed models, never half: everything is written beside the target and renamed when it is whole."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checksums import write_checksums
from .devices import make_current
from .errors import DiskFullError, TacoError, first_line
from .hub import snapshot
from .int8_linear import Int8LowRankLinear
from .mapped import is_mapped, load_mapped, save_mapped
from .memory import free_memory
from .model_card import write_card
from .modeling import MODEL_TYPE, CompressedConfig, CompressedModel
from .plan import PLAN_FILE, Plan
from .replacement import LowRankLinear, NarrowLinear
from .store import disk_full
from .structure import Structure
from .untrusted import check_config, check_depth, check_links, check_size, check_weights

DEFAULT_MODEL = Path(__file__).parent / "data" / "classics-16l"
# From this share of the free memory on a model is better mapped than loaded.
MAPPED_SHARE = 0.4
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _partial(out: Path) -> Path:
    """The directory beside `out` that is written, and then renamed to it."""
    return out.parent / f".{out.name}.{os.getpid()}.partial"


def _nameable(out: str | Path) -> Path:
    """Raises TacoError for what cannot be the name of a directory."""
    if not isinstance(out, (str, os.PathLike)) or "\0" in str(out):
        raise TacoError(f"The output must be the name of a directory, got {out!r:.80}.")
    out = Path(out)
    try:
        for name in (out, _partial(out)):  # the second is longer
            with suppress(FileNotFoundError, NotADirectoryError):  # what is not there may yet be made
                os.lstat(name)
    except OSError as error:
        raise TacoError(f"{str(out)[:200]} cannot be written: {error.strerror}; choose another directory.") from error
    return out


def check_output(out: str | Path, force: bool = False, needed_bytes: int = 0) -> Path:
    """Refuses an output directory before any work is done for it.

    Raises:
        TacoError: it exists (and not `force`), its parent cannot be written, or the disk is too small.
    """
    out = _nameable(out)
    if out.exists() and not force:
        raise TacoError(f"{out} exists; choose another directory, or pass --force to replace it.")
    if out.exists() and not out.is_dir():
        raise TacoError(f"{out} is a file, not a directory; choose another directory.")
    if force and out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise TacoError(f"{out} is no model directory (it has no config.json); --force will not replace it.")
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TacoError(f"{parent} cannot be made: {error.strerror}.") from error
    if not os.access(parent, os.W_OK):
        raise TacoError(f"{parent} cannot be written to; choose another directory.")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise TacoError(
            f"The disk of {parent} has {free / 1e9:.2f} GB free, up to {needed_bytes / 1e9:.2f} GB are needed."
        )
    return out


def write_whole(out: str | Path, write: Callable[[Path], None], force: bool = False) -> None:
    """Calls `write` with a new directory beside `out` and renames it to `out` once it has returned.

    On any failure, Ctrl-C included, the new directory is taken away and `out` is as it was.

    Raises:
        TacoError: `out` exists and not `force`, or the disk is full.
    """
    out = check_output(out, force).resolve()  # of a link, what it leads to: that is what was checked
    partial = _partial(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        if out.exists():
            replaced = out.parent / f".{out.name}.{os.getpid()}.replaced"
            out.rename(replaced)
            try:
                partial.rename(out)
            except BaseException:
                replaced.rename(out)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if disk_full(error):
            raise DiskFullError(
                f"No space left on the disk of {out.parent}; nothing was written. Free some and run again."
            ) from error
        raise


def save_compressed(
    model: PreTrainedModel,
    plan: Plan,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes a compressed model as a checkpoint that `from_pretrained` loads after ``import taco_svd``.

    Safetensors and JSON: weights (sharded), config, generation config, tokenizer, plan; and a model card, README.md.

    Args:
        max_shard_size: of a weight file, in bytes or as text ("5GB"); default: 5 GB, of a model that is streamed from
            its files 1 GB, since one shard is in memory at a time.

    Raises:
        TacoError: see `write_whole`; or the model is not a compressed one.
    """
    if not isinstance(model, CompressedModel):
        raise TacoError(f"{type(model).__name__} is not a compressed model; use its own save_pretrained.")

    def write(directory: Path) -> None:
        write_card(directory, model.structure, plan)
        if is_mapped(model):
            save_mapped(model, directory, max_shard_size or "1GB")
            write_checksums(directory)
        else:
            model.save_pretrained(directory, max_shard_size=max_shard_size or "5GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        plan.save(directory / PLAN_FILE)

    write_whole(out, write, force)


def _about_gguf(path: Path) -> str:
    """What to do with a GGUF file, where `path` is one or a directory of them."""
    if not (path.suffix == ".gguf" or any(path.glob("*.gguf"))):
        return ""
    return (
        " GGUF files are not read: load one by transformers (AutoModelForCausalLM.from_pretrained(directory, "
        "gguf_file=..., quantization_config=GgufConfig(dequantize=True)), the tokenizer alike), save both by "
        "save_pretrained, and pass that directory."
    )


def load_model(
    name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    mapped: bool | None = False,
    here: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A dense or compressed model and its tokenizer (None where the directory has none), ready for inference.

    With `mapped` a dense model's weights stay in their files (see `mapped`); None: where they would take more than
    `MAPPED_SHARE` of the free memory. A GPU becomes the process's current one: direct calls of kernels work on that.
    A hub's name is loaded from its snapshot in the hub's cache (see `hub`), and stays the model's name; with `here`
    nothing is fetched.

    Raises:
        TacoError: no such model, unreadable files, or weights that are missing or do not fit; or it was to be mapped
            and cannot be.
    """
    path = Path(name)
    from_hub = not (os.path.exists(path) or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1)
    if not from_hub:
        if not os.path.isfile(path / "config.json"):
            raise TacoError(f"No model at {name}: there is no config.json in it.{_about_gguf(path)}")
        _check_local(path)
    elif not str(name).isascii() or not str(name).strip():
        raise TacoError(f"{str(name)!r} is neither a directory nor the name of a model on the hub.")
    try:
        if from_hub:
            path = snapshot(str(name), here)
            _check_local(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not isinstance(config, CompressedConfig):  # compressed models check themselves
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
            check_size(skeleton, check_weights(path), str(name))
        if mapped or (mapped is None and device == "cpu" and _is_large(path)):
            model = load_mapped(path, dtype) if device == "cpu" else None
            if model is not None:
                _call(model, str(name))
                return model, _tokenizer_of(path, str(name), from_hub)
            if mapped:
                raise TacoError(
                    f"{name} cannot be streamed: that takes safetensors in the dtype that is asked for, named as the "
                    "model names them, and --device cpu."
                )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        model, info = loaded
    except (TacoError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, huggingface_hub and safetensors raise many kinds
        first = first_line(error)
        what = f"There is no directory {name} here, and from the hub it" if from_hub else f"The model {name}"
        raise TacoError(f"{what} cannot be loaded: {first}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise TacoError(f"The model {name} lacks {len(missing)} weights (first: {missing[0]}); it is incomplete.")
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise TacoError(f"Device {device!r} cannot be used: {first_line(error)}") from error
    make_current(model.device)
    model.eval()
    _try_out(model, str(name))
    _call(model, str(name))
    return model, _tokenizer_of(path, str(name), from_hub)


def _call(model: PreTrainedModel, name: str) -> None:
    """Notes what the model is called: a hub model by its name there, and not by where its files are kept here."""
    model.name_or_path = model.config.name_or_path = name


def _is_large(directory: Path) -> bool:
    """Whether a model's files would take more than `MAPPED_SHARE` of the free memory."""
    size, free = sum(file.stat().st_size for file in directory.glob("*.safetensors")), free_memory()
    return free is not None and size > MAPPED_SHARE * free


@torch.no_grad()
def _try_out(model: PreTrainedModel, name: str) -> None:
    """Two tokens forward: a config can describe a model that has the right weights and cannot run.

    Raises:
        TacoError: with what went wrong.
    """
    try:
        model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device), use_cache=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # model classes trust their configs: anything can go wrong in them
        first = first_line(error)
        raise TacoError(f"The model {name} cannot run ({type(error).__name__}: {first[:300]}).") from error


def _check_local(path: Path) -> None:
    """What can be wrong with a directory before transformers reads its config.

    Raises:
        TacoError: see `untrusted`; or its model class is code inside it.
    """
    values = check_config(path)
    kind = values.get("model_type")
    if kind != MODEL_TYPE:  # a compressed one is checked as it is read
        check_depth(values, len(check_weights(path)), str(path))
    if "auto_map" in values and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        raise TacoError(
            f"{path}: its model class is code inside the checkpoint (auto_map), which is never run; only models that "
            "transformers itself knows can be loaded."
        )
    check_links(path)


def _tokenizer_of(path: Path, name: str, from_hub: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the model's directory, None where there is none.

    Raises:
        TacoError: its files are there and cannot be read, and the directory is the user's own.
    """
    # for a directory without tokenizer files transformers makes an empty tokenizer of the model's kind
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        return tokenizer
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # Rust code panics with a class of its own, which is no Exception
        if from_hub:  # a model without a tokenizer is usable on tokens
            return None
        first = first_line(error)
        raise TacoError(
            f"The tokenizer of {name} cannot be loaded ({first[:300]}); copy its files again, or take them out to use "
            "the model on tokens."
        ) from error


# What a plan's result tells of the model that was made from it; another model, made again from it, has its own.
OF_THE_MODEL = ("consistency", "drift", "measured_loss", "healing")
# ... and what, with it, was of the factors as they were made, and is not of what became of them.
OF_THE_FACTORS = (*OF_THE_MODEL, "predicted_loss", "cost_budget")


def changed_plan(plan: Plan, structure: Structure, model: PreTrainedModel, **more: Any) -> Plan:
    """The plan that stands beside `model`, whose factors are no longer those that `plan` made: its sizes, and nothing
    that was measured before.

    Args:
        more: goes into the plan's result.
    """
    parameters = parameter_count(model)
    result = {key: value for key, value in plan.result.items() if key not in OF_THE_FACTORS}
    result |= {"parameters": parameters, "bytes": weight_bytes(model), **more}
    if plan.source.get("parameters"):
        result["share"] = parameters / plan.source["parameters"]
    return dataclasses.replace(plan, structure=structure, result=result)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones counted once, and of the indices of pivoted and narrow maps."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _stored(model))


def parameter_count(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones counted once; entries of an index count, since they are stored like weights."""
    return sum(tensor.numel() for tensor in _stored(model))


def _stored(model: PreTrainedModel) -> list[torch.Tensor]:
    found: list[torch.Tensor] = list(model.parameters())
    for module in model.modules():
        index = module.index if isinstance(module, NarrowLinear) else None
        index = module.pivot if isinstance(module, (LowRankLinear, Int8LowRankLinear)) else index
        if index is not None:
            found.append(index)
    return found


def describe(directory: str | Path) -> dict[str, Any]:
    """What a compressed checkpoint is, from its JSON files alone (no weights are read): see `taco-svd info`."""
    directory = Path(directory)
    plan = Plan.load(directory)
    files = sorted(directory.glob("*.safetensors"))
    return {
        "directory": str(directory),
        "method": plan.method,
        "source": {key: value for key, value in plan.source.items() if key != "config"},
        "result": {**plan.result, "file_bytes": sum(file.stat().st_size for file in files)},
        "redundant_layers": list(plan.redundant),
        "removed_layers": list(plan.structure.removed),
        "low_rank": {str(layer): ranks for layer, ranks in sorted(plan.structure.low_rank.items())},
        "int8_factors": {str(layer): list(paths) for layer, paths in sorted(plan.structure.int8.items())},
        "bridges": plan.structure.to_dict()["bridges"],
        "compression_ratio": plan.compression_ratio,
        "importance": plan.importance,
        "calibration": plan.calibration,
        "options": plan.options,
        "versions": plan.versions,
    }
