"""Makes PEFT's own calls take compressed models: saved adapters load, merged ones can be saved.

PEFT has no registry of layers; a config can be told of one, and most configs are made where nobody can tell them (by
`PeftModel.from_pretrained`, say). So its tuners are told whenever they put an adapter into a model. PEFT is not
imported for that: if it has not been, a finder waits for it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TUNERS = "peft.tuners.tuners_utils"


def hook() -> None:
    """Called by ``import taco_svd``; harmless when repeated, and without PEFT."""
    if TUNERS in sys.modules:
        _patch(sys.modules[TUNERS])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds nothing by itself: lets the others find the module, and adds a step to its execution."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TUNERS:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                _patch_after(spec)
                return spec
        return None


def _patch_after(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == TUNERS:  # one loader serves all modules of a zip file
            _patch(module)

    with contextlib.suppress(AttributeError):  # a loader that takes none: LoRA then needs `with_lora_support`
        loader.exec_module = exec_module


def _patch(tuners: ModuleType) -> None:
    """Wraps what PEFT's tuners share, once. A PEFT that has no such methods is left alone."""
    base: Any = getattr(tuners, "BaseTuner", None)
    inject, merge = getattr(base, "inject_adapter", None), getattr(base, "merge_and_unload", None)
    if inject is None or merge is None or hasattr(inject, "taco_svd"):
        return

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        from .adapters import before_injection

        before_injection(self, getattr(self, "peft_config", {}).get(adapter_name), model)
        return inject(self, model, adapter_name, *args, **kwargs)

    @functools.wraps(merge)
    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None, **kwargs: Any
    ) -> Any:
        from .adapters import check_merges, follow_modules, has_adapters

        if not has_adapters(self.model):
            return merge(self, progressbar, safe_merge, adapter_names, **kwargs)
        check_merges(self.model, adapter_names)
        merged = merge(self, progressbar, safe_merge, adapter_names, **kwargs)
        follow_modules(merged)
        return merged

    inject_adapter.taco_svd = True  # type: ignore[attr-defined]
    base.inject_adapter, base.merge_and_unload = inject_adapter, merge_and_unload
