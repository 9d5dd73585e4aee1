"""What became of the children of a search: what their journal says of it, and counts of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from evolve.generation import ChildResult
from evolve.journal import Record


def remarks_on(result: ChildResult, stopped_after: int | None = None) -> dict[str, Any]:
    """Returns what a journal says of a child that did not train as most do; nothing of others.

    Args:
        result: of the child.
        stopped_after: the interval after which it was judged, counted from 1; None if it was trained to its end.
    """
    remarks: dict[str, Any] = {}
    if result.diverged:
        remarks["diverged"] = True
    if stopped_after is not None:
        remarks["stopped_after"] = stopped_after
    if result.batch_parts > 1:
        remarks["batch_parts"] = result.batch_parts
    return remarks


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Counts of trained children.

    Attributes:
        trained: all of them.
        survived: joined the population.
        diverged: met a loss or weight that is not finite, and scored nothing.
        stopped_early: could not beat their parent any more, see evolve.judgement.
        in_parts: needed more memory than there was for a whole batch at once, see evolve.training.memory.
    """

    trained: int = 0
    survived: int = 0
    diverged: int = 0
    stopped_early: int = 0
    in_parts: int = 0

    @staticmethod
    def of(children: Iterable[Record]) -> Outcomes:
        """Counts what the journal says of children."""
        return sum(map(Outcomes.of_one, children), Outcomes())

    @staticmethod
    def of_one(child: Record) -> Outcomes:
        """Counts one child."""
        return Outcomes(
            trained=1,
            survived=int(child["survived"]),
            diverged=int(child.get("diverged", False)),
            stopped_early=int("stopped_after" in child),
            in_parts=int("batch_parts" in child),
        )

    def __add__(self, other: Outcomes) -> Outcomes:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Outcomes(*(one + another for one, another in pairs))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What did not go as it does for most: `2 children diverged`; empty if nothing."""
        counts = {
            "diverged": self.diverged,
            "stopped early": self.stopped_early,
            "computed in parts for want of memory": self.in_parts,
        }
        return tuple(f"{count} {'child' if count == 1 else 'children'} {what}" for what, count in counts.items() if count)

    def __str__(self) -> str:
        """Says how many survived, and what else happened: `12 survived, 2 children diverged`."""
        return ", ".join([f"{self.survived} survived", *self.remarks])
