"""What these tests share. They are in a folder that is not called vllm, or `import vllm` would find it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

METHODS = {
    "removal": {"method": "removal", "layers": 4},
    "bridge": {"method": "bridge", "layers": 4},
    "svd": {"method": "svd", "layers": 3},
    "paper": {"method": "paper", "layers": 3},
    "taco": {"method": "taco", "keep": 0.8},
}


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The package's model compressed by a method, as `taco-svd compress` does it; each method once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import taco_svd
    from taco_svd.checkpoint import DEFAULT_MODEL

    made: dict[str, Path] = {}

    def directory(method: str) -> Path:
        if method not in made:
            model = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL)
            tokenizer = AutoTokenizer.from_pretrained(DEFAULT_MODEL)
            small, plan = taco_svd.compress(model, tokenizer, samples=8, seq_len=64, **METHODS[method])
            out = tmp_path_factory.mktemp("compressed") / method
            taco_svd.save_compressed(small, plan, out, tokenizer)
            made[method] = out
        return made[method]

    return directory
