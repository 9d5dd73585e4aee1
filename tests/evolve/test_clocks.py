"""Nothing that is decided depends on what time a machine thinks it is: clocks an hour off, and files dated so, change no search."""

from __future__ import annotations

import ast
import itertools
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable

import pytest

from evolve.collecting import collect
from evolve.lineage import lineage_hash
from evolve.store import System
from tests.support.processes import TOP
from tests.support.searches import Killed, MortalTrainer, evolve_tasks
from tests.support.stores import machine

pytestmark = pytest.mark.usefixtures("quick_disk")

HOUR = 3600.0

TELL_TIME = {
    "evolve/cli.py": "how long ago a search that is watched wrote its last line",
    "evolve/watch.py": "the same, and whether a journal has changed, by being unlike",
    "evolve/tensorboard.py": "when a scalar was written, for TensorBoard's axis",
    "evolve/journal.py": "a compressed journal keeps the date of the plain one, for who watches",
    "evolve/data/stored.py": "whether a file of images has changed, by being unlike",
}
"""Files that look at clocks or dates of files, and what for: nothing of it decides."""

CLOCKS = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}
DATES = {"st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "st_atime", "st_atime_ns", "getmtime", "getctime"}


def looks_at_clocks(source: str) -> bool:
    """Tells whether a module asks what time it is, or when a file was written."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = (
                node.value.id
                if isinstance(node.value, ast.Name)
                else node.value.attr
                if isinstance(node.value, ast.Attribute)
                else ""
            )
            if node.attr in DATES or node.attr in CLOCKS.get(owner, ()):
                return True
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            return True
    return False


def test_only_what_tells_people_the_time_looks_at_clocks() -> None:
    files = [*(TOP / "evolve").rglob("*.py"), *(TOP / "munet").rglob("*.py")]
    found = {file.relative_to(TOP).as_posix() for file in files if looks_at_clocks(file.read_text(encoding="utf-8"))}
    assert found == TELL_TIME.keys()


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of this machine off by so many seconds; muNet may not even look at it."""
    offset = 0.0

    def skewed(real: Callable[[], float] = time.time) -> float:
        asker = sys._getframe(1).f_globals["__name__"]
        assert not asker.startswith(("evolve", "munet")), f"{asker} asked for the time"
        return real() + offset

    def set_to(seconds: float) -> None:
        nonlocal offset
        offset = seconds

    monkeypatch.setattr(time, "time", skewed)
    return set_to


def date_anew(folder: pathlib.Path, draws: random.Random) -> None:
    """Dates all files as if others, whose clocks are up to an hour off, had written them."""
    for file in folder.rglob("*"):
        moment = 1.7e9 + draws.uniform(-HOUR, HOUR)
        os.utime(file, (moment, moment))


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_machines_whose_clocks_are_an_hour_off_take_turns_at_a_search(
    tmp_path: pathlib.Path, kind: str, set_clock: Callable[[float], None]
) -> None:
    expected = lineage_hash(evolve_tasks(tmp_path / "expected"))
    shared = tmp_path / "shared"
    location = str(shared) if kind == "folder" else shared.as_uri()
    draws = random.Random(0)
    for turn, (lives, offset) in enumerate(zip((0, 3, 5, 4, 100), itertools.cycle([HOUR, -HOUR]), strict=False)):
        set_clock(offset)
        with machine(tmp_path / f"machine-{turn % 2}"):
            if lives < 100:
                with pytest.raises(Killed):
                    evolve_tasks(location, trainer=MortalTrainer(lives))
            else:
                assert lineage_hash(evolve_tasks(location)) == expected
        if kind == "folder" and turn == 2:
            # Whatever its date, what the unfinished search needs stays.
            assert collect(System.open(location), delete=True).garbage
        for folder in (shared, tmp_path / "machine-0", tmp_path / "machine-1"):
            date_anew(folder, draws)
    with machine(tmp_path / "witness"):
        assert lineage_hash(System.open(location)) == expected
