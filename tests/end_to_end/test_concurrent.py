"""Several real processes on one system and one repository at once, killed at random moments, while a server watches."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import random
import threading
import time
from typing import Self

import numpy as np
import pytest

from evolve.journal import Record, read_journal
from evolve.store import System
from evolve.verification import verify
from server.client import Client
from server.repository import Repository
from tests.end_to_end.conftest import SETTINGS, TASKS
from tests.support.commands import Command, Commands
from tests.support.processes import ServerProcess, server

NUM_KILLS = int(os.environ.get("MUNET_TEST_KILLS", "8"))
"""A soak has more: one system after another, until so many processes were killed."""


class Witness:
    """Looks at a system and its repository while others work on them: whatever was whole once stays, and stays as it is."""

    def __init__(self, system: pathlib.Path, repository: pathlib.Path) -> None:
        self._system = system
        self._repository = repository
        self._reader = Repository(repository)
        self._files: dict[pathlib.Path, tuple[int, int]] = {}
        self._journals: dict[pathlib.Path, list[Record]] = {}
        self.generation = 0

    def look(self) -> None:
        if System.exists(self._system):
            assert verify(System.open(self._system)) == []
            self._look_at_files()
        if (self._repository / "CURRENT").exists():
            # Every checksum, every config, every route.
            found = self._reader.read().number
            assert found >= self.generation
            self.generation = found

    def _look_at_files(self) -> None:
        found = {}
        for file in (*self._system.glob("layers/*/*.safetensors"), *self._system.glob("paths/*.json")):
            status = file.stat()
            found[file] = (status.st_mtime_ns, status.st_size)
        assert found.items() >= self._files.items(), "a layer or path was changed or is gone"
        self._files = found
        for file in self._system.glob("journal/*.jsonl"):
            records = read_journal(file)
            assert records[: len(self._journals.get(file, []))] == self._journals.get(file, []), "a journal lost a record"
            self._journals[file] = records
        assert all(file.exists() for file in self._journals)


class Caller(threading.Thread):
    """Asks a server for all its tasks, again and again."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        self._is_over = threading.Event()
        self.failure: BaseException | None = None
        self.generations: list[int] = []
        self.paths: dict[int, set[tuple[tuple[str, str], ...]]] = collections.defaultdict(set)

    def run(self) -> None:
        image = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        try:
            with Client(self._address) as client:
                while not self._is_over.is_set():
                    answer = client.classify_tasks(image)
                    self.generations.append(answer.generation)
                    self.paths[answer.generation].add(tuple(sorted((task.task, task.path_id) for task in answer.tasks)))
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()


