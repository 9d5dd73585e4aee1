"""Watching a search by its journals, which appear, grow, are torn and vanish."""

from __future__ import annotations

import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import rich.console

from evolve.collecting import collect
from evolve.errors import SystemFolderError
from evolve.watch import Told, Watcher, describe, follow, news, seconds_left, seconds_per_child, view
from tests.support.processes import environment, heed_interrupts
from tests.support.reported import make_child, make_search
from tests.support.searched import searched_system


@pytest.fixture(scope="module")
def journal(tmp_path_factory) -> bytes:
    """A closed search of two generations, each child a pack: lines open, generation, 8 packs, generation, 8 packs, close."""
    system = searched_system(tmp_path_factory.mktemp("searched") / "system", 1)
    return system.journal_file("digits", 0).read_bytes()


class Scene:
    """A system's folder in which a journal is written bit by bit."""

    def __init__(self, folder: pathlib.Path, journal: bytes) -> None:
        (folder / "journal").mkdir()
        (folder / "system.json").write_text("{}")
        self.folder = folder
        self.file = folder / "journal" / "digits-0001.jsonl"
        self._lines = journal.splitlines(keepends=True)

    def write(self, num_lines: int, torn: int = 0) -> None:
        """Lets the journal have so many lines, and so many bytes of the next."""
        text = b"".join(self._lines[:num_lines])
        self.file.write_bytes(text + (self._lines[num_lines][:torn] if torn else b""))


@pytest.fixture
def scene(tmp_path, journal) -> Scene:
    return Scene(tmp_path, journal)


def _shown(watcher: Watcher, width: int = 80, now: float | None = None) -> str:
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(view(watcher, time.time() if now is None else now))
    return console.file.getvalue()


def test_a_folder_without_a_system_is_refused(tmp_path):
    with pytest.raises(SystemFolderError, match="found no system"):
        Watcher(tmp_path)


def test_a_journal_appears_grows_closes_and_vanishes(scene):
    watcher = Watcher(scene.folder)
    assert watcher.poll() == []
    assert "no search has begun" in _shown(watcher)
    scene.file.write_bytes(b"")
    assert watcher.poll() == []
    scene.write(1)
    ((search,)) = watcher.poll()
    assert (search.task, search.children) == ("digits", ())
    assert watcher.poll() == []
    assert re.search(r"digits +1 +0/2 +0/16 +- +- +- +- +-", _shown(watcher))
    scene.write(5)
    ((search,)) = watcher.poll()
    assert len(search.children) == 3
    assert re.search(rf"digits +1 +1/2 +3/16 +- +{search.best.quality:.4f} +{search.best.score:.4f}", _shown(watcher))
    # A line that is being written is none yet.
    scene.write(5, torn=100)
    ((search,)) = watcher.poll()
    assert len(search.children) == 3
    assert watcher.findings == []
    scene.write(20)
    ((search,)) = watcher.poll()
    assert watcher.running == []
    assert watcher.closed == [search]
    shown = _shown(watcher)
    assert "no search is under way" in shown
    assert re.search(rf"digits +1 +16 +{search.num_survived} +{search.end.quality:.4f}", shown)
    scene.file.unlink()
    assert watcher.poll() == []
    assert watcher.closed == []


def test_a_journal_that_vanishes_between_listing_and_reading_is_nothing(scene, monkeypatch):
    scene.write(5)
    watcher = Watcher(scene.folder)
    gone = scene.folder / "journal" / "nko-0001.jsonl"
    monkeypatch.setattr("evolve.watch.search_journals", lambda folder: {("nko", 0): gone, ("digits", 0): scene.file})
    assert [search.task for search in watcher.poll()] == ["digits"]
    assert watcher.findings == []


def test_an_altered_journal_is_named_until_it_is_mended(scene):
    scene.write(5)
    whole = scene.file.read_bytes()
    scene.file.write_bytes(whole.replace(b"quality", b"quantity"))
    watcher = Watcher(scene.folder)
    assert watcher.poll() == []
    assert len(watcher.findings) == 1
    assert "altered line" in _shown(watcher, width=400)
    scene.file.write_bytes(whole)
    assert len(watcher.poll()) == 1
    assert watcher.findings == []


def test_searches_stay_in_the_order_in_which_they_closed_when_their_journals_are_compressed(tmp_path):
    system = searched_system(tmp_path / "system", 3, children=8)
    for age, task in enumerate(("armenian", "greek", "digits")):
        os.utime(system.journal_file(task, 0), (1e9 - age, 1e9 - age))
    watcher = Watcher(system.folder)
    watcher.poll()
    assert [search.task for search in watcher.closed] == ["armenian", "greek", "digits"]
    collect(system, delete=True)
    assert not system.journal_file("digits", 0).exists()
    for each in (watcher, Watcher(system.folder)):
        each.poll()
        assert [search.task for search in each.closed] == ["armenian", "greek", "digits"]


