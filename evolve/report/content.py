"""Everything that a report says, computed from the files of a system. Torch-free; nothing here draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from evolve.documents import TaskRecord
from evolve.report.baselines import Baseline, read_baselines
from evolve.report.mutations import Payoff, payoffs
from evolve.report.searches import Search, read_searches
from evolve.report.structure import Structure, structure_of
from evolve.store import System
from evolve.summary import SystemSummary, TaskSummary, summarise

SEARCH = "search"
"""What the search itself is called among the methods."""

UNEQUAL = 0.1
"""From which share of a difference on, steps are called unequal: a baseline leaves out a remainder, a search rounds up to generations."""


@dataclasses.dataclass(frozen=True)
class Standing:
    """A task on the leaderboard.

    Attributes:
        task: what it is made of.
        accuracy: test accuracy, 0 to 1; without a test split, quality.
        is_tested: whether it is test accuracy.
        rival: the baseline with the best accuracy of the same sort; None if there is none.
        margin: accuracy minus the rival's; None without one.
    """

    task: TaskSummary
    accuracy: float
    is_tested: bool
    rival: Baseline | None
    margin: float | None


@dataclasses.dataclass(frozen=True)
class MethodStanding:
    """A method over those tasks that it was tested on.

    Attributes:
        method: of a baseline, or `search`.
        num_tasks: tasks with a test accuracy of it.
        accuracy: mean test accuracy over them, 0 to 1.
        margin: accuracy minus that of the search, mean over the same tasks; 0 for the search.
        accounted_parameters: mean over them.
        num_trained_images: sum over them.
        flops: sum over them.
        seconds: of training and validation, sum over them.
    """

    method: str
    num_tasks: int
    accuracy: float
    margin: float
    accounted_parameters: float
    num_trained_images: int
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class TaskCost:
    """What the searches of a task cost, all rounds together.

    Attributes:
        task: the task.
        num_searches: rounds begun.
        num_children: finished.
        num_survived: that joined a population.
        num_diverged: whose losses or weights were not finite.
        num_stopped_early: that could not beat their parent any more and were trained no further.
        num_trained_images: counted with repetition.
        flops: of training and validation.
        train_seconds: spent training.
        evaluate_seconds: spent validating.
        examine_seconds: spent on test splits and example images.
        other_seconds: wall time beside all these, of the rounds of which it is known.
    """

    task: str
    num_searches: int
    num_children: int
    num_survived: int
    num_diverged: int
    num_stopped_early: int
    num_trained_images: int
    flops: float
    train_seconds: float
    evaluate_seconds: float
    examine_seconds: float
    other_seconds: float

    @property
    def seconds(self) -> float:
        """All that is known to have been spent."""
        return self.train_seconds + self.evaluate_seconds + self.examine_seconds + self.other_seconds


@dataclasses.dataclass(frozen=True)
class Content:
    """What a report says.

    Attributes:
        summary: of the system.
        standings: of its tasks, the best accuracy first.
        methods: the search and the baselines, the best margin first; empty without baselines.
        baselines: finished ones.
        structure: of the multitask model.
        searches: in the order in which they opened.
        payoffs: of mutations.
        costs: of each task of which there are searches, in the order of their first.
        findings: what could not be read or is left out, a sentence each.
    """

    summary: SystemSummary
    standings: tuple[Standing, ...]
    methods: tuple[MethodStanding, ...]
    baselines: tuple[Baseline, ...]
    structure: Structure
    searches: tuple[Search, ...]
    payoffs: tuple[Payoff, ...]
    costs: tuple[TaskCost, ...]
    findings: tuple[str, ...]

    def searches_of(self, task: str) -> list[Search]:
        """Returns the searches of a task, in the order of their rounds."""
        return [search for search in self.searches if search.task == task]


def read_content(system: System) -> Content:
    """Returns everything that a report says of a system.

    Raises:
        DamagedError: a current path or one of its layers is missing or altered. Journals that cannot be read are findings.
    """
    searches, findings = read_searches(system.folder)
    baselines, more = read_baselines(system.folder)
    costs = tuple(cost_of(task, searches) for task in dict.fromkeys(search.task for search in searches))
    # Whoever publishes and collects garbage meanwhile takes nothing away between one look and the next.
    with system.locks.reading():
        summary, structure = summarise(system), structure_of(system, searches)
        records = system.tasks()
    strangers = [base for base in baselines if _is_of_other_data(base, records)]
    baselines = [base for base in baselines if base not in strangers]
    more += [f"the baseline {base.method} of {base.task} had other data than the search; it is left out" for base in strangers]
    more += list(_unequal(baselines, costs))
    return Content(
        summary=summary,
        standings=tuple(rank(summary.tasks, baselines)),
        methods=tuple(compare(summary.tasks, baselines, costs)),
        baselines=tuple(baselines),
        structure=structure,
        searches=tuple(searches),
        payoffs=tuple(payoffs(searches)),
        costs=costs,
        findings=(*findings, *more),
    )


def _is_of_other_data(baseline: Baseline, records: Mapping[str, TaskRecord]) -> bool:
    """Whether a baseline cannot be compared with what the search of its task made."""
    record = records.get(baseline.task)
    return record is not None and baseline.data_fingerprint not in (None, record.data_fingerprint)


def _unequal(baselines: Iterable[Baseline], costs: Iterable[TaskCost]) -> Iterator[str]:
    """Yields a sentence for each baseline that was trained clearly shorter or longer than the search of its task."""
    searched = {cost.task: cost.num_trained_images for cost in costs}
    for base in baselines:
        images = searched.get(base.task)
        if images and abs(base.num_trained_images / images - 1) > UNEQUAL:
            yield (
                f"the baseline {base.method} of {base.task} was trained on {base.num_trained_images:,} images and the search on "
                f"{images:,}: the comparison is not one of equal steps"
            )


def rank(tasks: Iterable[TaskSummary], baselines: Sequence[Baseline]) -> list[Standing]:
    """Returns the tasks with their best rivals, the best accuracy first, ties by name."""
    standings = []
    for task in tasks:
        is_tested = task.test_accuracy is not None
        accuracy = task.quality if task.test_accuracy is None else task.test_accuracy
        rivals = [
            (base.test_accuracy if is_tested else base.quality, base)
            for base in baselines
            if base.task == task.name and (base.test_accuracy is not None or not is_tested)
        ]
        best, rival = max(rivals, key=lambda pair: pair[0] or 0.0, default=(None, None))
        standings.append(Standing(task, accuracy, is_tested, rival, None if best is None else accuracy - best))
    return sorted(standings, key=lambda standing: (-standing.accuracy, standing.task.name))


def compare(tasks: Iterable[TaskSummary], baselines: Iterable[Baseline], costs: Iterable[TaskCost]) -> list[MethodStanding]:
    """Returns the search and every baseline over the tasks that each was tested on; empty without a tested baseline.

    The best margin comes first: means over different tasks cannot be compared.
    """
    tested = {task.name: task for task in tasks if task.test_accuracy is not None}
    by_method: dict[str, list[Baseline]] = {}
    for base in baselines:
        if base.test_accuracy is not None and base.task in tested:
            by_method.setdefault(base.method, []).append(base)
    if not by_method:
        return []
    cost = {cost.task: cost for cost in costs if cost.task in tested}
    rows = [
        MethodStanding(
            method=SEARCH,
            num_tasks=len(tested),
            accuracy=_mean([task.test_accuracy or 0.0 for task in tested.values()]),
            margin=0.0,
            accounted_parameters=_mean([task.accounted_parameters for task in tested.values()]),
            num_trained_images=sum(one.num_trained_images for one in cost.values()),
            flops=sum(one.flops for one in cost.values()),
            seconds=sum(one.train_seconds + one.evaluate_seconds for one in cost.values()),
        )
    ]
    for method, those in by_method.items():
        rows.append(
            MethodStanding(
                method=method,
                num_tasks=len(those),
                accuracy=_mean([base.test_accuracy or 0.0 for base in those]),
                margin=_mean([(base.test_accuracy or 0.0) - (tested[base.task].test_accuracy or 0.0) for base in those]),
                accounted_parameters=_mean([base.accounted_parameters for base in those]),
                num_trained_images=sum(base.num_trained_images for base in those),
                flops=sum(base.flops for base in those),
                seconds=sum(base.train_seconds + base.evaluate_seconds for base in those),
            )
        )
    return sorted(rows, key=lambda row: (-row.margin, row.method))


def cost_of(task: str, searches: Iterable[Search]) -> TaskCost:
    """Returns what the searches of a task cost."""
    those = [search for search in searches if search.task == task]
    children = [child for search in those for child in search.children]
    return TaskCost(
        task=task,
        num_searches=len(those),
        num_children=len(children),
        num_survived=sum(child.survived for child in children),
        num_diverged=sum(child.diverged for child in children),
        num_stopped_early=sum(child.stopped_early for child in children),
        num_trained_images=sum(child.num_trained_images for child in children),
        flops=sum(child.flops for child in children),
        train_seconds=sum(child.train_seconds for child in children),
        evaluate_seconds=sum(child.evaluate_seconds for child in children),
        examine_seconds=sum(search.end.examine_seconds for search in those if search.end is not None),
        other_seconds=sum(search.other_seconds or 0.0 for search in those),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
