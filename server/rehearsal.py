"""The last look at a loaded generation before it answers anybody: whether it answers its golden images as torch did."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from munet.parity import find_disagreement
from server.engine import Engine, Question
from server.errors import Finding, SegmentRunError, ServerError
from server.generation import Generation, Task

NUM_REHEARSED_TASKS = 64
"""Tasks in one question of a rehearsal: enough to share what they share, few enough to let other questions in between."""


def rehearse(engine: Engine, generation: Generation, tasks: list[Task]) -> list[Finding]:
    """Asks a loaded generation its golden images; this also runs each of its segments once before a caller does.

    Args:
        engine: what holds the generation.
        generation: what to ask.
        tasks: the tasks to ask, of this generation.

    Returns:
        A finding for each task that does not answer as it should.
    """
    findings: list[Finding] = []
    by_images: dict[tuple[str, int], list[Task]] = {}
    for task in tasks:
        by_images.setdefault((str(task.golden.images), task.image_size), []).append(task)
    for alike in by_images.values():
        for start in range(0, len(alike), NUM_REHEARSED_TASKS):
            findings += _rehearse_together(engine, generation, alike[start : start + NUM_REHEARSED_TASKS])
    return findings


def _rehearse_together(engine: Engine, generation: Generation, tasks: list[Task]) -> Iterator[Finding]:
    golden = tasks[0].golden
    try:
        question = Question(generation, golden.read_images(), tuple(task.name for task in tasks), counted=False)
        answers = engine.answer(question).result()
    except (OSError, ValueError) as error:
        yield Finding(golden.images.name, str(error)[:300], f"the golden images of tasks of {tasks[0].image_size} pixels")
        return
    except SegmentRunError as error:
        if len(tasks) > 1:
            # One of them is to blame, and the finding is to name it.
            for task in tasks:
                yield from _rehearse_together(engine, generation, [task])
        else:
            yield Finding(f"task {tasks[0].name!r}: golden answer", str(error), "logits", "export it again")
        return
    except ServerError as error:
        yield Finding(f"golden answers of {len(tasks)} tasks", str(error), "logits")
        return
    for task in tasks:
        disagreement = find_disagreement(answers[task.name], task.golden.logits, task.golden.tolerance)
        if disagreement is not None:
            yield Finding(f"task {task.name!r}: golden answer", *disagreement, "export it again")


def changed_tasks(generation: Generation, serving: Generation | None) -> list[Task]:
    """Returns the tasks that the serving generation does not already answer with the same segments and golden answers."""
    if serving is None:
        return list(generation.tasks.values())
    changed = []
    for task in generation.tasks.values():
        known = serving.tasks.get(task.name)
        if (
            known is None
            or known.route != task.route
            or known.golden.images != task.golden.images
            or known.golden.tolerance != task.golden.tolerance
            or not np.array_equal(known.golden.logits, task.golden.logits)
        ):
            changed.append(task)
    return changed
