"""S7 and S8: reloads under load. Does any answer fail, or mix generations; does latency or memory suffer?

ViT-Ti/16 at 224 px, 4 tasks: one has a head only, one the last block too, one the last two, one an adapter. Two generations in which what a
task has of its own differs, each current in turn, 1,000 times, by a rename of CURRENT and the admin service's Reload. Meanwhile requests
for one image and one task come at a fixed rate, a third of what the server could answer, whether or not earlier ones are answered; those
that would find 32 open are left out and counted, which happens only where something else takes the CPUs.

S7      is failed + torn answers: an answer is torn if its logits are not those that an engine of its own, which holds nothing else, gives
        for the generation that it names.
S7 p99  is the 99th percentile of requests that began during a reload / of all others.
S8      is resident memory after the last 10 reloads / after the 10th to the 19th. Before the first of them as many requests as may be open
        at once are asked together, several times: buffers of what runs at once are there then.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np

from benchmarks.published import SMOKE, TINY, Own, Published, System, make_current
from benchmarks.reporting import Target, rounded
from benchmarks.serve.processes import Server, num_open, resident_by_kind, resident_bytes, server_process
from benchmarks.serve.sides import Logits, Pixels, loaded_engine, random_images
from benchmarks.serve.workbench import Effort, Workbench
from server.client import AsyncAdminClient, AsyncClient, CallError
from server.config import num_usable_cpus
from server.engine import Question

TASKS = {"head": Own(), "block": Own((11,)), "blocks": Own((10, 11)), "adapter": Own(adapters=(9,))}
SYSTEM = System("reloads", TINY, (TASKS, TASKS))
SMOKE_TASKS = {"head": Own(), "block": Own((2,))}
SMOKE_SYSTEM = System("reloads", SMOKE, (SMOKE_TASKS, SMOKE_TASKS))
GENERATIONS = (1, 2)
LOAD = 1 / 3
"""Share of what the server could answer that is asked."""
MOST_OPEN = 32
SAMPLES = 10
"""Reloads after which memory is looked at, at either end."""
MARKS = (10, 20, 50, 100, 200, 500, 1000)
"""Reloads after which memory is reported."""
LONGEST_PAUSE_SECONDS = 0.2
MOST_P99 = 1.2
TORN = 1e-5
"""Logits of an answer that differ by more from what its generation answers are another generation's, which differ by far more."""

Answers = Mapping[tuple[int, str], Logits]
"""By generation and task, [images, classes]."""


@dataclasses.dataclass
class Record:
    """What happened.

    Attributes:
        answers: when each request began, and the seconds it took.
        reloads: when each began, and ended.
        failures: what callers were told.
        left_out: requests that would have found too many open.
        torn: answers.
        largest_difference: of a logit from what it should be, torn answers apart.
        resident: bytes after each reload.
        kinds: what is resident after the reloads of `MARKS`, in MiB by kind.
        open: files and threads after some.
    """

    answers: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    reloads: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    left_out: int = 0
    torn: int = 0
    largest_difference: float = 0.0
    resident: list[int] = dataclasses.field(default_factory=list)
    kinds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    open: list[dict[str, int]] = dataclasses.field(default_factory=list)

    def p99(self, during: bool) -> float:
        """Returns the 99th percentile of the seconds of requests that began during a reload, or of all others."""
        ends = np.array([end for _, end in self.reloads])
        begins = np.array([begin for begin, _ in self.reloads])
        taken = []
        for begun, seconds in self.answers:
            # The first reload that ends later: requests and reloads are recorded on one clock.
            index = int(np.searchsorted(ends, begun))
            if (index < len(begins) and begins[index] <= begun) == during:
                taken.append(seconds)
        return float(np.percentile(taken, 99)) if taken else float("nan")


