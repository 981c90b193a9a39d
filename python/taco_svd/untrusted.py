"""Reads the files of a checkpoint as what they are: bytes that anybody may have written.

Checked before transformers sees them: no file outside the directory, no pickle, no code, JSON without tricks, shards
that are whole and hold what the index says, and no model much larger than its files. SECURITY.md has the whole list.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import TacoError, first_line

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
# What configs and tokenizers are read from, and chat templates in a directory of theirs.
READ_AS_TEXT = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe")
TEMPLATES = "chat_templates"
# An index of the largest published models has a few megabytes.
MAX_JSON_BYTES = 64 << 20
MAX_JSON_DEPTH = 64
# Buffers that no file holds (rotary tables, causal masks) are small; a config can ask for any size.
MAX_BUFFER_BYTES = 1 << 28
# For every label that a config counts, transformers makes entries in two dictionaries as soon as it reads it.
MAX_LABELS = 1 << 20
# A quantiser packs several weights into one stored number: at most 16, of two bits into an int32.
PACKING = 16


class Shapes(dict[str, tuple[int, ...]]):
    """Names and shapes of the tensors in a checkpoint's files.

    Attributes:
        integers: the names of those that hold integers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.integers: set[str] = set()


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")


def printable(text: str) -> str:
    """A text of anybody's for a terminal: whatever could steer that, or is no text, stands as an escape."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


# -- JSON --------------------------------------------------------------------------------------------------------


def parse_json(text: str, name: str, constants: bool = False, controls: bool = False) -> Any:
    """A JSON value without duplicate keys, control characters, unpaired surrogates or deep nesting.

    Args:
        name: what to call the text in messages.
        constants: whether NaN and infinities, which are not JSON but which other libraries write, may stand in it.
        controls: whether control characters may stand in its texts, which then must not be shown to anybody.

    Raises:
        TacoError: saying what is wrong.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise ValueError(f"the key {twice[:80]!r} stands in one object twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value) and not constants:
            raise ValueError(f"{digits[:40]} is beyond the range of numbers")
        return value

    try:
        options: dict[str, Any] = {} if constants else {"parse_constant": refuse}
        value = json.loads(text, object_pairs_hook=once, parse_float=number, **options)
        _check_strings(value, _SURROGATE if controls else _CONTROL)
    except RecursionError as error:
        raise TacoError(f"{name} is nested too deeply to be read.") from error
    except ValueError as error:
        raise TacoError(f"{name} is not readable as JSON ({error}).") from error
    return value


def _check_strings(value: Any, refused: re.Pattern[str], depth: int = 0) -> None:
    """What ends up on a terminal or in a page must not steer it."""
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    if isinstance(value, str):
        if refused.search(value):
            raise ValueError(f"a text holds control characters: {value[:40]!a}")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key, refused, depth)
            _check_strings(item, refused, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, refused, depth + 1)


