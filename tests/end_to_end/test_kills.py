"""A real search in real processes, killed, interrupted and tidied up after at random moments: it ends in the very same system."""

from __future__ import annotations

import json
import pathlib
import random
import signal
import time

import pytest

from evolve.journal import read_journal
from evolve.lineage import lineage_hash
from evolve.store import System
from evolve.verification import verify
from tests.support.commands import Command, Commands

NUM_KILLS = 10
PATIENCE_SECONDS = 400


@pytest.fixture(scope="module")
def whole(commands: Commands, experiment: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The lineage hash of a run in one go."""
    folder = tmp_path_factory.mktemp("whole") / "system"
    status, said = commands.run("run", experiment, "--system", folder)
    assert status == 0, said
    status, shown = commands.run("show", "--system", folder, "--json")
    assert status == 0, shown
    shown_hash = json.loads(shown)["lineage_hash"]
    assert shown_hash == lineage_hash(System.open(folder))
    assert f"lineage {shown_hash}\n" in commands.run("show", "--system", folder)[1]
    return shown_hash


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_in_the_very_same_system(
    commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path, whole: str
) -> None:
    folder = tmp_path / "system"
    moments = random.Random(5)
    num_late = 0
    # 60 records make a whole run; the last kills come while the last search is at work.
    for num_records in sorted(moments.sample(range(56), NUM_KILLS)):
        command = commands.start("run", experiment, "--system", folder)
        _wait_for(command, lambda least=num_records, command=command: command.ended or _num_records(folder) >= least)
        time.sleep(moments.uniform(0, 0.15))
        command.kill()
        status = command.wait()
        assert status in (0, -9), command.output
        num_late += status == 0
    # A search may be at its end before it is killed where the machine is fast or this process stood still: the last ones, and no others.
    assert num_late <= 2
    status, said = commands.run("run", experiment, "--system", folder)
    assert status == 0, said
    system = System.open(folder)
    assert verify(system) == []
    assert lineage_hash(system) == whole


@pytest.mark.slow
def test_collected_beside_it_all_the_time_it_ends_in_the_very_same_system(
    commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path, whole: str
) -> None:
    """Searches, exports and collections at once, searches killed now and then."""
    folder, repository = tmp_path / "system", tmp_path / "repository"
    moments = random.Random(1)
    search = commands.start("run", experiment, "--system", folder)
    _wait_for(search, lambda: System.exists(folder) and bool(System.open(folder).tasks()))
    export = commands.start("export", "--system", folder, "--repository", repository)
    num_collected = num_exported = num_killed = 0
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        assert time.monotonic() < deadline
        status, said = commands.run("gc", "--system", folder, "--delete")
        assert status == 0, said
        num_collected += "would" not in said
        if export.ended:
            assert export.wait() == 0, export.output
            num_exported += 1
            export = commands.start("export", "--system", folder, "--repository", repository)
        if num_killed < 3 and moments.random() < 0.2:
            search.kill()
        if search.ended:
            status = search.wait()
            if status == 0:
                break
            assert status == -9, search.output
            num_killed += 1
            search = commands.start("run", experiment, "--system", folder)
    assert export.wait() == 0, export.output
    assert num_collected > 3
    assert commands.run("gc", "--system", folder, "--delete")[0] == 0
    system = System.open(folder)
    assert verify(system) == []
    assert lineage_hash(system) == whole
    assert all(journal.file.suffix == ".gz" for journal in system.journals())
    status, said = commands.run("export", "--system", folder, "--repository", repository)
    assert status == 0, said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on_and_that_works(
    commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path, whole: str, number: int, status: int
) -> None:
    folder = tmp_path / "my system"
    command = commands.start("run", experiment, "--system", folder, "--restart")
    _wait_for(command, lambda: _num_finished(folder) >= 2)
    command.send(number)
    assert command.wait() == status
    expected = (
        f"interrupted; nothing that was finished is lost: the same command goes on from here: munet-evolve run {experiment} "
    )
    assert command.output.splitlines()[-1] == f"{expected}--system '{folder}'"
    assert not list(folder.rglob("*.part"))
    assert all(file.read_bytes()[-1:] in (b"", b"\n") for file in folder.rglob("*.jsonl"))
    done = _num_finished(folder)
    again = commands.start("run", experiment, "--system", folder)
    assert again.wait() == 0, again.output
    assert f"going on after {done % 6}" in again.output or done % 6 == 0
    assert lineage_hash(System.open(folder)) == whole


def _wait_for(command: Command, condition) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, command.output
        assert not command.ended, command.output
        time.sleep(0.005)


def _num_records(folder: pathlib.Path) -> int:
    """Whole lines of all journals."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("journal/*.jsonl"))


def _num_finished(folder: pathlib.Path) -> int:
    """Children that the journals have."""
    return sum(
        len(record["children"])
        for file in folder.glob("journal/*.jsonl")
        for record in read_journal(file)
        if record["type"] == "pack"
    )
