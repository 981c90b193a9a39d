"""Model directories: compressed models are saved to them, dense and compressed ones loaded from them."""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checksums import write_checksums
from .devices import make_current
from .errors import TacoError, first_line
from .hub import snapshot
from .mapped import is_mapped, load_mapped, save_mapped
from .memory import free_memory
from .model_card import write_card
from .modeling import MODEL_TYPE, CompressedConfig, CompressedModel
from .output_directory import write_whole
from .plan import PLAN_FILE, Plan
from .untrusted import check_config, check_depth, check_links, check_size, check_weights

DEFAULT_MODEL = Path(__file__).parent / "data" / "classics-16l"
# From this share of the free memory on a model is better mapped than loaded.
MAPPED_SHARE = 0.4
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    """Writes a model and its tokenizer, where there is one, into a directory (see `output_directory.write_whole`)."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


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
        TacoError: see `output_directory.write_whole`; or the model is not a compressed one.
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
    names = [path.name]
    with suppress(OSError, ValueError):  # no such directory, none that may be read, a name that none can have
        names += os.listdir(path)
    if not any(name.endswith(".gguf") for name in names):
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
