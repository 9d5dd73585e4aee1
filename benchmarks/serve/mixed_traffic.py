"""S2: requests per second for one image and one task each, tasks at random, of the embedded engine / of one whole ONNX model per task.

ViT-Ti/16 at 224 px, 32 tasks in one process, each side with one thread a batch and as many batches at once as CPUs: every third task has a
head only, every third the last block too, every third the last two. The engine has 16 requests open at a time; whole models are run by one
thread a CPU without pause, the best that they can do. Memory is that of a fresh process which has loaded one side and asked each task once,
less what it took before.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from benchmarks.published import SMOKE, TINY, Own, Published, System
from benchmarks.reporting import Ratio, Target, milliseconds, rounded
from benchmarks.serve.loads import Counter, Rate, rate_of_threads
from benchmarks.serve.processes import resident_bytes
from benchmarks.serve.sides import check_equal, engine_of, in_turns, loaded_engine, random_images, whole_model
from benchmarks.serve.workbench import Effort, Workbench
from server.config import num_usable_cpus
from server.engine import Question

NUM_TASKS = 32
OWN = (Own(), Own((11,)), Own((10, 11)))
SYSTEM = System("mixed", TINY, ({f"task-{number}": OWN[number % 3] for number in range(NUM_TASKS)},), whole=True)
SMOKE_SYSTEM = System("mixed", SMOKE, ({"task-0": Own(), "task-1": Own((2,))},), whole=True)


def measure(bench: Workbench) -> None:
    """Measures S2."""
    models = bench.publish(SMOKE_SYSTEM if bench.effort.smoke else SYSTEM)
    engine, whole = bench.apart(time_sides, models, bench.effort)
    ratio = Ratio([side.per_second for side in engine], [side.per_second for side in whole])
    bench.report.figure("S2", ratio.median, Target(">=", 1.0))
    taken = {side: bench.apart(resident, models, side == "engine") for side in ("engine", "whole")}
    bench.report.line(
        figure="S2",
        tasks=len(models.whole),
        requests_at_a_time=bench.effort.requests,
        engine_per_second=rounded(statistics.median(ratio.above)),
        whole_per_second=rounded(statistics.median(ratio.below)),
        cpu_ms_per_request={
            "engine": milliseconds([side.own_cpu for side in engine]),
            "whole": milliseconds([side.own_cpu for side in whole]),
        },
        memory_mib={side: rounded(size / 2**20) for side, size in taken.items()},
        memory_ratio=rounded(taken["engine"] / taken["whole"]) if taken["whole"] else None,
        ratio=ratio.spread(),
    )


def time_sides(models: Published, effort: Effort) -> tuple[list[Rate], list[Rate]]:
    """Returns the rates of the engine and of whole models, repetition by repetition."""
    images = random_images(models, 8)
    tasks = list(models.whole)
    sessions = {task: whole_model(file, 1) for task, file in models.whole.items()}
    rates: tuple[list[Rate], list[Rate]] = ([], [])
    with loaded_engine(models) as (engine, generation):
        for task in tasks:
            answer = engine.answer(Question(generation, images[:1], (task,))).result()
            check_equal(answer[task], sessions[task](images[:1]))

        def engine_rate() -> float:
            requests = at_random(tasks, len(images))
            room = threading.Semaphore(effort.requests)
            counter = Counter(effort.seconds)

            def answered(_: Future[Any]) -> None:
                counter.count()
                room.release()

            while not counter.is_over:
                room.acquire()
                task, image = next(requests)
                engine.answer(Question(generation, images[image : image + 1], (task,))).add_done_callback(answered)
            for _ in range(effort.requests):
                room.acquire()
            rates[0].append(counter.rate)
            return counter.rate.per_second

        def whole_rate() -> float:
            requests, lock = at_random(tasks, len(images)), threading.Lock()

            def work() -> int:
                with lock:
                    task, image = next(requests)
                return len(sessions[task](images[image : image + 1]))

            rates[1].append(rate_of_threads(work, num_usable_cpus(), effort.seconds))
            return rates[1][-1].per_second

        in_turns(engine_rate, whole_rate, effort.repetitions)
    return rates


def at_random(tasks: list[str], num_images: int) -> Iterator[tuple[str, int]]:
    """Gives a task and an image forever, the same ones each time."""
    random = np.random.default_rng(0)
    for _ in itertools.count():
        yield tasks[int(random.integers(len(tasks)))], int(random.integers(num_images))


def resident(models: Published, through_engine: bool) -> int:
    """Returns the bytes that one side takes once each task has been asked. To be run in a process of its own."""
    gc.collect()
    before = resident_bytes(os.getpid())
    image = random_images(models)
    if through_engine:
        with engine_of(models) as ask:
            for task in models.whole:
                ask(image, (task,))
            return resident_bytes(os.getpid()) - before
    sessions = [whole_model(file, 1) for file in models.whole.values()]
    for session in sessions:
        session(image)
    return resident_bytes(os.getpid()) - before
