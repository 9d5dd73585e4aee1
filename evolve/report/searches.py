"""Searches as their journals tell them: finished ones, unfinished ones, and ones that are running. Torch-free."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evolve.errors import EvolveError
from evolve.journal import Record, child_records, read_journal, search_journals
from evolve.outcomes import Outcomes

ROOT = "root"
"""What a parent or trainer is called that is the root; no task's path is ever compared with it, only ids are."""


@dataclasses.dataclass(frozen=True)
class Child:
    """One finished child.

    Attributes:
        number: its place in the order in which the children of this search finished, from 0.
        generation: number of its generation, from 0.
        index: its number within the generation, from 0.
        path_id: what it became.
        parent_id: the path it was sampled from.
        parent: the task that the parent belonged to, or `root`.
        mutations: in words, as planned.
        hyperparameters: by name.
        trained_layers: ids of the layers that it trained.
        quality: 0 to 1.
        score: under the snapshot of its search.
        parent_score: of a parent of its own task, else None: children of seeds always survive.
        survived: whether it joined the population.
        diverged: whether its training ended with losses or weights that were not finite.
        stopped_early: whether it could not beat its parent any more and was trained no further, see evolve.judgement.
        accounted_parameters: as if it were its task's current path.
        num_trained_images: counted with repetition.
        flops: of training and validation.
        train_seconds: spent training.
        evaluate_seconds: spent validating.
    """

    number: int
    generation: int
    index: int
    path_id: str
    parent_id: str
    parent: str
    mutations: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    trained_layers: tuple[str, ...]
    quality: float
    score: float
    parent_score: float | None
    survived: bool
    diverged: bool
    stopped_early: bool
    accounted_parameters: float
    num_trained_images: int
    flops: float
    train_seconds: float
    evaluate_seconds: float

    @property
    def seconds(self) -> float:
        """Spent on it in all."""
        return self.train_seconds + self.evaluate_seconds


@dataclasses.dataclass(frozen=True)
class SearchEnd:
    """How a search closed.

    Attributes:
        path_id: the path that became current.
        quality: 0 to 1.
        score: under the snapshot of the search.
        test_accuracy: 0 to 1; None without a test split.
        examine_seconds: spent on the test split and the example images.
        wall_seconds: of the process that closed it; earlier processes of a resumed search are not in it.
        reused_seconds: training and validation by those earlier processes; None in a journal of a version that did not say.
    """

    path_id: str
    quality: float
    score: float
    test_accuracy: float | None
    examine_seconds: float
    wall_seconds: float
    reused_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Search:
    """One round of one task.

    Attributes:
        task: the active task.
        round: from 0.
        opened_after: rounds of any task that the system had closed when it opened.
        num_planned: children that the settings ask for.
        num_generations: generations that the settings ask for.
        generation: number of the generation sampled last, from 0; -1 before the first.
        scale_factor: 1 is off.
        quality_before: of the task's current path when it opened; None in its first round.
        children: finished, in the order in which they finished.
        end: None as long as it is unfinished.
    """

    task: str
    round: int
    opened_after: int
    num_planned: int
    num_generations: int
    generation: int
    scale_factor: float
    quality_before: float | None
    children: tuple[Child, ...]
    end: SearchEnd | None

    @property
    def best(self) -> Child | None:
        """The child with the best score so far, the earlier on ties."""
        return max((child for child in self.children if child.survived), key=lambda child: child.score, default=None)

    @property
    def num_survived(self) -> int:
        """Children that joined the population."""
        return sum(child.survived for child in self.children)

    @property
    def num_diverged(self) -> int:
        """Children whose losses or weights were not finite."""
        return sum(child.diverged for child in self.children)

    @property
    def num_stopped_early(self) -> int:
        """Children that could not beat their parent any more and were trained no further."""
        return sum(child.stopped_early for child in self.children)

    @property
    def other_seconds(self) -> float | None:
        """Wall time of the process that closed it that was neither training nor validation nor examination; None if not known."""
        if self.end is None or self.end.reused_seconds is None:
            return None
        trained = sum(child.seconds for child in self.children) - self.end.reused_seconds
        return max(0.0, self.end.wall_seconds - self.end.examine_seconds - trained)


