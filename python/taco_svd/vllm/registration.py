"""Makes vLLM accept compressed checkpoints: model classes by name, and configs as vLLM expects them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import vllm
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils import config as vllm_config_module
from vllm.transformers_utils.config import get_config_parser, register_config_parser

from ..errors import TacoError
from ..modeling import CompressedConfig

PREFIX = "Taco"
FALLBACK = "TransformersForCausalLM"
SUFFIXES = ("ForCausalLM", "LMHeadModel")
CLASSIFIER = "ForSequenceClassification"


def register() -> None:
    """Registers everything with vLLM; may be called any number of times in any process."""
    register_models()
    register_parser()


def register_models() -> None:
    """For each language model X that vLLM has, TacoX: named only, nothing is imported until it is asked for."""
    for architecture in list(ModelRegistry.get_supported_archs()):
        served = PREFIX + architecture
        if not architecture.endswith(SUFFIXES) or architecture.startswith(PREFIX):
            continue
        if served not in ModelRegistry.models:
            ModelRegistry.register_model(served, f"{__package__}.models:{served}")
            _remember_per_version(ModelRegistry.models[served])
        if architecture in MODELS_CONFIG_MAP:  # what vLLM sets for this architecture, it must set for ours
            MODELS_CONFIG_MAP[served] = MODELS_CONFIG_MAP[architecture]


def _remember_per_version(entry: Any) -> None:
    """Has vLLM keep what it finds out about a model class in a file of this vLLM version's.

    It reads the file as long as our models.py is the same, but all that it says is about vLLM's class.
    """
    if hasattr(entry, "_get_cache_filename"):  # no more than a cache: another vLLM may do without
        name = f"{vllm.__version__}-{entry._get_cache_filename()}"
        object.__setattr__(entry, "_get_cache_filename", partial(str, name))  # it is frozen


def register_parser() -> None:
    """Puts our reading of configs over vLLM's for Hugging Face checkpoints; all others pass through unchanged."""
    base: Any = type(get_config_parser("hf"))
    if getattr(base, "reads_taco", False):
        return

    class Parser(base):
        reads_taco = True

        def parse(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
            values, config = super().parse(*args, **kwargs)
            return values, as_vllm_expects(config)

    with _quiet(vllm_config_module.logger):  # it warns that "hf" is replaced, on every start, whatever is served
        register_config_parser("hf")(Parser)


def as_vllm_expects(config: Any) -> Any:
    """An ordinary config of the base model, plus our architecture and structure; configs of others as they are.

    vLLM decides by `model_type` how heads are counted, which dtypes work, and more. The structure travels along as
    `taco_svd`, which also makes it part of what vLLM's cache of compiled graphs is keyed by.

    Raises:
        TacoError: the checkpoint holds something that cannot be served.
    """
    if not isinstance(config, CompressedConfig):
        return config
    if config.structure.narrow:
        raise TacoError(
            "This checkpoint has narrowed maps (--method modegpt), which are not supported in vLLM. Export it as an "
            "ordinary model (taco-svd export DIR --dense OUT), which vLLM serves without this plugin."
        )
    base = config.base_class
    values = config.to_dict()  # type: ignore[attr-defined]
    structure = values.pop("taco_svd")
    values["model_type"] = base.model_type
    plain: Any = base.from_dict(values)
    plain.taco_svd = structure
    plain._name_or_path = getattr(config, "_name_or_path", "")
    plain.architectures = [served_name(name) for name in values.get("architectures") or [""]]
    _check_windows(plain)
    return plain


def _check_windows(config: Any) -> None:
    """Refuses GPT-OSS models that have lost layers such that vLLM would give others windows that are not theirs.

    vLLM's class goes by whether a layer's number is even; all others read `layer_types`.

    Raises:
        TacoError: of such a model.
    """
    kinds = getattr(config, "layer_types", None) or []
    theirs = ["sliding_attention" if number % 2 == 0 else "full_attention" for number in range(len(kinds))]
    if any("GptOss" in name for name in config.architectures) and kinds != theirs:
        raise TacoError(
            "vLLM takes every second layer of a GPT-OSS model for one with a sliding window, whatever its config says, "
            "and layers have been taken out of this one. Take out neighbours in pairs (--layers), or serve it with "
            "transformers."
        )


def served_name(architecture: str) -> str:
    """What vLLM must be told for a checkpoint that holds a model of class `architecture`.

    A classifier keeps its name: vLLM looks for the language model of that name, and puts the head on it.

    Raises:
        TacoError: it holds neither a language model nor a classifier that vLLM can serve.
    """
    bases = [architecture.replace(CLASSIFIER, suffix) for suffix in SUFFIXES]  # as vLLM looks for them
    if any(name in ModelRegistry.models for name in (architecture, *bases)):
        return architecture
    if not architecture or architecture.endswith(SUFFIXES):
        # Mixtures of experts, too: vLLM's own choice for them (TransformersMoEForCausalLM: fused, sharded experts) does
        # not run on a CPU, dense models neither, so nobody has seen it with ours.
        return PREFIX + FALLBACK
    raise TacoError(
        f"This checkpoint holds a {architecture[:80]}, which is not supported in vLLM: save it as a language model "
        f"(...{SUFFIXES[0]}), or as a classifier of an architecture that vLLM has a model of its own for."
    )


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