def measure(bench: Workbench) -> None:
    """Measures S7 and S8."""
    models = bench.publish(SMOKE_SYSTEM if bench.effort.smoke else SYSTEM)
    images = random_images(models, 4)
    expected = {}
    for number in GENERATIONS:
        make_current(models.repository, number)
        expected |= bench.apart(answers_of, models, images)
    with server_process(models.repository, "--watch-interval", "3600") as server:
        record = asyncio.run(reload_under_load(server, models, images, expected, bench.effort))
    first, last = record.resident[SAMPLES - 1 : 2 * SAMPLES - 1], record.resident[-SAMPLES:]
    during, steady = record.p99(True), record.p99(False)
    bench.report.figure("S7", len(record.failures) + record.torn, Target("<=", 0))
    bench.report.figure("S7 p99", during / steady, Target("<=", MOST_P99))
    bench.report.line(
        figure="S7",
        reloads=len(record.reloads),
        answers=len(record.answers),
        failed=len(record.failures),
        failures=sorted(set(record.failures))[:5],
        left_out=record.left_out,
        torn=record.torn,
        largest_difference=record.largest_difference,
        reload_ms=quartiles_ms([end - begin for begin, end in record.reloads]),
    )
    bench.report.line(
        figure="S7 p99",
        p99_ms={"during": rounded(1e3 * during), "steady": rounded(1e3 * steady)},
        p50_ms=rounded(1e3 * statistics.median(seconds for _, seconds in record.answers)),
        ratio=rounded(during / steady),
    )
    ratio = statistics.median(last) / statistics.median(first)
    bench.report.figure("S8", ratio, Target("<=", 1.02))
    marks = [mark for mark in MARKS if mark <= len(record.resident)]
    bench.report.line(
        figure="S8",
        rss_mib={str(mark): rounded(record.resident[mark - 1] / 2**20) for mark in marks},
        kinds_mib=record.kinds,
        open={"first": record.open[0], "last": record.open[-1]},
        ratio=rounded(ratio),
    )


def answers_of(models: Published, images: Pixels) -> Answers:
    """Returns what the current generation answers."""
    with loaded_engine(models) as (engine, generation):
        return {
            (generation.number, name): engine.answer(Question(generation, images, (name,))).result()[name]
            for name in generation.tasks
        }


async def reload_under_load(server: Server, models: Published, images: Pixels, expected: Answers, effort: Effort) -> Record:
    """Reloads so many times while requests come at a fixed rate."""
    record = Record()
    tasks = sorted({task for _, task in expected})
    async with AsyncClient(server.address) as client, AsyncAdminClient(server.admin_address) as admin:

        async def ask(number: int) -> None:
            task, image = tasks[number % len(tasks)], number // len(tasks) % len(images)
            begun = time.perf_counter()
            try:
                answer = await client.classify(task, images[image], include_logits=True)
            except CallError as error:
                record.failures.append(str(error)[:200])
                return
            record.answers.append((begun, time.perf_counter() - begun))
            logits = answer.classifications[0].logits
            wanted = expected.get((answer.generation, task))
            difference = float("inf") if wanted is None or logits is None else float(np.abs(logits - wanted[image]).max())
            if difference <= TORN:
                record.largest_difference = max(record.largest_difference, difference)
            else:
                record.torn += 1

        for number in range(20):
            await ask(number)
        # How long one takes that is alone.
        seconds = statistics.median(taken for _, taken in record.answers)
        for _ in range(4):
            await asyncio.gather(*map(ask, range(MOST_OPEN)))
        record.answers.clear()
        stop = asyncio.Event()
        load = asyncio.create_task(keep_asking(ask, seconds / num_usable_cpus() / LOAD, stop, record))
        for count in range(1, effort.reloads + 1):
            make_current(models.repository, GENERATIONS[count % 2])
            begun = time.perf_counter()
            await admin.reload()
            record.reloads.append((begun, time.perf_counter()))
            # As long again without a reload, for comparison.
            await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, time.perf_counter() - begun))
            record.resident.append(resident_bytes(server.process_id))
            if count in MARKS:
                record.kinds[str(count)] = resident_by_kind(server.process_id)
            if count % SAMPLES == 0:
                record.open.append(num_open(server.process_id))
        stop.set()
        await load
    return record


async def keep_asking(
    ask: Callable[[int], Coroutine[Any, Any, None]], interval_seconds: float, stop: asyncio.Event, record: Record
) -> None:
    """Asks at a fixed rate, whether or not earlier questions are answered, until it is told to stop."""
    begun = time.perf_counter()
    asked: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            if stop.is_set():
                return
            await asyncio.sleep(max(0.0, begun + number * interval_seconds - time.perf_counter()))
            if len(asked) < MOST_OPEN:
                task = group.create_task(ask(number))
                asked.add(task)
                task.add_done_callback(asked.discard)
            else:
                record.left_out += 1


def quartiles_ms(seconds: list[float]) -> list[float]:
    """Returns quartiles in milliseconds."""
    return [rounded(1e3 * value) for value in statistics.quantiles(seconds, n=4, method="inclusive")]
