"""One tiny system, published once; tests that change it work on copies."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from evolve.export.publish import export_system
from evolve.store import System
from tests.support.system import build_system


@dataclasses.dataclass(frozen=True)
class Published:
    system: System
    repository: pathlib.Path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Read only."""
    folder = tmp_path_factory.mktemp("pristine")
    system = build_system(folder / "system")
    export_system(system, folder / "repository")
    return Published(system, folder / "repository")


@pytest.fixture(scope="session")
def second_process(pristine: Published, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The working directory of a process that ran second_process.py; read only."""
    folder = tmp_path_factory.mktemp("second_process")
    root = pathlib.Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}
    program = pathlib.Path(__file__).with_name("second_process.py")
    command = [sys.executable, str(program), str(pristine.system.folder)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def published(pristine: Published, tmp_path: pathlib.Path) -> Published:
    """A copy to change, mtimes kept."""
    shutil.copytree(pristine.system.folder, tmp_path / "system")
    shutil.copytree(pristine.repository, tmp_path / "repository")
    return Published(System.open(tmp_path / "system"), tmp_path / "repository")
