"""The files of a healing run: training windows, and a state that a killed run goes on from.

Safetensors and JSON in a directory beside the output. A state is written to a new file first and `state.json`, which
names it, replaced after that: whenever a run is killed, `state.json` names a whole state.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .atomic import disk_full_told, whole_file
from .calibration import (
    CHARACTERS_PER_TOKEN,
    LONG_TEXT_FACTOR,
    begin_token,
    begun_with,
    check_vocabulary,
    random_windows,
    sample_from_model,
    text_windows,
    tokenize,
    unmarked,
)
from .directory_lock import check_free, hold
from .errors import TacoError
from .healing import HealingOptions, HealingState, trainable_names
from .loss import counted_labels
from .mapped import weight_sums
from .progress import Report
from .texts import named_text, recorded_name
from .work_directory import weights_digest

# A kill costs about this much work at most, or 50 times what writing a state takes (2% of the run) where that is more.
SECONDS_BETWEEN_STATES = 10.0
STATE_SHARE = 50
RUN, WINDOWS = "run.json", "windows.safetensors"


def healing_windows(
    text: str,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    options: HealingOptions,
    progress: Report | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held-out) windows, int64 [count, seq_len], drawn with the run's seed; no token is in both.

    With `completions_only` the tokens outside completions are marked, as `calibration.tokenize` does it.

    Each begins as in calibration (`calibration.begin_token`). Held out is what was drawn last. Calibration on the same
    text with the same seed draws the same windows first, and a model that was fitted on those would look better before
    healing than it is.

    Args:
        text: "self" for text that the dense model writes, or as for `texts.named_text`.

    Raises:
        TacoError: no tokenizer, an unreadable text, or one of fewer than two windows.
    """
    wanted = options.steps * options.batch + options.held_out
    length, seed = options.seq_len, options.seed
    if text == "self":
        windows = sample_from_model(dense, wanted, length, seed, progress=progress)
    else:
        if tokenizer is None:
            raise TacoError("Healing on text needs the model's tokenizer, and the checkpoint has none.")
        found = named_text(text, tokenizer, test=False, completions=options.completions_only)
        raw = found.text
        begin = begin_token(tokenizer, dense)
        if len(raw) // (length * CHARACTERS_PER_TOKEN) >= LONG_TEXT_FACTOR * wanted:
            windows = text_windows(found, tokenizer, wanted, length, seed, text, begin)
        else:
            tokens = tokenize(raw, tokenizer, found.completions)
            of_text = length - (begin is not None)
            slots = len(tokens) // of_text
            if slots < 2:
                raise TacoError(f"{Path(text).name} has fewer than two windows of {length} tokens; pass a longer text.")
            # no more windows than fit side by side: an overlap would show held-out tokens to the training
            windows = random_windows(tokens, min(wanted, slots), of_text, seed, Path(text).name)
            windows = begun_with(begin, windows)
    check_vocabulary(windows, dense)
    if options.completions_only:  # what would teach nothing is left out
        windows = windows[[counted_labels(unmarked(window[None])[1]) > 0 for window in windows]]
        if len(windows) < 2:
            raise TacoError("--completions-only: fewer than two windows have a completion in them; pass a longer text.")
    held_out = max(1, min(options.held_out, len(windows) // 10))
    return windows[:-held_out].contiguous(), windows[-held_out:].contiguous()


def start_digest(model: PreTrainedModel, names: list[str]) -> str:
    """SHA-256 of the parameters that a run starts from."""
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    for name in names:
        digest.update(name.encode())
        digest.update(parameters[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class HealingFiles:
    """The work directory of a run.

    Raises:
        TacoError: it belongs to a run with other options, other models, another text or dtype, is damaged, or in use.
    """

    def __init__(
        self, path: Path, options: HealingOptions, student: PreTrainedModel, teacher: PreTrainedModel, text: str
    ) -> None:
        self.path = path
        self.identity: dict[str, Any] = {
            "options": options.to_dict(),
            "text": recorded_name(text),
            # of the arithmetic: a 16-bit checkpoint starts from the same parameters in any
            "dtype": str(student.dtype).removeprefix("torch."),
            "start": start_digest(student, trainable_names(student, options.norms)),
            "dense model": weights_digest(weight_sums(teacher)),
        }
        self._last, self._cost = time.monotonic(), 0.0
        check_free(path)
        if (path / RUN).is_file():
            found = self._json(RUN)
            if found != self.identity:
                differs = [key for key in self.identity if found.get(key) != self.identity[key]]
                raise TacoError(
                    f"{path} holds a healing run with another {' and '.join(differs)}; give the same arguments to go "
                    "on with it, or delete the directory to start anew."
                )
        # no more than the windows: a run that was killed, or found the disk full, as it began
        elif path.exists() and not all(e.name == WINDOWS or e.name.startswith(f".{RUN}.") for e in path.iterdir()):
            raise TacoError(f"{path} is not the work directory of a healing run; choose another --work.")

    def windows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The windows of the run that is gone on with, or None where none began."""
        if not (self.path / RUN).is_file():
            return None
        self._lock = hold(self.path)  # as long as this lives
        tensors = self._tensors(WINDOWS)
        return tensors["train"], tensors["held_out"]

    def begin(self, train: torch.Tensor, held_out: torch.Tensor) -> None:
        self._lock = hold(self.path)
        with disk_full_told(self.path, "free some, and give the same command again."):
            save_file({"train": train, "held_out": held_out}, self.path / WINDOWS)
            self._write_json(RUN, self.identity)

    def state(self) -> HealingState | None:
        """The last whole state, or None."""
        if not (self.path / "state.json").is_file():
            return None
        record: dict[str, Any] = self._json("state.json")
        try:
            tensors = self._tensors(Path(record.pop("file")).name)
            groups: dict[str, Any] = {"factors": {}, "first": {}, "second": {}, "best": {}}
            for name, tensor in tensors.items():
                group, _, parameter = name.partition("/")
                groups[group][parameter] = tensor
            return HealingState(**record, **groups)
        except (KeyError, TypeError) as error:
            raise TacoError(f"{self.path} is damaged ({error}); delete it and start anew.") from error

    def keep(self, state: HealingState) -> None:
        """Writes the state when the last one is old enough."""
        if time.monotonic() - self._last >= max(SECONDS_BETWEEN_STATES, STATE_SHARE * self._cost):
            self.write(state)

    def write(self, state: HealingState) -> None:
        start = time.monotonic()
        tensors = {}
        for group in ("factors", "first", "second", "best"):
            for name, tensor in getattr(state, group).items():
                tensors[f"{group}/{name}"] = tensor.detach().cpu().contiguous()
        file = f"state-{state.step}.safetensors"
        with disk_full_told(self.path, "free some: the same command goes on from the last state."):
            with whole_file(self.path / file) as partial:
                save_file(tensors, partial)
            record = {key: getattr(state, key) for key in ("step", "best_step", "curve", "losses")}
            self._write_json("state.json", {"file": file, **record})
        for old in self.path.glob("*state-*.safetensors*"):  # and what a killed run was writing
            if old.name != file:
                old.unlink()
        self._last = time.monotonic()
        self._cost = self._last - start

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _write_json(self, name: str, values: dict[str, Any]) -> None:
        with whole_file(self.path / name) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def _json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TacoError(f"{self.path / name} is not readable ({error}); delete {self.path}.") from error
        if not isinstance(values, dict):
            raise TacoError(f"{self.path / name} is not an object; delete {self.path}.")
        return values

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise TacoError(f"{self.path / name} is not readable ({error}); delete {self.path}.") from error
