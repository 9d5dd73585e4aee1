"""Which of the generations in a repository servers answer from: going back, and trying one beside the current one.

Every server of the repository follows, those too that start later. Nothing here makes a generation or removes one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

from evolve.errors import ExportError
from evolve.export.repository import Repository, open_for_release
from evolve.observers import Tell
from munet.v1 import generation_pb2


@dataclasses.dataclass(frozen=True)
class Release:
    """What servers of a repository answer from.

    Attributes:
        current: number of the current generation.
        canary: number of the one that is tried beside it; none if none is.
        percent: so many of a hundred requests about a task go to the canary.
        percent_of_task: where it is another part, by the task's name.
        kept: numbers of all generations that are there, ascending.
    """

    current: int
    canary: int | None
    percent: float
    percent_of_task: Mapping[str, float]
    kept: tuple[int, ...]


def check_percent(percent: float) -> None:
    """Checks a canary's part of the requests.

    Raises:
        ExportError: it is not from 0 to 100.
    """
    if not 0 <= percent <= 100:
        raise ExportError(f"found {percent:g} percent", "0 to 100 of a hundred requests")


def read_release(repository: pathlib.Path, progress: Tell | None = None) -> Release:
    """Returns what servers of a repository answer from.

    Raises:
        ExportError: nothing was published there, or what was cannot be read.
    """
    with _holding(repository, progress) as opened:
        return _release(opened)


def roll_back(repository: pathlib.Path, number: int | None = None, progress: Tell | None = None) -> Release:
    """Makes a generation that is still there the current one. A canary ends; what is published next gets a number that none had.

    Args:
        repository: the model repository.
        number: which; none means the one that the newest generation was published on top of, if the newest is current. So of two people
            who go back at once, neither goes back twice.
        progress: takes a sentence if there is a reason to wait.

    Raises:
        ExportError: no such generation is there, or a file of it is missing; what is current stays.
    """
    with _holding(repository, progress) as opened:
        if number is None:
            newest = max((number for number in opened.generations if not _is_canary(opened, number)), default=0)
            if opened.current != newest:
                raise ExportError(
                    f"found {repository} at generation {opened.current}, while {newest} is the newest that can be read",
                    f"the number of the one to go to: {_numbers(opened)}",
                )
            number = opened.generations[newest].previous if newest else 0
        _check_there(opened, number)
        opened.make_current(number)
        return _release(opened)


def set_canary(
    repository: pathlib.Path,
    *,
    number: int | None = None,
    percent: float | None = None,
    percent_of_task: Mapping[str, float] | None = None,
    progress: Tell | None = None,
) -> Release:
    """Has servers try a generation that is there beside the current one, or try it more or less.

    Args:
        repository: the model repository.
        number: which, newer than the current one; none means the one that is tried already.
        percent: so many of a hundred requests about a task that it answers otherwise go to it; none leaves it as it is.
        percent_of_task: where it is another part, by the task's name; other tasks' stay as they are.
        progress: takes a sentence if there is a reason to wait.

    Raises:
        ExportError: there is no such generation, or it is not newer; or a percentage is none. All stays as it is.
    """
    with _holding(repository, progress) as opened:
        canary = generation_pb2.Canary()
        canary.CopyFrom(opened.canary or canary)
        if number is not None and number != canary.generation:
            canary = generation_pb2.Canary(generation=number)
        if not canary.generation:
            raise ExportError("found no canary", "one, published with --canary, or a generation's number")
        canary.percent = canary.percent if percent is None else percent
        canary.percent_of_task.update(percent_of_task or {})
        for one in (canary.percent, *canary.percent_of_task.values()):
            check_percent(one)
        _check_there(opened, canary.generation)
        if canary.generation <= opened.current:
            raise ExportError(
                f"found canary {canary.generation} beside generation {opened.current}", "one that is newer", "or roll back to it"
            )
        unknown = sorted(set(canary.percent_of_task) - {task.name for task in opened.generations[canary.generation].tasks})
        if unknown:
            raise ExportError(f"found a percentage of {unknown[0]!r}", f"tasks of generation {canary.generation}")
        opened.put_canary(canary)
        return _release(opened)


def promote(repository: pathlib.Path, progress: Tell | None = None) -> Release:
    """Makes the canary the current generation.

    Raises:
        ExportError: there is none, or a file of it is missing; all stays as it is.
    """
    with _holding(repository, progress) as opened:
        if opened.canary is None:
            raise ExportError("found no canary", "one to promote")
        _check_there(opened, opened.canary.generation)
        opened.make_current(opened.canary.generation)
        return _release(opened)


def end_canary(repository: pathlib.Path, progress: Tell | None = None) -> Release:
    """Has servers try nothing beside the current generation. The canary's generation stays, as long as it is one of the newest.

    Raises:
        ExportError: nothing was published there, or what was cannot be read.
    """
    with _holding(repository, progress) as opened:
        opened.remove_canary()
        return _release(opened)


@contextlib.contextmanager
def _holding(repository: pathlib.Path, progress: Tell | None) -> Iterator[Repository]:
    try:
        with open_for_release(repository, progress or (lambda _: None)) as opened:
            yield opened
    except OSError as error:
        raise ExportError(f"could not write to {repository} ({error.strerror or error})", "a writable folder") from error


def _release(opened: Repository) -> Release:
    canary = opened.canary
    return Release(
        current=opened.current,
        canary=canary.generation if canary else None,
        percent=canary.percent if canary else 0.0,
        percent_of_task=dict(canary.percent_of_task) if canary else {},
        kept=tuple(sorted(opened.generations)),
    )


def _is_canary(opened: Repository, number: int) -> bool:
    return opened.canary is not None and opened.canary.generation == number


def _check_there(opened: Repository, number: int) -> None:
    generation = opened.generations.get(number)
    if generation is None:
        raise ExportError(f"found no generation {number} in {opened.folder}", f"one that is kept: {_numbers(opened)}")
    for file in generation.files:
        path = opened.folder / file.path
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            raise ExportError(
                f"found generation {number} without {file.path}", "all its files", "`munet-server check` names faults"
            )


def _numbers(opened: Repository) -> str:
    return ", ".join(map(str, sorted(opened.generations)))