def read_json(path: Path, constants: bool = False) -> Any:
    """`parse_json` of a regular UTF-8 file of bounded size.

    Raises:
        TacoError: missing, not a regular file, too large, not UTF-8, or not such JSON.
        FileNotFoundError: there is no such file.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise TacoError(f"{path} is not a regular file.")
        if found.st_size > MAX_JSON_BYTES:
            raise TacoError(f"{path} has {found.st_size / 1e6:.0f} MB; no such file is that large, it is damaged.")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise TacoError(f"{path} is not UTF-8 text (byte {error.start}); it is damaged.") from error
    except (OSError, ValueError) as error:
        raise TacoError(f"{path} cannot be read ({error}).") from error
    return parse_json(text, str(path), constants)


# -- files -------------------------------------------------------------------------------------------------------


def check_contained(directory: Path, name: str) -> Path:
    """The file `name` of a checkpoint, which must lie in its directory.

    Symbolic links may lead to where the Hugging Face cache keeps the files of a snapshot, and nowhere else.

    Raises:
        TacoError: a path instead of a name, or a link that leads out.
    """
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise TacoError(f"{directory} names a file outside itself ({name[:200]!r}); it is not used.")
    path = directory / name
    _check_target(directory, path)
    return path


def _check_target(directory: Path, path: Path) -> None:
    """Raises a `TacoError` where a file of a checkpoint is a link out of it, see `check_contained`."""
    if not path.is_symlink():
        return
    home = directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise TacoError(f"{path} is a link to {target}, outside the checkpoint; put the file itself there.")


def check_links(directory: Path) -> None:
    """Refuses symbolic links out of a checkpoint among the files that a tokenizer or a config may be read from.

    What a tokenizer reads it also writes, wherever the model is saved.

    Raises:
        TacoError: see `check_contained`.
    """
    for entry in sorted(directory.iterdir()):
        if entry.suffix in READ_AS_TEXT:
            check_contained(directory, entry.name)
    templates = directory / TEMPLATES
    if templates.is_symlink():
        raise TacoError(f"{templates} is a link; put the directory itself there.")
    if templates.is_dir():
        for entry in sorted(templates.iterdir()):
            _check_target(directory, entry)


def check_config(directory: Path) -> dict[str, Any]:
    """The config of a checkpoint, if nothing in it would run code or read other files.

    Raises:
        TacoError: unreadable, or it asks for code or files from elsewhere.
    """
    path = check_contained(directory, CONFIG_FILE)
    try:
        values = read_json(path, constants=True)
    except FileNotFoundError as error:
        raise TacoError(f"No model at {directory}: there is no {CONFIG_FILE} in it.") from error
    if not isinstance(values, dict):
        raise TacoError(f"{path} is not a JSON object; the checkpoint is damaged.")
    refuse_foreign_code(values, str(path))
    check_labels(values, str(path))
    return values


def refuse_foreign_code(values: Any, name: str) -> None:
    """Refuses what makes transformers fetch and run kernels, or read weights, that a config file chose.

    Raises:
        TacoError: naming the field.
    """
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        # "organisation/repository" is a kernel on the hub: transformers downloads and runs it
        if key.endswith(("attn_implementation", "experts_implementation")) and not (
            value is None or (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]+", value))
        ):
            raise TacoError(f"{name}: {key} asks for a kernel from elsewhere ({str(value)[:80]!r}); take it out.")
        if key == "transformers_weights" and value is not None:
            raise TacoError(f"{name}: transformers_weights names a file of its own; take it out.")
        if isinstance(value, dict):
            refuse_foreign_code(value, name)


def check_labels(values: Any, name: str) -> None:
    """Refuses a config, or one inside it, that counts more labels than any classifier has.

    Raises:
        TacoError: naming the field.
    """
    if not isinstance(values, dict):
        return
    count = values.get("num_labels")
    if isinstance(count, (int, float)) and count > MAX_LABELS:
        raise TacoError(f"{name}: num_labels is {str(count)[:40]}, more than {MAX_LABELS}; it is damaged.")
    for value in values.values():
        check_labels(value, name)


def weight_files(directory: Path, variant: str | None = None) -> tuple[list[Path], dict[str, str] | None]:
    """(weight files, index {tensor: file name} or None) of a checkpoint; all safetensors, all inside it.

    `variant`: as transformers has it, a word before the file names' last one, model.fp16.safetensors.

    Raises:
        TacoError: there are none, they are pickles, or the index is not to be trusted.
    """
    one_file, index_file = WEIGHTS_FILE, INDEX_FILE
    if variant is not None:
        one_file, index_file = (f".{variant}.".join(name.rsplit(".", 1)) for name in (WEIGHTS_FILE, INDEX_FILE))
    if (directory / one_file).exists():
        whole = check_contained(directory, one_file)
        check_regular(whole, "safetensors file")
        return [whole], None
    if not (directory / index_file).exists():
        pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise TacoError(
                f"{directory} holds its weights as {pickles[0]}, a format that can run code when it is opened. Only "
                "safetensors are read: convert it where you trust it (load there, save_pretrained)."
            )
        raise TacoError(f"{directory} has no weights: neither {one_file} nor {index_file}.")
    path = check_contained(directory, index_file)
    index = read_index(path)
    files = []
    for name in sorted(set(index.values())):
        file = check_contained(directory, name)
        if file.suffix != ".safetensors":
            raise TacoError(f"{path} names {name!r}, which is not a safetensors file.")
        if not file.is_file():
            raise TacoError(f"{path} names {name!r}, which is not there; the checkpoint is incomplete. Copy it again.")
        files.append(file)
    return files, index


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file name} of a checkpoint in several files, as its index says; nothing is known of the files.

    Raises:
        TacoError: it is not to be trusted.
    """
    values = read_json(path)
    index = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise TacoError(f"{path} has no `weight_map` from weights to files; it is damaged.")
    if not isinstance(values.get("metadata"), dict):
        raise TacoError(f"{path} has no `metadata`; it is damaged.")
    return index


def check_headers(files: list[Path], index: dict[str, str] | None) -> Shapes:
    """Shapes of all tensors of a checkpoint, from the headers of its files.

    Raises:
        TacoError: a file is no whole safetensors file, or holds other tensors than the index says.
    """
    found: dict[str, str] = {}
    shapes = Shapes()
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a dict)
                    if key in found:
                        raise TacoError(f"{file.parent}: {key[:200]!a} is in {found[key]} and in {file.name}.")
                    found[key] = file.name
                    part = tensors.get_slice(key)
                    shapes[key] = tuple(part.get_shape())
                    if part.get_dtype() in INTEGERS:
                        shapes.integers.add(key)
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise TacoError(
                f"The model {file.parent} cannot be loaded: {file.name} is no whole safetensors file "
                f"({first_line(error)}). Copy it again."
            ) from error
    if index is not None and found != index:
        wrong = next(key for key in sorted({*found, *index}) if found.get(key) != index.get(key))
        raise TacoError(
            f"{files[0].parent}: {wrong[:200]!a} should be in {index.get(wrong, 'no file')} and is in "
            f"{found.get(wrong, 'none')}; files were renamed, mixed or lost. Copy the checkpoint again."
        )
    return shapes


