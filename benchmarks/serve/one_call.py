"""S1: one image and all tasks in one call of the embedded engine, against one call to each task's whole model.

ViT-S/16 at 224 px, 8 tasks that share 10 of 12 blocks, in one process with the same ONNX Runtime threads. The figure is the ratio of the
times as a share of its bound T / (f + T(1-f)), where f is the shared part of a forward pass by floating point operations (evolve.flops).
Measured three times: both sides on one thread (the figure); both on all CPUs, with one ONNX Runtime pool of so many threads; both on all
CPUs, with one thread for a batch and as many batches at once as CPUs, which is how the engine is set by default.
"""

from __future__ import annotations

import concurrent.futures
from typing import Any

from benchmarks.published import SMALL, SMOKE, Own, Published, System
from benchmarks.reporting import Ratio, Target, milliseconds, rounded, seconds_of
from benchmarks.serve.sides import check_equal, engine_of, in_turns, random_images, whole_model
from benchmarks.serve.workbench import Workbench
from server.config import num_usable_cpus

SYSTEM = System("one-call", SMALL, ({f"task-{number}": Own((10, 11)) for number in range(8)},), whole=True)
SMOKE_SYSTEM = System("one-call", SMOKE, ({f"task-{number}": Own((2,)) for number in range(2)},), whole=True)


def measure(bench: Workbench) -> None:
    """Measures S1."""
    models = bench.publish(SMOKE_SYSTEM if bench.effort.smoke else SYSTEM)
    cpus = num_usable_cpus()
    shared, count = models.shared, len(models.whole)
    bound = count / (shared + count * (1 - shared))
    ways = [(1, 1)] if bench.effort.smoke else dict.fromkeys([(1, 1), (cpus, 1), (1, cpus)])
    for threads, workers in ways:
        ratio = bench.apart(time_tasks, models, threads, workers, bench.effort.repetitions)
        if (threads, workers) == (1, 1):
            bench.report.figure("S1", ratio.median / bound, Target(">=", 0.85))
        bench.report.line(
            figure="S1",
            threads=threads,
            workers=workers,
            tasks=count,
            shared=rounded(shared),
            bound=rounded(bound),
            one_call_ms=milliseconds(ratio.below),
            one_call_a_task_ms=milliseconds(ratio.above),
            ratio=ratio.spread(),
            of_bound=ratio.spread(1 / bound),
        )


def time_tasks(models: Published, threads: int, workers: int, repetitions: int) -> Ratio:
    """Returns seconds of one call a task over seconds of one call for all tasks, so many batches at once on both sides."""
    image = random_images(models)
    tasks = tuple(models.whole)
    with engine_of(models, threads, workers) as ask, concurrent.futures.ThreadPoolExecutor(workers) as callers:
        sessions = [whole_model(file, threads) for file in models.whole.values()]

        def one_call() -> Any:
            return ask(image, tasks)

        def one_call_a_task() -> list[Any]:
            if workers == 1:
                return [session(image) for session in sessions]
            return list(callers.map(lambda session: session(image), sessions))

        for _ in range(2):
            for found, expected in zip(one_call().values(), one_call_a_task(), strict=True):
                check_equal(found, expected)
        return in_turns(lambda: seconds_of(one_call_a_task), lambda: seconds_of(one_call), repetitions)
