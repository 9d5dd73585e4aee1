"""A publisher killed anywhere leaves a whole generation, the old or the new one, and the next one tidies up."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import evolve.export.publish
from evolve.export.publish import export_system
from evolve.layer import HEAD
from evolve.path import Path
from evolve.store import System
from munet.signatures import PrivateKey, is_signed
from tests.evolve.export.whole import check_whole, read_generation
from tests.support.system import TaskSketch, add_task, block_position, build_system

REPUBLISHED = 7
"""After every so many-th of the moments of death the next publisher is tried too."""


class Camera:
    """Copies a folder before everything that changes something in one: what a killed process would leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, copies: pathlib.Path) -> None:
        self.count = 0
        self._folder = folder
        self._copies = copies
        for place, name in [
            (tempfile, "mkstemp"),
            (pathlib.Path, "mkdir"),
            (pathlib.Path, "replace"),
            (pathlib.Path, "unlink"),
            (pathlib.Path, "rmdir"),
        ]:
            monkeypatch.setattr(place, name, self._watched(getattr(place, name)))

    def _watched(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._folder.exists():
                shutil.copytree(self._folder, self._copies / str(self.count))
                self.count += 1
            return operation(*args, **kwargs)

        return watched


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three generations of a small system whose next change adds a task, removes one, splits a route and collects a generation."""
    folder = tmp_path_factory.mktemp("before")
    system = build_system(folder / "system", {"plain": TaskSketch(), "leaving": TaskSketch(classes=4)})
    for number in range(3):
        add_task(system, "plain", TaskSketch(classes=5 + number))
        export_system(system, folder / "repository")
    system.remove_task("leaving")
    add_task(system, "splitter", TaskSketch(cloned=(block_position(1),)))
    return folder


@pytest.fixture(autouse=True)
def _files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are what matters here, and the machine stays up: neither numbers nor the disk's own memory need to be waited for."""

    def no_logits(path: Path, _: object, images: np.ndarray, **__: object) -> np.ndarray:
        return np.zeros((len(images), path.layer(HEAD).spec.integer("classes")), dtype=np.float32)

    monkeypatch.setattr(evolve.export.publish, "reference_logits", no_logits)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(evolve.export.publish._Publisher, "_check_routes", lambda *_: None)


def is_signed_by(repository: pathlib.Path, number: int, key: PrivateKey) -> bool:
    content, signature = (repository / f"generation-{number}.{kind}" for kind in ("json", "sig"))
    return is_signed(content.read_bytes(), signature.read_bytes(), [key.public_key()])


def relative_files(repository: pathlib.Path) -> set[str]:
    return {str(file.relative_to(repository)) for file in repository.rglob("*")}


KEY = PrivateKey.generate()


@pytest.mark.parametrize(("is_first", "key"), [(True, None), (False, None), (True, KEY)])
def test_killed_at_any_operation(before: pathlib.Path, tmp_path: pathlib.Path, is_first: bool, key: PrivateKey | None) -> None:
    system = System.open(before / "system")
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    copies.mkdir()
    if not is_first:
        shutil.copytree(before / "repository", whole)
    with pytest.MonkeyPatch.context() as patch:
        camera = Camera(patch, whole, copies)
        assert export_system(system, whole, signing_key=key).changed
    expected = check_whole(whole)
    assert camera.count > 40
    seen = set()
    for moment in range(camera.count):
        copy = copies / str(moment)
        if not is_first or (copy / "CURRENT").exists():
            found = check_whole(copy)
            seen.add(found.number)
            assert key is None or is_signed_by(copy, found.number, key)
            assert found.tasks == (
                expected.tasks if found.number == expected.number else read_generation(before / "repository").tasks
            )
        if moment % REPUBLISHED == 0:
            export_system(system, copy, signing_key=key)
            after = check_whole(copy)
            assert (after.tasks, after.multi_task_ensembles) == (expected.tasks, expected.multi_task_ensembles)
            left = relative_files(copy)
            assert not [name for name in left if name.endswith(".part")]
            # Where the number of the killed one is spent, one generation more or less is kept.
            assert after.number > expected.number or left == relative_files(whole), moment
    assert seen == ({expected.number} if is_first else {expected.number - 1, expected.number})


def test_really_killed_while_publishing(second_process: pathlib.Path) -> None:
    """The second process checked after each of its kills; here the last one is tidied up."""
    killed = second_process / "killed"
    result = export_system(System.open(second_process / "system"), killed)
    assert check_whole(killed).number == result.generation > 1
    assert not list(killed.rglob("*.part"))