def test_killed_at_random_moments_nothing_is_lost_and_nothing_torn(
    commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    killed = number = 0
    while killed < NUM_KILLS:
        life = Life(commands, experiment, tmp_path / str(number), random.Random(number), min(20, NUM_KILLS - killed))
        life.begin()
        life.go_on()
        killed += life.num_killed
        number += 1


class Life:
    """A system that grows from nothing to its end by three processes at once, which are killed and started again."""

    def __init__(
        self, commands: Commands, experiment: pathlib.Path, folder: pathlib.Path, moments: random.Random, most_kills: int
    ) -> None:
        self.system, self.repository = folder / "system", folder / "repository"
        self.num_killed = 0
        self._commands = commands
        self._command = ("run", experiment, "--system", self.system, "--repository", self.repository, "--task")
        self._moments = moments
        self._most_kills = most_kills
        self._witness = Witness(self.system, self.repository)
        self._running: dict[str, Command] = {}
        self._pending: set[str] = set()

    def begin(self) -> None:
        """The first round of two tasks; who of them makes the system is for them to settle."""
        self._bring({"a", "b"}, 1, self._most_kills // 2)

    def go_on(self) -> None:
        """To the end, while a server answers from whatever is published."""
        with ServerProcess(self.repository) as process, Caller(process.address) as caller:
            self._bring({"a", "b", "c"}, 2, self._most_kills)
            _check_the_end(self._commands, self.system, self.repository)
            deadline = time.monotonic() + 120
            while caller.is_alive() and caller.generations[-1:] != [self._witness.generation]:
                assert time.monotonic() < deadline, "the server did not take up the last generation"
                time.sleep(0.05)
        assert process.status == 0
        assert caller.failure is None, repr(caller.failure)
        assert len(set(caller.generations)) > 1
        assert caller.generations == sorted(caller.generations), "an older generation answered after a newer one"
        assert all(len(paths) == 1 for paths in caller.paths.values()), "an answer mixed two generations"

    def _bring(self, tasks: set[str], rounds: int, most_kills: int) -> None:
        self._pending = set(tasks)
        while self._pending:
            self._step(rounds, most_kills)

    def _step(self, rounds: int, most_kills: int) -> None:
        """Starts what does not run, and ends one process, by killing it while there are kills left."""
        for name in sorted(self._pending - self._running.keys()):
            self._running[name] = self._commands.start(*self._command, name, "--rounds", str(rounds))
        time.sleep(self._moments.uniform(0.02, 1.0))
        name = self._moments.choice(sorted(self._running))
        if self.num_killed < most_kills:
            self._running[name].kill()
        ended = self._running.pop(name)
        status = ended.wait()
        assert status in (0, -9), ended.output
        self.num_killed += status == -9
        if status == 0:
            self._pending.remove(name)
        self._witness.look()


def _pause_when_there(command: Command, folder: pathlib.Path, pattern: str) -> None:
    """Stops a process as soon as it has written a file of such a name."""
    deadline = time.monotonic() + 60
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, command.output
        time.sleep(0.001)
    command.pause()


def test_two_runs_of_one_task_at_once(commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = ("run", experiment, "--system", tmp_path / "system", "--rounds", "1", "--task", "a")
    first = commands.start(*arguments)
    _pause_when_there(first, tmp_path, "system/journal/a-0001.jsonl")
    status, said = commands.run(*arguments)
    assert status == 2
    assert said.endswith(
        f"error: found another process at work on task 'a' of {tmp_path / 'system'}; expected one at a time; "
        "wait until it ends; other tasks can be evolved meanwhile, each with --task\n"
    )
    first.go_on()
    assert first.wait() == 0, first.output
    assert verify(System.open(tmp_path / "system")) == []


def test_two_experiments_with_different_roots_cannot_make_one_system(
    commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = experiment.with_name("other.toml")
    other.write_text(SETTINGS.replace("[defaults]", "blocks = 2\n[defaults]"))
    both = [commands.start("run", file, "--system", tmp_path, "--rounds", "1", "--task", "a") for file in (experiment, other)]
    ended = sorted((command.wait(), command.output) for command in both)
    assert [status for status, _ in ended] == [0, 2], ended
    assert "use the same root, or another folder: a system keeps its root for life" in ended[1][1]
    assert verify(System.open(tmp_path)) == []


def test_a_task_may_be_removed_while_another_evolves_from_it(
    commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = ("run", experiment, "--system", tmp_path, "--rounds", "1", "--task")
    assert commands.run(*run, "a")[0] == 0
    for name, is_killed in (("b", False), ("c", True)):
        command = commands.start(*run, name)
        _pause_when_there(command, tmp_path, f"journal/{name}-0001.jsonl")
        assert commands.run("remove", "--system", tmp_path, "--task", "a")[0] == 0
        if is_killed:
            command.kill()
        command.go_on()
        assert command.wait() == (-9 if is_killed else 0)
        assert commands.run(*run, name)[0] == 0
        system = System.open(tmp_path)
        assert verify(system) == []
        assert system.tasks()[name].rounds == 1
        assert "a" not in system.tasks()
        assert commands.run(*run, "a")[0] == 0


def test_a_publisher_that_waits_goes_on_when_the_other_is_killed(
    commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert commands.run("run", experiment, "--system", tmp_path / "system", "--rounds", "1", "--task", "a")[0] == 0
    for attempt in range(10):
        repository = tmp_path / f"repository-{attempt}"
        command = ("export", "--system", tmp_path / "system", "--repository", repository)
        first = commands.start(*command)
        _pause_when_there(first, repository, "seg-*")
        second = commands.start(*command)
        time.sleep(0.5)
        was_late = (repository / "CURRENT").exists()
        first.kill()
        status = first.wait()
        assert second.wait() == 0
        if not was_late:
            assert status == -9
            break
        assert status in (0, -9)
    assert not was_late, "the first publisher was never caught in the act"
    assert "published generation 1" in second.output
    assert Repository(repository).read().number == 1
    assert not list(repository.rglob("*.part"))


def _check_the_end(commands: Commands, folder: pathlib.Path, repository: pathlib.Path) -> None:
    system = System.open(folder)
    records = system.tasks()
    assert {name: record.rounds for name, record in records.items()} == dict.fromkeys(TASKS, 2)
    assert max(record.order for record in records.values()) == 2 * len(TASKS), "each closed round counts once"
    assert commands.run("verify", "--system", folder)[0] == 0
    status, shown = commands.run("show", "--system", folder, "--json")
    summary = json.loads(shown)
    assert status == 0
    assert sum(task["accounted_parameters"] for task in summary["tasks"]) == pytest.approx(summary["num_parameters"])
    for name in TASKS:
        for round_number in range(2):
            types = [record["type"] for record in read_journal(system.journal_file(name, round_number))]
            assert types == ["open", *["generation", "pack", "pack", "pack"] * 2, "close"]
    generation = Repository(repository).read()
    assert {name: task.path_id for name, task in generation.tasks.items()} == {n: r.path_id for n, r in records.items()}
    result = server("check", "--repository", repository)
    assert (result.returncode, result.stderr) == (0, "")
    system.remove_unfinished()
    assert not list(folder.rglob("*.part"))
    assert not list(repository.rglob("*.part"))
