"""A month of many jobs on one system, in processes of several machines that are killed at random; and what must hold of what is left."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import random
import signal
import time
from typing import Any

import pytest

from evolve.closing import ActiveTask
from evolve.documents import TaskRecord
from evolve.journal import Record, read_journal
from evolve.lineage import lineage_of
from evolve.path import Path
from evolve.scoring import accounted_parameters, sharing_counts
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from evolve.summary import summarise
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, QuietObserver, tiny_root
from tests.support.jobs import TOLD, Jobs
from tests.support.searches import small_plan

AT_ONCE = 3
LONGEST_PAUSE_SECONDS = 0.06
MAX_SEEDS = 3


def active_task(name: str) -> ActiveTask:
    """A task of the month."""
    return ActiveTask(name, ("x", "y", "z")[: 2 + len(name) % 2], 40, f"f-{name}")


def month_plan(rounds: int) -> SearchPlan:
    """How each job searches."""
    return small_plan(5, rounds=rounds, children_per_task=4, generation_size=2, max_seeds=MAX_SEEDS, scale_factor=0.8)


@dataclasses.dataclass
class Job:
    """A round of a task.

    Attributes:
        task: its name.
        round: counted from 0.
        started: moment of the first attempt.
        ended: moment at which an attempt was found to be done; None before.
    """

    task: str
    round: int
    started: int
    ended: int | None = None


class Month:
    """Runs jobs to their ends.

    Attributes:
        jobs: by task and round.
        num_killed: processes.
        num_told: processes that ended because of another at work on their task.
    """

    def __init__(self, jobs: Jobs, location: str, machines: list[pathlib.Path], seed: int) -> None:
        self.jobs: dict[tuple[str, int], Job] = {}
        self.num_killed = self.num_told = 0
        self._processes = jobs
        self._location = location
        self._machines = machines
        self._draws = random.Random(seed)
        self._moment = 0
        self._pause_seconds = 0.01
        # The job of each process, and whether it is to be tried again until it is done.
        self._running: dict[int, tuple[Job, bool]] = {}

    def run(self, num_jobs: int, *, most_kills: int) -> None:
        """Runs so many jobs."""
        while True:
            while len(self._running) < AT_ONCE and len(self.jobs) < num_jobs:
                self._begin()
            if not self._running:
                return
            self._step(most_kills)

    def _begin(self) -> None:
        under_way = {job.task for job, _ in self._running.values()}
        done = [job for job in self.jobs.values() if job.ended is not None and job.task not in under_way]
        if self._running and self._draws.random() < 0.06:
            # By mistake, once more and elsewhere.
            self._start(self._draws.choice([job for job, _ in self._running.values()]), is_wanted=False)
        elif done and self._draws.random() < 0.5:
            task = self._draws.choice(done).task
            last = max(job.round for job in done if job.task == task)
            self._start(self._add(task, last + 1), is_wanted=True)
        else:
            self._start(self._add(f"task-{len(self.jobs)}", 0), is_wanted=True)

    def _add(self, task: str, number: int) -> Job:
        return self.jobs.setdefault((task, number), Job(task, number, self._next()))

    def _start(self, job: Job, *, is_wanted: bool) -> None:
        cache = str(self._draws.choice(self._machines))
        process = self._processes.start(location=self._location, cache=cache, task=job.task, rounds=job.round + 1)
        self._running[process] = (job, is_wanted)

    def _step(self, most_kills: int) -> None:
        time.sleep(self._draws.uniform(0, self._pause_seconds))
        process = self._draws.choice(list(self._running))
        status = self._processes.poll(process)
        # However fast this machine is, most of the processes that are looked at still run.
        self._pause_seconds = min(LONGEST_PAUSE_SECONDS, self._pause_seconds * (1.3 if status is None else 0.6))
        if status is None and self.num_killed < most_kills and self._draws.random() < 0.5:
            os.kill(process, signal.SIGKILL)
            status = self._processes.wait(process)
        if status is None:
            return
        job, is_wanted = self._running.pop(process)
        assert status in (0, -9, TOLD), self._processes.errors
        self.num_killed += status == -9
        self.num_told += status == TOLD
        if status == 0:
            job.ended = job.ended or self._next()
        elif is_wanted and job.ended is None:
            self._start(job, is_wanted=True)

    def _next(self) -> int:
        self._moment += 1
        return self._moment


class Audit:
    """Looks at what a month has left, from a machine that took no part."""

    def __init__(self, system: System, month: Month) -> None:
        self.system = system
        self.month = month
        system.pull()
        self.journals: dict[tuple[str, int], list[Record]] = {
            (journal.task, journal.round): read_journal(journal.file) for journal in system.journals()
        }
        self._paths: dict[str, Path] = {}
        self.parents = {
            child["path_id"]: child["parent_id"]
            for records in self.journals.values()
            for record in records
            if record["type"] == "pack"
            for child in record["children"]
        }

    def check(self) -> None:
        """Checks all that must hold."""
        records = self.system.tasks()
        assert {name: record.rounds for name, record in records.items()} == {
            task: 1 + max(number for name, number in self.month.jobs if name == task) for task, _ in self.month.jobs
        }
        assert self.journals.keys() == self.month.jobs.keys()
        assert verify(self.system) == []
        summary = summarise(self.system)
        assert sum(task.accounted_parameters for task in summary.tasks) == pytest.approx(summary.num_parameters)
        self._check_parents({record.path_id: record.parent_id for record in records.values()})
        for (task, number), journal in self.journals.items():
            opened, closed = journal[0], journal[-1]
            assert [record["type"] for record in journal] == ["open", *["generation", "pack", "pack"] * 2, "close"]
            self._check_snapshot(task, number, opened["snapshot"])
            self._check_children(task, opened["snapshot"], journal)
            if number + 1 == records[task].rounds:
                assert (closed["path_id"], closed["num_children"]) == (records[task].path_id, records[task].num_children)
        for name in records:
            with self.system.evolving(name):
                pass

    def _check_parents(self, parents: dict[str, str]) -> None:
        """The parent of each current path is its nearest ancestor that is current, or the root."""
        for path_id, parent_id in parents.items():
            ancestor = self.parents[path_id]
            while ancestor not in parents and ancestor != self.system.root.id:
                ancestor = self.parents[ancestor]
            assert parent_id == ancestor

    def _check_snapshot(self, task: str, number: int, rows: list[dict[str, Any]]) -> None:
        """It is what was published when the search opened: what had ended before, nothing that began afterwards."""
        job = self.month.jobs[task, number]
        assert job.ended is not None
        seen = {row["name"]: row["rounds"] for row in rows}
        assert seen.get(task, 0) == number
        for row in rows:
            published = self.journals[row["name"], row["rounds"] - 1][-1]
            assert (row["path_id"], row["quality"]) == (published["path_id"], published["quality"])
            assert row["num_children"] == published["num_children"]
        for other in self.month.jobs.values():
            if other.ended is not None and other.ended < job.started:
                assert seen.get(other.task, 0) > other.round
            if other.started > job.ended:
                assert seen.get(other.task, 0) <= other.round
        self._check_parents({row["path_id"]: row["parent_id"] for row in rows})

    def _check_children(self, task: str, rows: list[dict[str, Any]], journal: list[Record]) -> None:
        """Seeds are the newest other tasks, then the root; sharing is counted as the snapshot has it."""
        others = sorted((row for row in rows if row["name"] != task), key=lambda row: (-row["order"], row["name"]))
        seeds = [*(row["path_id"] for row in others[: MAX_SEEDS - 1]), self.system.root.id]
        planned = [child for record in journal if record["type"] == "generation" for child in record["children"]]
        assert [child["parent_id"] for child in planned[: len(seeds)]] == seeds
        assert not any(child["mutations"] for child in planned[: len(seeds)])
        sharing = sharing_counts(self._path(row["path_id"]) for row in others)
        for record in journal:
            for child in record["children"] if record["type"] == "pack" else ():
                if child["survived"]:
                    assert child["accounted_parameters"] == accounted_parameters(self._path(child["path_id"]), sharing)

    def check_rerun(self, task: str, number: int, folder: pathlib.Path) -> None:
        """A job done again from its snapshot, alone and in one go, comes out alike."""
        journal = self.journals[task, number]
        system = System.create(folder, tiny_root(), 32)
        for row in journal[0]["snapshot"]:
            self._copy(self._path(row["path_id"]), system)
            system.put_task(TaskRecord.from_dict(row))
        run_rounds(system, [(active_task(task), FakeTrainer)], month_plan(number + 1), QuietObserver())
        assert lineage_of(read_journal(system.journal_file(task, number))) == lineage_of(journal)

    def _path(self, path_id: str) -> Path:
        if path_id not in self._paths:
            self._paths[path_id] = self.system.path(path_id)
        return self._paths[path_id]

    def _copy(self, path: Path, system: System) -> None:
        for _, layer in path.layers:
            system.put_layer(layer.spec, self.system.tensors(layer.id))
        system.put_path(path)
