"""``python -m taco_kernels.env``."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import taco_kernels
from taco_kernels import env, native


def test_json_and_table_say_the_same(capsys):
    assert env.main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["versions"]["taco_kernels"] == taco_kernels.__version__
    assert data["versions"]["torch"] == torch.__version__
    assert set(data["backends"]["cpu"]) == set(taco_kernels.BACKENDS)
    assert env.main([]) == 0
    table = capsys.readouterr().out
    for value in (*data["versions"].values(), *data["backends"]["cpu"]):
        assert value in table
    for states in data["backends"].values():
        for state in states.values():
            assert state in table
    if native.module is not None:
        assert data["build"]["cpu_isas"] == native.module.compiled_cpu_isas()
        assert data["extension"] == "loaded"


def test_without_the_extension(monkeypatch, capsys):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "extension was not built (test)")
    monkeypatch.setattr(taco_kernels.dispatch, "_reasons", {})
    assert env.main([]) == 0
    table = capsys.readouterr().out
    assert "extension was not built (test)" in table
    assert env.report()["build"] is None


def test_as_a_module_without_importing_transformers():
    code = "import sys, runpy; sys.argv = ['env', '--json']\ntry: runpy.run_module('taco_kernels.env', run_name='__main__')\nexcept SystemExit as e: assert not e.code\nassert 'transformers' not in sys.modules and 'triton' not in sys.modules"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cpu"]["name"]
