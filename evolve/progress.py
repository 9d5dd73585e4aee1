"""Progress of loading, searching and publishing for a person to follow: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import rich.console
import rich.progress

from evolve.baseline import Method
from evolve.documents import TaskRecord
from evolve.generation import ChildPlan, GenerationPlan
from evolve.journal import Record
from evolve.outcomes import Outcomes
from evolve.path import Path

LINE_SECONDS = 10.0
"""Where there is no terminal, long loading and publishing say a line as often."""


@contextlib.contextmanager
def loading(console: rich.console.Console, task: str) -> Iterator[Callable[[int, int], None]]:
    """Gives what evolve.data.load.load_task tells its progress: a bar on a terminal, now and then a plain line elsewhere.

    Args:
        console: decides whether it is a terminal.
        task: name of the task whose data are loaded.
    """
    if console.is_terminal:
        columns = rich.progress.Progress.get_default_columns()
        with rich.progress.Progress(*columns, console=console, transient=True) as bar:
            row = bar.add_task(f"{task}: images", total=None)
            yield lambda done, total: bar.update(row, completed=done, total=total)
        return
    said = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            console.print(f"{task}: {done} of {total} images read", highlight=False, markup=False, soft_wrap=True)

    yield tell


@contextlib.contextmanager
def publishing(console: rich.console.Console, repository: pathlib.Path) -> Iterator[Callable[[str], None]]:
    """Gives what evolve.export.publish tells its progress: a live line on a terminal, now and then a plain line elsewhere.

    Args:
        console: decides whether it is a terminal.
        repository: that is published to.
    """
    if console.is_terminal:
        with console.status(f"publishing to {repository}") as status:
            yield status.update
        return
    said = time.monotonic()

    def tell(sentence: str) -> None:
        nonlocal said
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            console.print(f"{repository}: {sentence}", highlight=False, markup=False, soft_wrap=True)

    yield tell


class ProgressObserver:
    """Prints what a search does; see evolve.search.Observer.

    On a terminal, one bar per search with the best quality and the time left, and a line for each closed task. Elsewhere, one plain
    line per generation and per closed task.
    """

    def __init__(self, console: rich.console.Console) -> None:
        """Prints to a console, which decides whether it is a terminal."""
        self._console = console
        self._live = console.is_terminal
        self._bar: rich.progress.Progress | None = None
        self._row: rich.progress.TaskID | None = None
        self._started = 0.0
        self._best = 0.0
        self._done = 0
        self._total = 0
        self._outcomes = Outcomes()
        self._task = ""

    def search_opened(self, task: str, round_number: int, seeds: Sequence[Path], num_children: int, reused: int) -> None:
        """Starts a bar or prints a line."""
        self._task, self._started, self._best, self._outcomes = task, time.monotonic(), 0.0, Outcomes()
        self._done, self._total = 0, num_children
        names = ", ".join(seed.task or "root" for seed in seeds)
        going_on = f", going on after {reused}" if reused else ""
        self._say(f"{task}: round {round_number + 1}, {num_children} children from {names}{going_on}")
        if self._live:
            columns = rich.progress.Progress.get_default_columns()
            self._bar = rich.progress.Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._row = self._bar.add_task(task, total=num_children)

    def generation_planned(self, plan: GenerationPlan) -> None:
        """Nothing to show before results come."""

    def child_finished(self, plan: ChildPlan, record: Record) -> None:
        """Moves the bar, or prints a line now and then."""
        self._done += 1
        self._outcomes += Outcomes.of_one(record)
        self._best = max(self._best, record["quality"])
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=self._done, description=f"{self._task}: best {self._best:.1%}")
        elif self._done == self._total or self._done % max(1, self._total // 8) == 0:
            seconds = time.monotonic() - self._started
            self._say(
                f"{self._task}: {self._done}/{self._total} children, {self._outcomes}, best quality {self._best:.4f}, {seconds:.1f} s"
            )

    def search_closed(self, task: str, path: Path, record: TaskRecord) -> None:
        """Ends the bar and prints the result."""
        self.stop()
        test = "" if record.test_accuracy is None else f", test accuracy {record.test_accuracy:.4f}"
        seconds = time.monotonic() - self._started
        remarks = "".join(f", {remark}" for remark in self._outcomes.remarks)
        self._say(
            f"{task}: quality {record.quality:.4f}{test}, {path.num_blocks} blocks, path {path.id[:8]}, {seconds:.1f} s{remarks}"
        )

    def stop(self) -> None:
        """Ends the live view; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class BaselineProgressObserver:
    """Prints a line for each replica and each finished baseline; see evolve.baseline.BaselineObserver."""

    def __init__(self, console: rich.console.Console) -> None:
        """Prints to a console."""
        self._console = console
        self._total = 0

    def baseline_opened(self, task: str, method: Method, num_replicas: int, reused: int) -> None:
        """Prints a line."""
        self._total = num_replicas
        going_on = f", going on after {reused}" if reused else ""
        self._say(f"{task}: {method}, {num_replicas} replicas{going_on}")

    def replica_finished(self, task: str, method: Method, record: Record) -> None:
        """Prints a line."""
        seconds = record["seconds"]["wall"]
        diverged = ", diverged" if record.get("diverged") else ""
        self._say(
            f"{task}: {method}, {record['replica'] + 1}/{self._total}, quality {record['quality']:.4f}{diverged}, {seconds:.1f} s"
        )

    def baseline_closed(self, task: str, method: Method, record: Record) -> None:
        """Prints the result."""
        test = "" if record["test_accuracy"] is None else f", test accuracy {record['test_accuracy']:.4f}"
        seconds = record["seconds"]["wall"]
        self._say(f"{task}: {method}, quality {record['quality']:.4f}{test}, {seconds:.1f} s")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
