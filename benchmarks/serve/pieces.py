"""S4: a route in three pieces through the embedded engine, against the same route as one ONNX file in a session of its own.

ViT-Ti/16 at 224 px, cut after block 6 and before the final norm: median seconds of one image, calls taken in turns. Beside it, what else
could make them differ: the pieces run by hand, and the one file run by a thread that waits for it, as the engine's do; then all of it with
the process held on one core, where no other core's caches are in play.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable
from typing import Any

from benchmarks.published import SMOKE, TINY, Own, Published, System
from benchmarks.reporting import Ratio, Target, milliseconds
from benchmarks.serve.sides import check_equal, engine_of, medians_in_turns, random_images, whole_model
from benchmarks.serve.workbench import Effort, Workbench
from server.config import num_usable_cpus
from server.repository import Repository

TASK = "route"
SYSTEM = System("pieces", TINY, ({TASK: Own(), "other": Own(tuple(range(6, 12)))},), whole=True)
SMOKE_SYSTEM = System("pieces", SMOKE, ({TASK: Own(), "other": Own((2,))},), whole=True)


def measure(bench: Workbench) -> None:
    """Measures S4."""
    models = bench.publish(SMOKE_SYSTEM if bench.effort.smoke else SYSTEM)
    cpus = num_usable_cpus()
    ways = [(1, 1, False)] if bench.effort.smoke else dict.fromkeys([(1, cpus, False), (cpus, 1, False), (1, 1, True)])
    for threads, workers, one_core in ways:
        ratios = bench.apart(time_pieces, models, threads, workers, one_core, bench.effort)
        if threads == 1 and not one_core:
            bench.report.figure("S4", ratios["pieces, engine"].median, Target("<=", 1.05))
        for what, measured in ratios.items():
            bench.report.line(
                figure="S4",
                threads=threads,
                workers=workers,
                one_core=one_core,
                what=what,
                what_ms=milliseconds(measured.above),
                whole_ms=milliseconds(measured.below),
                ratio=measured.spread(),
            )


def time_pieces(models: Published, threads: int, workers: int, one_core: bool, effort: Effort) -> dict[str, Ratio]:
    """Returns the median seconds of each way to compute the route over those of the whole model.

    The ways: the pieces through the engine; the pieces by hand; the whole model in a thread that waits for it, as the engine's do.
    """
    if one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    image = random_images(models)
    with engine_of(models, threads, workers) as ask, concurrent.futures.ThreadPoolExecutor(1) as other_thread:
        whole = whole_model(models.whole[TASK], threads)
        generation = Repository(models.repository).read()
        route = [generation.segments[name] for name in generation.tasks[TASK].route]
        if len(route) != 3:
            raise RuntimeError(f"found a route of {len(route)} pieces, expected 3")
        pieces = [whole_model(segment.model, threads) for segment in route]

        def by_hand() -> Any:
            values: Any = image
            for piece in pieces:
                values = piece(values)
            return values

        sides: dict[str, Callable[[], Any]] = {
            "pieces, engine": lambda: ask(image, (TASK,))[TASK],
            "pieces, by hand": by_hand,
            "whole, another thread": lambda: other_thread.submit(whole, image).result(),
            "whole": lambda: whole(image),
        }
        for _ in range(3):
            for side in sides.values():
                check_equal(side(), whole(image))
        medians = medians_in_turns(sides, effort)
    return {name: Ratio(values, medians["whole"]) for name, values in medians.items() if name != "whole"}
