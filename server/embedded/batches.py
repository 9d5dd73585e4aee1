"""What the embedded engine's batches are made of: rows on their way through the tree of a question's routes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from server.embedded.carriers import Values
from server.embedded.scheduler import Rows
from server.questions import Branch, OpenQuestion


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cargo:
    """What rows in a queue carry.

    Attributes:
        open_question: whose rows.
        branch: where in its tree they are.
        values: [rows, ...], the input of the branch's segment.
        first_image: index of the image that `values[0]` belongs to.
    """

    open_question: OpenQuestion
    branch: Branch
    values: Values
    first_image: int


def values_of(rows: Rows[Cargo]) -> Values:
    """Returns the input of some rows, [rows, ...]."""
    return rows.payload.values[rows.first : rows.first + rows.count]


class SegmentCounters:
    """Counts what a segment runs. Guarded by the engine's lock."""

    def __init__(self) -> None:
        self.rows_requested = 0
        self.rows_computed = 0
        self.executions = 0

    def count(self, batch: Sequence[Rows[Cargo]]) -> None:
        """Counts a batch."""
        counted = [rows for rows in batch if rows.payload.open_question.question.counted]
        self.rows_requested += sum(rows.count * rows.payload.branch.num_tasks for rows in counted)
        self.rows_computed += sum(rows.count for rows in counted)
        self.executions += bool(counted)