def check_weights(directory: Path, variant: str | None = None) -> Shapes:
    """Shapes of all tensors of a checkpoint whose weight files are all there, whole and inside it.

    Raises:
        TacoError: see `weight_files`, `check_headers`.
    """
    if (directory / "adapter_config.json").exists():
        raise TacoError(f"{directory} is an adapter for another model; merge it into that model first.")
    return check_headers(*weight_files(directory, variant))


# -- sizes -------------------------------------------------------------------------------------------------------


def check_depth(config: Any, most: int, name: str) -> None:
    """Refuses a config with more layers than `most`, say the tensors of its files, before modules are made for them.

    Raises:
        TacoError: naming the field.
    """
    values = config if isinstance(config, dict) else vars(config)
    for key, value in values.items():
        counts = ("layers" in key.split("_") and ("num" in key or key.startswith("n_"))) or key == "n_layer"
        if counts and isinstance(value, int) and value > most:
            raise TacoError(f"{name}: {key} is {str(value)[:40]}, but there can be {most} at most; it is damaged.")


def check_size(
    skeleton: Any,
    stored: Mapping[str, tuple[int, ...]],
    name: str,
    required: Collection[str] | None = None,
    integers: Collection[str] = (),
) -> None:
    """Refuses a model that its files do not hold, before memory is taken for it.

    Of tensors that go by the same name on both sides shapes are compared, of all others only how many numbers they
    have together: transformers renames and joins the tensors of some architectures as it reads them. What a model
    without an output embedding has beside its stack may be missing, if it is no larger than the files. The linear maps
    of a quantised model have shapes of their quantiser's, which holds several weights in one number.

    Args:
        skeleton: the model, built on the meta device.
        required: the parameters that the files must hold; default: all. Of others (a head that is yet to be trained)
            there may be no more than the files hold together.
        integers: which of the tensors in the files hold integers.

    Raises:
        TacoError: a weight is missing, has another shape, or holds integers where it should not.
    """
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or ())
    shapes = {key: tuple(parameter.shape) for key, parameter in skeleton.named_parameters() if key not in tied}
    packed = _packed(skeleton)
    compared = {key for key in shapes if key not in packed and (required is None or key in required)}
    wrong = [key for key, shape in shapes.items() if key in compared and stored.get(key, shape) != shape]
    if wrong:
        raise TacoError(
            f"{name}: the shape of {wrong[0]} is {stored[wrong[0]]} in the files and {shapes[wrong[0]]} by the config; "
            "they do not belong together. Copy the checkpoint again, or compress again."
        )
    # read as what the config says they were made into numbers without a word: codes into weights, or weights into codes
    for key, parameter in skeleton.named_parameters():
        if key in compared and key in stored and parameter.is_floating_point() == (key in integers):
            here, there = ("integers", "numbers") if key in integers else ("numbers", "integers")
            raise TacoError(
                f"{name}: {key} holds {here} in the files and {there} by the config; they do not belong together. Copy "
                "the checkpoint again, or compress again."
            )
    new = {key: shapes.pop(key) for key in list(shapes) if required is not None and key not in required}
    needed, numbers, made = (sum(math.prod(shape) for shape in side.values()) for side in (shapes, stored, new))
    if made > numbers:
        raise TacoError(f"{name}: the config asks for a head of {made:,} parameters, the files hold {numbers:,}.")
    if needed > numbers * (PACKING if packed else 1):
        lost = [key for key in shapes if key not in stored]
        raise TacoError(
            f"{name}: the config describes a model of {needed:,} parameters, the files hold {numbers:,}; "
            f"weights are missing (first: {', '.join(lost[:1]) or 'none by name'}). Copy it again, or compress again."
        )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in skeleton.buffers())
    if buffers > MAX_BUFFER_BYTES + 4 * numbers:
        raise TacoError(f"{name}: the config asks for tables of {buffers / 1e9:.1f} GB; it is damaged.")


def _packed(skeleton: Any) -> set[str]:
    """The weights that the files of a quantised model may hold in another form; empty for any other model."""
    if getattr(skeleton.config, "quantization_config", None) is None:
        return set()
    # bitsandbytes takes GPT-2's maps too
    maps = (nn.Linear, Conv1D)
    return {f"{path}.weight" for path, module in skeleton.named_modules() if isinstance(module, maps)}


def check_regular(path: Path, what: str) -> None:
    """Refuses what is no regular file: reading a device or a pipe might never end.

    Raises:
        TacoError: no such file, a directory, or something else.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise TacoError(f"No such {what}: {path}") from error
    except (OSError, ValueError) as error:
        raise TacoError(f"{str(path)[:200]!r} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if stat.S_ISDIR(mode):
        raise TacoError(f"{path} is a directory; pass one {what}.")
    if not stat.S_ISREG(mode):
        raise TacoError(f"{path} is not a regular file; pass a {what}.")
