"""Brings a model of the Hugging Face hub here: what follows reads a directory, and need not know where it came from."""

from __future__ import annotations

import glob
from pathlib import Path

from huggingface_hub import snapshot_download

from .errors import TacoError
from .untrusted import INDEX_FILE, READ_AS_TEXT, WEIGHTS_FILE, check_config, check_contained, read_index

# Configs, tokenizers, chat templates, and what this package writes beside the weights.
SMALL_FILES = [f"*{suffix}" for suffix in READ_AS_TEXT]


def snapshot(name: str, here: bool = False) -> Path:
    """The directory of a hub model in the hub's cache on this machine; what is missing there is fetched.

    Configs and tokenizers come first, so that a model that is refused for them costs no download of its weights. Of
    these, only what transformers would read is fetched: many repositories hold the same weights in other forms as well.
    Without a connection, and with ``HF_HUB_OFFLINE=1``, it is what was fetched last.

    Args:
        name: "organisation/model", or one of the old names without an organisation.
        here: nothing is fetched.

    Raises:
        TacoError: the config or the index of the weights is not to be trusted, or there are no safetensors.
        Exception: what huggingface_hub raises, of many kinds: no such model, no access to it, no connection.
    """
    directory = Path(snapshot_download(name, allow_patterns=SMALL_FILES, local_files_only=here))
    check_config(directory)
    weights = [WEIGHTS_FILE]
    if (directory / INDEX_FILE).exists():
        # the names are somebody's: no patterns among them
        weights = [glob.escape(file) for file in read_index(check_contained(directory, INDEX_FILE)).values()]
    # of the same commit: there may be a newer one by now
    snapshot_download(name, revision=directory.name, allow_patterns=sorted(set(weights)), local_files_only=here)
    if not (directory / WEIGHTS_FILE).exists() and not (directory / INDEX_FILE).exists():
        raise TacoError(
            f"{name} has no {WEIGHTS_FILE} and no {INDEX_FILE}{' in the cache on this machine' if here else ''}. Only "
            "safetensors are read: where you trust the model, load it, save it by save_pretrained, and pass that."
        )
    return directory
