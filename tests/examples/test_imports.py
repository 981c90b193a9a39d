"""Every name that an example imports exists: examples run for minutes, too long for a test each."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_what_is_imported_exists(path: Path) -> None:
    checked = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{path.name}: {node.module} has no {name.name}"
                checked += 1
    assert checked
