"""Compressed models as ordinary transformers models: config classes, model classes, registration.

For every base class (say `LlamaForCausalLM`) a subclass is made on demand (`TacoLlamaForCausalLM`) that builds the
kept layers and puts the replacement modules in; loading, saving, generation, device maps, adapters and further
quantisation are then the base class's own. All of them share one `model_type`, "taco_svd", which transformers does
not know, so a process that has not imported this package gets an error that names it instead of random weights.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.hub import cached_file

from .architectures import PER_LAYER_CONFIG_LISTS, copy_implementations, set_config
from .checksums import check_checksums, write_checksums
from .errors import TacoError, first_line
from .int8_linear import SCALES, Int8LowRankLinear
from .model_card import write_card
from .plan import PLAN_FILE, Plan
from .replacement import LowRankBridge, LowRankLinear, NarrowLinear, pivot_is_permutation
from .structure import MAX_LAYERS, Structure
from .surgery import install
from .untrusted import check_config, check_depth, check_labels, check_size, check_weights, refuse_foreign_code

MODEL_TYPE = "taco_svd"

# Stands in config.json where every transformers config expects an integer: a class that reads the file without
# this package (LlamaForCausalLM.from_pretrained, say) fails its type check and shows this sentence. The real
# fields are below "base_config", without a model_type, or transformers would read them as a nested config.
GUARD_FIELD = "vocab_size"
GUARD = (
    "this is a Taco-SVD checkpoint: `import taco_svd` (of the package taco-kernels) first, and load it by an Auto "
    "class (AutoModelForCausalLM.from_pretrained)"
)

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class CompressedConfig:
    """Mixin of the config classes of compressed models: the base model's config plus a `Structure`."""

    base_class: ClassVar[type[PreTrainedConfig]]
    # TRL reads it wherever transformers has no class of the model's name. Of the class, so that it is never written;
    # empty, as what transformers takes for "no code in the checkpoint"; and it cannot be filled.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def structure(self) -> Structure:
        return Structure.from_dict(self.taco_svd)  # type: ignore[attr-defined]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a checkpoint; what it says of the structure is checked.

        Raises:
            TacoError: the structure is damaged, or the base config is none.
        """
        values = dict(config_dict)
        if "base_config" in values:
            values = flatten_config(values)
        structure = Structure.from_dict(values.get("taco_svd"))
        check_depth(values, MAX_LAYERS, "config.json")
        check_labels(values, "config.json")
        for key in PER_LAYER_CONFIG_LISTS:
            if isinstance(values.get(key), list) and len(values[key]) != len(structure.kept):
                raise TacoError(f"config.json: {key} has {len(values[key])} entries for {len(structure.kept)} layers.")
        try:
            return super().from_dict(values, **kwargs)  # type: ignore[misc]
        except TacoError:
            raise
        except Exception as error:  # the base config's own checks raise many kinds
            first = (str(error).strip() or type(error).__name__).splitlines()
            raise TacoError(f"config.json: `base_config` is not valid ({' '.join(first)[:300]}).") from error

    def to_diff_dict(self) -> dict[str, Any]:
        """The form that is written to config.json: base fields nested, a guard where others would read them."""
        values = super().to_diff_dict()  # type: ignore[misc]
        return nest_config(values, self.base_class.model_type)


def nest_config(values: dict[str, Any], base_model_type: str) -> dict[str, Any]:
    values = dict(values)
    nested = {
        "model_type": MODEL_TYPE,
        "base_model_type": base_model_type,
        "taco_svd": values.pop("taco_svd"),
        GUARD_FIELD: GUARD,
    }
    # no token ids: whoever reads the file as a plain `PreTrainedConfig` (Trainer, before it resumes) would compare them
    # with the guard
    for key in ("architectures", "dtype", "transformers_version"):
        if key in values:
            nested[key] = values[key]
    values.pop("model_type", None)
    values.pop("architectures", None)
    values.pop("transformers_version", None)
    return {**nested, "base_config": values}


def flatten_config(values: dict[str, Any]) -> dict[str, Any]:
    base = values["base_config"]
    if not isinstance(base, dict):
        raise TacoError("config.json: `base_config` must be an object; the checkpoint is damaged.")
    if "base_config" in base or "taco_svd" in base or "auto_map" in base:
        raise TacoError("config.json: `base_config` holds what an ordinary config has not; the checkpoint is damaged.")
    refuse_foreign_code(base, "config.json")
    flat = {**base, "taco_svd": values.get("taco_svd"), "architectures": values.get("architectures")}
    for key, value in values.items():
        # what from_pretrained's keyword arguments put on top (num_labels, attn_implementation, dtype ...)
        if key not in flat and key not in ("base_config", "base_model_type", "model_type", "auto_map", GUARD_FIELD):
            flat[key] = value
    if values.get("dtype") is not None:
        flat["dtype"] = values["dtype"]
    return flat


class TacoSVDConfig(PreTrainedConfig):
    """What `AutoConfig` finds for model type "taco_svd"; makes the config of the right base class.

    Never instantiated itself: `from_dict` returns an instance of a class made for the base model type.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base_model_type = config_dict.get("base_model_type")
        if not isinstance(base_model_type, str) or "base_config" not in config_dict:
            raise TacoError("config.json: no `base_model_type` or no `base_config`; the checkpoint is damaged.")
        if base_model_type == MODEL_TYPE or base_model_type not in CONFIG_MAPPING:
            raise TacoError(
                f"The compressed model's base type {base_model_type[:80]!r} is not known to transformers "
                f"{transformers.__version__}; install the transformers release that it was made with "
                f"({config_dict.get('transformers_version', 'unknown')})."
            )
        return compressed_config_class(CONFIG_MAPPING[base_model_type]).from_dict(config_dict, **kwargs)


