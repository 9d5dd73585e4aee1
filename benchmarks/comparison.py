"""A search beside its baselines: what each run gave, gathered into rows, a table and the figures Q1, Q2 and Q8. Pure; benchmarks.characters
runs.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.reporting import Target, rounded

SEARCH, FINETUNE = "search", "finetune"
TUNED = " (tuned)"
"""What the names of tuned baselines end with."""


def is_search(method: str) -> bool:
    """Tells whether a method is the search, or the search with other settings, which has a name of its own behind it."""
    return method.partition(" ")[0] == SEARCH


@dataclasses.dataclass(frozen=True)
class TaskOutcome:
    """What one run gave for one task.

    Attributes:
        task: its name.
        quality: validation accuracy, 0 to 1.
        test_accuracy: 0 to 1.
        accounted_parameters: each layer's divided by the number of tasks that use it.
        num_trained_images: in training, counted with repetition.
        flops: of training and validation, estimated.
        seconds: of training and validation.
    """

    task: str
    quality: float
    test_accuracy: float
    accounted_parameters: float
    num_trained_images: int
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        method: such as `search`, `search scaled`, `freeze:2` or `freeze:2 (tuned)`.
        seed: of the run.
        outcomes: of the tasks that are finished.
        num_tasks: how many there will be.
    """

    method: str
    seed: int
    outcomes: tuple[TaskOutcome, ...]
    num_tasks: int

    @property
    def is_complete(self) -> bool:
        """Whether every task is finished."""
        return len(self.outcomes) == self.num_tasks

    @property
    def test_accuracy(self) -> float:
        """Mean over the tasks, 0 to 1."""
        return statistics.fmean(outcome.test_accuracy for outcome in self.outcomes)

    @property
    def accounted_parameters(self) -> float:
        """Mean over the tasks."""
        return statistics.fmean(outcome.accounted_parameters for outcome in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """Returns what a line says of it."""
        return {
            "run": self.method,
            "seed": self.seed,
            "complete": self.is_complete,
            "test_accuracy": {outcome.task: rounded(outcome.test_accuracy) for outcome in self.outcomes},
            "quality": {outcome.task: rounded(outcome.quality) for outcome in self.outcomes},
            "accounted_parameters": {outcome.task: round(outcome.accounted_parameters) for outcome in self.outcomes},
            "total_parameters": round(sum(outcome.accounted_parameters for outcome in self.outcomes)),
            "num_trained_images": sum(outcome.num_trained_images for outcome in self.outcomes),
            "flops": rounded(sum(outcome.flops for outcome in self.outcomes)),
            "seconds": rounded(sum(outcome.seconds for outcome in self.outcomes)),
        }


@dataclasses.dataclass(frozen=True)
class Row:
    """One method over its complete runs.

    Attributes:
        method: its name.
        runs: one for each seed.
        full_parameters: accounted parameters per task of full fine-tuning; NaN if that is not known yet.
    """

    method: str
    runs: tuple[Run, ...]
    full_parameters: float

    @property
    def test_accuracy(self) -> float:
        """Mean over tasks and seeds, 0 to 1."""
        return statistics.fmean(run.test_accuracy for run in self.runs)

    @property
    def standard_error(self) -> float:
        """Of the mean over the seeds; NaN with one seed."""
        return standard_error([run.test_accuracy for run in self.runs])

    @property
    def share(self) -> float:
        """Accounted parameters per task over those of full fine-tuning."""
        return statistics.fmean(run.accounted_parameters for run in self.runs) / self.full_parameters

    def of_task(self, task: str) -> float:
        """Mean test accuracy of one task over the seeds."""
        return statistics.fmean(outcome.test_accuracy for run in self.runs for outcome in run.outcomes if outcome.task == task)

    def to_json(self) -> dict[str, Any]:
        """Returns what a line says of it."""
        tasks = [outcome.task for outcome in self.runs[0].outcomes]

        def mean(name: str) -> float:
            return statistics.fmean(sum(getattr(outcome, name) for outcome in run.outcomes) for run in self.runs)

        return {
            "method": self.method,
            "seeds": [run.seed for run in self.runs],
            "test_accuracy": {task: rounded(self.of_task(task)) for task in tasks},
            "mean_test_accuracy": rounded(self.test_accuracy),
            "standard_error": number(self.standard_error),
            "accounted_share_per_task": number(self.share),
            "total_parameters": round(mean("accounted_parameters")),
            "num_trained_images": round(mean("num_trained_images")),
            "flops": rounded(mean("flops")),
            "seconds": rounded(mean("seconds")),
        }


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure of docs or targets; see benchmarks.reporting.Report.figure."""

    name: str
    value: float
    target: Target
    note: str


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """Returns one row for each method with a complete run, in the order in which methods come."""
    complete = [run for run in runs if run.is_complete]
    methods = list(dict.fromkeys(run.method for run in complete))
    full = [run.accounted_parameters for run in complete if run.method == FINETUNE]
    full_parameters = statistics.fmean(full) if full else math.nan
    return [
        Row(method, tuple(sorted((r for r in complete if r.method == method), key=lambda run: run.seed)), full_parameters)
        for method in methods
    ]


def best_of(rows: Iterable[Row], *, tuned: bool, kind: str = "") -> Row | None:
    """Returns the baseline of the best mean test accuracy on the first seed, where every method has run; None if there is none.

    Chosen on the test images, which can only help the baseline.

    Args:
        rows: of all methods.
        tuned: whether tuned baselines are meant, or those with the default hyperparameters.
        kind: what its name begins with.
    """
    baselines = [
        row for row in rows if not is_search(row.method) and row.method.endswith(TUNED) == tuned and row.method.startswith(kind)
    ]
    return max(baselines, key=lambda row: row.runs[0].test_accuracy, default=None)


def margin(above: Row, below: Row) -> tuple[float, float, list[int]]:
    """Returns the difference of mean test accuracies in points over the seeds that both have, its standard error, and those seeds."""
    pairs = [(one, other) for one in above.runs for other in below.runs if one.seed == other.seed]
    differences = [100 * (one.test_accuracy - other.test_accuracy) for one, other in pairs]
    mean = statistics.fmean(differences) if differences else math.nan
    return mean, standard_error(differences), [one.seed for one, _ in pairs]


def figures_of(runs: Iterable[Run]) -> list[Figure]:
    """Returns the figures for which there are complete runs. Points are percentage points of mean test accuracy."""
    rows = rows_of(runs)
    named = {row.method: row for row in rows}
    search, finetune, rival = named.get(SEARCH), named.get(FINETUNE), best_of(rows, tuned=True)
    searches = [row for row in rows if is_search(row.method)]
    others = [row for row in rows if not is_search(row.method) and row.method != FINETUNE and not row.method.endswith(TUNED)]
    figures: list[Figure] = []
    if search is not None and finetune is not None:
        figures.append(_points("Q1", search, finetune, 2.39))
    if search is not None and others:
        figures.append(_points("Q1 others", search, min(others, key=lambda row: margin(search, row)[0]), 0.0))
    for row in searches if finetune is not None else ():
        name = row.method.replace(SEARCH, "Q2", 1)
        figures.append(_parameters(name, row, finetune, 0.53 if row is search else 0.25))
        if row is not search:
            figures.append(_points(f"{name} loss", row, finetune, 0.0))
    for row in searches if rival is not None else ():
        name = row.method.replace(SEARCH, "Q8", 1)
        figures.append(_points(name, row, rival, 0.0))
        if finetune is not None:
            figures.append(_parameters(f"{name} parameters", row, rival, 0.3))
    return figures


def _points(name: str, above: Row, below: Row, bound: float) -> Figure:
    points, error, seeds = margin(above, below)
    with_error = f"standard error {rounded(error)}, " if math.isfinite(error) else ""
    return Figure(name, points, Target(">=", bound), f"points above {below.method}; {with_error}seeds {seeds}")


def _parameters(name: str, row: Row, other: Row, bound: float) -> Figure:
    return Figure(name, row.share / other.share, Target("<=", bound), f"accounted parameters a task of {other.method}'s")


def table_of(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table, accuracies in %."""
    if not rows:
        return "no method has a complete run yet\n"
    tasks = [outcome.task for outcome in rows[0].runs[0].outcomes]
    titles = ["method", "seeds", *tasks, "mean", "s.e.", "accounted", "parameters", "images", "TFLOP", "seconds"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        cells = row.to_json()
        lines.append(
            [
                row.method,
                str(len(row.runs)),
                *(f"{100 * row.of_task(task):.1f}" for task in tasks),
                f"{100 * row.test_accuracy:.2f}",
                f"{100 * row.standard_error:.2f}" if len(row.runs) > 1 else "-",
                f"{row.share:.3f}",
                f"{cells['total_parameters']:,}",
                f"{cells['num_trained_images']:,}",
                f"{cells['flops'] / 1e12:,.0f}",
                f"{cells['seconds']:,.0f}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean; NaN for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def number(value: float) -> float | None:
    """Returns a value with four significant digits; None, which JSON has, for NaN, which it has not."""
    return rounded(value) if math.isfinite(value) else None
