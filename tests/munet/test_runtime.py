"""ONNX Runtime reports to nobody, whichever process here loads it."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from server.triton.environment import find_environment
from tests.support.processes import TOP

QUIETS = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "XDG_CACHE_HOME")
"""What would keep it quiet here, or keep what it has to report elsewhere."""

BACKEND = """
import runpy, sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
runpy.run_path("server/triton/backend/model.py")
"""


def reports_of(home: pathlib.Path, python: str | pathlib.Path, code: str, **variables: str) -> list[pathlib.Path]:
    """Runs code in a home of its own and returns the files that ONNX Runtime keeps there to report from."""
    home.mkdir(exist_ok=True)
    surroundings = {name: value for name, value in os.environ.items() if name not in QUIETS}
    surroundings |= {"HOME": str(home), "PYTHONPATH": str(TOP), **variables}
    subprocess.run([str(python), "-c", code], cwd=TOP, env=surroundings, check=True, timeout=120)
    return [file for file in home.rglob("*") if file.is_file() and "onnxruntime" in str(file.relative_to(home))]


@pytest.mark.parametrize("module", ["server.cli", "server.embedded.engine", "evolve.export.parity"])
def test_nothing_is_reported(tmp_path: pathlib.Path, module: str) -> None:
    assert reports_of(tmp_path / "home", sys.executable, f"import {module}") == []


def test_nor_by_segments_in_a_triton(tmp_path: pathlib.Path) -> None:
    python = find_environment().folder / "bin" / "python"
    assert reports_of(tmp_path / "home", python, BACKEND) == []


def test_otherwise_it_would_be_and_whoever_wants_that_can_have_it(tmp_path: pathlib.Path) -> None:
    chosen = {"ORT_DISABLE_TELEMETRY": "0"}
    assert reports_of(tmp_path / "home", sys.executable, "import server.embedded.engine", **chosen) != []


def test_a_triton_starts_with_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    assert find_environment().variables()["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert find_environment().variables()["ORT_DISABLE_TELEMETRY"] == "0"