def read_searches(folder: pathlib.Path) -> tuple[list[Search], list[str]]:
    """Returns the searches of a system in the order in which they opened, and a sentence for each journal that cannot be read.

    Args:
        folder: of the system.
    """
    searches, findings = [], []
    for place, file in search_journals(folder).items():
        try:
            search = parse_search(read_journal(file))
        except EvolveError as error:
            findings.append(str(error))
            continue
        if search is None:
            continue
        if place != (search.task, search.round):
            findings.append(f"found the journal of round {search.round + 1} of {search.task!r} in {file}; it is left out")
            continue
        searches.append(search)
    return sorted(searches, key=lambda search: (search.opened_after, search.round, search.task)), findings


def parse_search(records: Sequence[Record]) -> Search | None:
    """Returns the search that a journal's records tell of; None if it says nothing yet."""
    if not records:
        return None
    opened = records[0]
    task: str = opened["task"]
    settings = opened["settings"]["search"]
    num_generations = -(-settings["children_per_task"] // settings["generation_size"])
    generations = [record for record in records if record["type"] == "generation"]
    closed = next((record for record in records if record["type"] == "close"), None)
    names: dict[str, str] = {row["path_id"]: row["name"] for row in opened["snapshot"]} | {opened["root"]: ROOT}
    origins = {
        (record["index"], child["index"]): [origin for _, origin in child["origins"]]
        for record in generations
        for child in record["children"]
    }
    positions = _places(records)
    return Search(
        task=task,
        round=opened["round"],
        opened_after=max((row["order"] for row in opened["snapshot"]), default=0),
        num_planned=num_generations * settings["generation_size"],
        num_generations=num_generations,
        generation=len(generations) - 1,
        scale_factor=settings["scale_factor"],
        quality_before=next((row["quality"] for row in opened["snapshot"] if row["name"] == opened["task"]), None),
        children=tuple(
            _child(number, generation, planned, came, names.get(came["parent_id"], task), origins)
            for number, (generation, (planned, came)) in enumerate(zip(positions, child_records(records), strict=True))
        ),
        end=None if closed is None else _end(closed),
    )


def _places(records: Iterable[Record]) -> Iterator[int]:
    """Yields the generation of each finished child, in the order of `child_records`."""
    for record in records:
        if record["type"] == "pack":
            yield from [record["generation"]] * len(record["children"])


def _child(
    number: int,
    generation: int,
    planned: Record,
    came: Record,
    parent: str,
    origins: Mapping[tuple[int, int], Sequence[str]],
) -> Child:
    kinds = origins[generation, came["index"]]
    outcome = Outcomes.of_one(came)
    return Child(
        number=number,
        generation=generation,
        index=came["index"],
        path_id=came["path_id"],
        parent_id=came["parent_id"],
        parent=parent,
        mutations=tuple(planned["mutations"]),
        hyperparameters=planned["hyperparameters"],
        trained_layers=tuple(layer for (_, layer), kind in zip(came["layers"], kinds, strict=True) if kind != "shared"),
        quality=came["quality"],
        score=came["score"],
        parent_score=came["parent_score"],
        survived=bool(outcome.survived),
        diverged=bool(outcome.diverged),
        stopped_early=bool(outcome.stopped_early),
        accounted_parameters=came["accounted_parameters"],
        num_trained_images=came["num_trained_images"],
        flops=came["flops"],
        train_seconds=came["seconds"]["train"],
        evaluate_seconds=came["seconds"]["evaluate"],
    )


def _end(closed: Record) -> SearchEnd:
    return SearchEnd(
        path_id=closed["path_id"],
        quality=closed["quality"],
        score=closed["score"],
        test_accuracy=closed["test_accuracy"],
        examine_seconds=closed["seconds"]["examine"],
        wall_seconds=closed["seconds"]["wall"],
        reused_seconds=closed["seconds"].get("reused"),
    )
