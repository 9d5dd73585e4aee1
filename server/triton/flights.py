"""What a question becomes at the engine `triton`: parts that fit into one request, and their flights to Tritons."""

from __future__ import annotations

import dataclasses

from server.engine import Question
from server.questions import OpenQuestion
from server.triton.fleet import Member
from server.triton.plans import HeldGeneration, Plan


class Part:
    """Images of a question that are asked together, at most as many as one request takes.

    Attributes:
        opened: whose they are.
        first: index of the first of them.
        count: how many there are.
        is_alone: whether they run in a batch that nobody else's rows join.
        tried: who is not to be asked again, with the life that it had.
    """

    def __init__(self, opened: AskedQuestion, first: int, count: int) -> None:
        self.opened = opened
        self.first = first
        self.count = count
        self.is_alone = count == opened.plan.max_rows
        self.tried: set[tuple[Member, int]] = set()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A part at a Triton.

    Attributes:
        part: what is asked.
        member: who is asked.
        life: which life of the member it was then.
    """

    part: Part
    member: Member
    life: int


class AskedQuestion(OpenQuestion):
    """An open question with its parts.

    Attributes:
        plan: how its tasks are asked.
        parts: together all its images.
    """

    def __init__(self, number: int, question: Question, held: HeldGeneration, due_seconds: float) -> None:
        super().__init__(number, question, held, due_seconds)
        self.plan: Plan = held.plan(question.tasks)
        rows = self.plan.max_rows
        num_images = len(question.images)
        self.parts = [Part(self, start, min(rows, num_images - start)) for start in range(0, num_images, rows)]