def test_what_became_of_a_child_is_said():
    fates = {
        "survived": {},
        "dropped": {"survived": False},
        "stopped early": {"survived": False, "stopped_early": True},
        "diverged": {"diverged": True},
    }
    for fate, changes in fates.items():
        assert f", {fate}, " in describe(make_child(0, **changes))


def test_the_last_children_are_shown_with_what_was_changed_and_what_came_of_it(scene):
    scene.write(13)
    watcher = Watcher(scene.folder)
    ((search,)) = watcher.poll()
    shown = _shown(watcher, width=240)
    for child in search.children[-8:]:
        fate = "diverged" if child.diverged else "survived" if child.survived else "dropped"
        words = "; ".join(child.mutations) or "unmutated"
        assert re.search(
            rf" {child.number + 1} +{child.parent} {child.parent_id[:6]} +{child.quality:.4f} +{fate} .* s +{re.escape(words)}\s",
            shown,
        )
    assert len(search.children) == 10
    assert f" {search.children[1].number + 1}  {search.children[1].parent}" not in shown


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_on_a_usual_terminal(scene, width):
    scene.write(13)
    watcher = Watcher(scene.folder)
    watcher.poll()
    assert "…" not in _shown(watcher, width)


def test_names_are_shown_as_they_are(scene, monkeypatch):
    search = make_search(make_child(0, mutations=("[bold]block.0[/bold]: clone",)), task="[red]x[/red]", end=None)
    monkeypatch.setattr("evolve.watch.parse_search", lambda records: search)
    scene.write(5)
    watcher = Watcher(scene.folder)
    watcher.poll()
    assert "[red]x[/red]" in _shown(watcher, 200)
    assert "[bold]block.0[/bold]: clone" in _shown(watcher, 200)


def test_time_is_estimated_from_the_latest_children():
    assert seconds_per_child(make_search(make_child(0), children=())) is None
    assert seconds_left(make_search(make_child(0), children=())) is None
    slow = [make_child(n, train_seconds=100.0) for n in range(4)]
    fast = [make_child(4 + n, train_seconds=2.0, evaluate_seconds=1.0) for n in range(8)]
    search = make_search(*slow, *fast, num_planned=16, end=None)
    assert seconds_per_child(search) == 3.0
    assert seconds_left(search) == 12.0


def test_each_child_and_the_end_are_told_once():
    search = make_search(*(make_child(n) for n in range(3)), end=None)
    lines = list(news(search, Told()))
    assert len(lines) == 3
    assert lines[0] == "one, round 1: child 1 of 3, from root root-i, quality 0.5000, score 0.5000, survived, 3.0 s, unmutated"
    closed = make_search(*(make_child(n) for n in range(3)))
    (line,) = news(closed, Told.all_of(search))
    assert line == "one, round 1: closed with quality 0.5000, test accuracy 0.5000"
    assert list(news(closed, Told.all_of(closed))) == []
    # The journal was removed, and the search begun anew.
    assert len(list(news(search, Told(num_children=9, closed=True)))) == 3


class _Enough(Exception):
    """Ends a watch."""


def _follow(watcher, console, *steps):
    """Follows, doing one of these instead of each wait."""
    left = list(steps)

    def sleep(_seconds):
        if not left:
            raise _Enough
        left.pop(0)()

    with pytest.raises(_Enough):
        follow(watcher, console, sleep)
    return console.file.getvalue()


def test_where_there_is_no_terminal_news_are_lines(scene):
    scene.write(3)
    console = rich.console.Console(file=io.StringIO(), width=80)
    said = _follow(Watcher(scene.folder), console, lambda: scene.write(5), lambda: None, lambda: scene.write(20))
    lines = [line for line in said.splitlines() if line.startswith("digits, round 1: ")]
    assert [int(re.search(r"child (\d+) of 16", line)[1]) for line in lines[:-1]] == list(range(2, 17))
    assert "closed with quality" in lines[-1]
    assert "under way" in said.splitlines()[0]


def test_on_a_terminal_the_view_is_live(scene):
    scene.write(3)
    console = rich.console.Console(file=io.StringIO(), width=100, height=40, force_terminal=True)
    said = _follow(Watcher(scene.folder), console, lambda: scene.write(5))
    assert "1/16" in said
    assert "3/16" in said
    assert "\x1b[?25h" in said, "the cursor is shown again"


@pytest.mark.parametrize(("number", "status", "complaint"), [(signal.SIGINT, 0, ""), (signal.SIGTERM, 143, "interrupted\n")])
def test_the_command_ends_cleanly_by_an_interrupt(scene, number, status, complaint):
    scene.write(3)
    command = [sys.executable, "-m", "evolve.cli", "watch", "--system", str(scene.folder)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        assert process.stdout is not None
        assert "under way" in process.stdout.readline()
        scene.write(4)
        for line in process.stdout:
            if "child 2 of 16" in line:
                break
        process.send_signal(number)
        _, complaints = process.communicate(timeout=240)
    assert process.returncode == status
    assert complaints == complaint