class CompressedModel:
    """Mixin of compressed models; ``isinstance(model, CompressedModel)`` tells one from an ordinary model."""

    base_class: ClassVar[type[PreTrainedModel]]
    # How it was made, where that is known: goes wherever the model is saved (a Trainer's checkpoints, for example).
    taco_plan: Plan | None = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        # heads for classification take their stack from AutoModel, which has made a compressed one
        if not any(isinstance(module, CompressedModel) for module in list(self.modules())[1:]):  # type: ignore[attr-defined]
            install(self, config.structure)  # type: ignore[arg-type]

    @property
    def structure(self) -> Structure:
        """Which layers are kept and what replaced the others."""
        structure: Structure = self.config.structure  # type: ignore[attr-defined]
        return structure

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (LowRankLinear, Int8LowRankLinear, LowRankBridge, NarrowLinear)):
            # from_pretrained calls this for parameters that the checkpoint lacks; those are reported, see below
            if not any(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
                module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @property
    def current_plan(self) -> Plan | None:
        """The plan, while it is of this structure: of a model that has been changed it tells what is no longer so."""
        return self.taco_plan if self.taco_plan is not None and self.taco_plan.structure == self.structure else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Like `PreTrainedModel.from_pretrained`, and raises where that would leave factors at random values.

        Safetensors only; a directory is checked before memory is taken for it (see `untrusted`).

        Raises:
            TacoError: the checkpoint is damaged, incomplete, or asks for what no checkpoint needs; or factorised maps
                would be sharded by tensor parallelism.
        """
        path = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        new_head = bool(kwargs.get("ignore_mismatched_sizes"))
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise TacoError("Compressed models are stored as safetensors; use_safetensors=False cannot read them.")
        if isinstance(path, (str, os.PathLike)) and os.path.isdir(path) and kwargs.get("state_dict") is None:
            directory = Path(path) / (kwargs.get("subfolder") or "")
            check_config(directory)
            stored = check_weights(directory, kwargs.get("variant"))
            config = kwargs.get("config")
            if isinstance(config, CompressedConfig):
                check_depth(config, len(stored), str(directory))
                skeleton = cls._skeleton(config, directory)
                required = cls._required(config, [key for key, _ in skeleton.named_parameters()], new_head)
                check_size(skeleton, stored, str(directory), required, stored.integers)
            check_checksums(directory)
        try:
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except (RuntimeError, ValueError) as error:  # shapes that do not fit, an unreadable config
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise
            lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
            raise TacoError(f"{path} cannot be loaded: {' '.join(lines[:3])[:400]}") from error
        # of a weight of another shape the loader tells the name and both shapes
        mismatched = {key if isinstance(key, str) else str(key[0]) for key in info.get("mismatched_keys", ())}
        missing = sorted({*info["missing_keys"], *mismatched})
        required = cls._required(model.config, list(model.state_dict()), new_head)
        lost = [key for key in missing if key in required]
        if lost:
            raise TacoError(
                f"{path}: {len(lost)} weights are missing or have the wrong shape (first: {lost[0]}); "
                "the checkpoint is incomplete. Copy it again, or compress again."
            )
        check_replacements(model, path)
        model.taco_plan = stored_plan(path, kwargs)
        if "generation_config" not in kwargs:
            give_token_ids(model)
        return (model, info) if wants_info else model

    @classmethod
    def _required(cls, config: Any, names: list[str], new_head: bool = False) -> set[str]:
        """Which of the model's weights its checkpoint must hold: all but a classifier's head that was not saved.

        `new_head`: nor one that was, since the caller has asked for another (``ignore_mismatched_sizes=True``).
        """
        prefix = f"{cls.base_model_prefix}."  # type: ignore[attr-defined]
        inner = {name for name in names if name.startswith(prefix)}
        # a bare stack has nothing but itself, under no prefix; a language model without its head is none
        saved = cls.__name__ in (config.architectures or ()) and not new_head
        return set(names) if saved or not inner or cls.can_generate() else inner  # type: ignore[attr-defined]

    @classmethod
    def _skeleton(cls, config: Any, directory: Path) -> Any:
        """The model without memory for its weights.

        Raises:
            TacoError: nothing can be built from this config.
        """
        try:
            with torch.device("meta"):
                return cls(copy.deepcopy(config))
        except TacoError:
            raise
        except Exception as error:  # model classes trust their configs: anything can go wrong in them
            first = first_line(error)
            raise TacoError(f"{directory}: no model can be built from its config ({first[:300]}).") from error

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Like `PreTrainedModel.save_pretrained`; the weight files' SHA-256, plan and model card go beside them."""
        # named as the modules are: the form on the hub (one tensor per expert, say) belongs to the base model's type
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            self._write_beside(Path(save_directory))

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """What `push_to_hub=True` calls at the end of `save_pretrained`: everything is to be there by then."""
        self._write_beside(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    def _write_beside(self, directory: Path) -> None:
        write_checksums(directory)
        plan = self.current_plan
        write_card(directory, self.structure, plan)
        if plan is not None:
            plan.save(directory / PLAN_FILE)


def stored_plan(path: Any, options: dict[str, Any]) -> Plan | None:
    """The plan beside a checkpoint's weights, on the disk or the hub (`options` as for `from_pretrained`), or None.

    The model runs without it; whoever needs it says what is wrong with it.
    """
    wanted = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "_commit_hash")
    try:
        file = cached_file(
            path,
            PLAN_FILE,
            **{key: options[key] for key in wanted if options.get(key) is not None},
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if file is None else Plan.load(file)
    except (TacoError, OSError, ValueError):
        return None


def give_token_ids(model: Any) -> None:
    """Fills in the token ids of generation where there was no generation_config.json.

    transformers then looks for them on the first level of config.json, and they are one level down.
    """
    generation = getattr(model, "generation_config", None)
    made_up = getattr(generation, "_from_model_config", False)  # also in a file, if the dense model had none
    if made_up and all(getattr(generation, key) is None for key in TOKEN_IDS):
        for key in TOKEN_IDS:
            setattr(generation, key, getattr(model.config, key, None))


def check_replacements(model: Any, path: Any) -> None:
    """What only the loaded weights, and where they are, tell about the replacement modules.

    Raises:
        TacoError: an index reads inputs that are not there, or tensor parallelism has taken a map apart.
    """
    for name, module in model.named_modules():
        # an index that is no permutation would read other inputs than were meant, or none at all
        if isinstance(module, (LowRankLinear, Int8LowRankLinear)) and not pivot_is_permutation(module):
            raise TacoError(f"{path}: {name}.pivot is no permutation; the checkpoint is damaged.")
        if isinstance(module, NarrowLinear) and not module.index_is_valid():
            raise TacoError(f"{path}: {name}.index names places that are not there; the checkpoint is damaged.")
        # transformers' plans are for one matrix per map: both factors would be cut where only one may be
        factorised = isinstance(module, (LowRankLinear, Int8LowRankLinear, NarrowLinear))
        if factorised and (getattr(model, "_tp_size", None) or 1) > 1:
            raise TacoError(
                f"{name} is factorised, and transformers' tensor parallelism knows no such maps. Serve it with vLLM "
                "(docs/vllm.md), load it with a device_map, or compress with --method bridge."
            )


_config_classes: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}
_model_classes: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def compressed_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of compressed models whose base model has config class `base`."""
    if issubclass(base, CompressedConfig):
        return base
    if base not in _config_classes:
        name = f"Taco{base.__name__}"
        made = type(
            name,
            (CompressedConfig, base),
            {
                "__module__": __name__,
                "__qualname__": name,
                "model_type": MODEL_TYPE,
                "base_class": base,
                "taco_svd": None,
                "__annotations__": {"taco_svd": "dict | None"},
            },
        )
        _config_classes[base] = made
        _register_models(base, made)
    return _config_classes[base]


def compressed_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of compressed models whose base model has class `base`."""
    if issubclass(base, CompressedModel):
        return base
    assert base.config_class is not None
    # first: making the config class registers its model class, which comes back here and may make the class asked for
    config_class = compressed_config_class(base.config_class)
    if base not in _model_classes:
        name = f"Taco{base.__name__}"
        no_split = list(base._no_split_modules or [])
        in_float32 = {*(base._keep_in_fp32_modules_strict or ()), *SCALES}
        _model_classes[base] = type(
            name,
            (CompressedModel, base),
            {
                "__module__": __name__,
                "__qualname__": name,
                "base_class": base,
                "config_class": config_class,
                "_no_split_modules": no_split + [f"Bridged{layer}" for layer in no_split],
                "_keep_in_fp32_modules_strict": in_float32,
            },
        )
    return _model_classes[base]


def _register_models(base: type[PreTrainedConfig], made: type[PreTrainedConfig]) -> None:
    """Tells the Auto classes which compressed model class belongs to a compressed config class."""
    for auto in (
        AutoModelForCausalLM,
        AutoModel,
        transformers.AutoModelForSequenceClassification,
        transformers.AutoModelForTokenClassification,
    ):
        if base in auto._model_mapping:
            model_class: Any = auto._model_mapping[base]
            if isinstance(model_class, tuple):
                model_class = model_class[0]
            # by config_class, since the model class is made from its base's own config class
            if model_class.config_class is base:
                auto.register(made, compressed_model_class(model_class), exist_ok=True)


def register() -> None:
    """Registers model type "taco_svd" with transformers; called by ``import taco_svd``, harmless when repeated."""
    AutoConfig.register(MODEL_TYPE, TacoSVDConfig, exist_ok=True)


def as_compressed(model: PreTrainedModel, config: PreTrainedConfig, structure: Structure) -> PreTrainedModel:
    """Turns a model whose modules already follow `structure` into a compressed model, in place.

    `config` is the base config for the kept layers (`architectures.slice_config`).
    """
    model_class = compressed_model_class(type(model))
    assert model_class.config_class is not None
    compressed_config = model_class.config_class.from_dict({**config.to_dict(), "taco_svd": structure.to_dict()})
    compressed_config._name_or_path = config._name_or_path
    copy_implementations(config, compressed_config)
    model.__class__ = model_class
    set_config(model, compressed_config)
    model._no_split_modules = set(model._no_split_modules or ()) | set(model_class._no_split_modules or ())
    return model


def set_structure(model: PreTrainedModel, structure: Structure) -> None:
    """Writes a structure into the config of a compressed model, which all its parts read it from."""
    for part in model.modules():
        described = getattr(part, "config", None)
        if isinstance(described, CompressedConfig):
            described.taco_svd = structure.to_dict()  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """Finds classes made on demand by name, so that compressed models can be pickled and sent to other processes."""
    if name.startswith("Taco") and (base := getattr(transformers, name.removeprefix("Taco"), None)) is not None:
        if isinstance(base, type) and issubclass(base, PreTrainedConfig):
            return compressed_config_class(base)
        if isinstance(base, type) and issubclass(base, PreTrainedModel):
            return compressed_model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
