"""S10 and S11: what a server does with more than it can, and what of it those notice who ask for little.

ViT-Ti/16 at 224 px, 4 tasks that share 10 of 12 blocks, served by `munet-server serve` in a process of its own with default settings.
Requests are Classify with one JPEG file. They come from processes of their own and do not wait for each other (open loop, exponential
gaps, the same seeds each time): what a server does not answer in time does not make its callers ask less.

S10  Requests to all tasks in turn with a deadline of 0.5 s, at shares of the saturating load, which is what 16 requests at a time get
     answered in a second. Goodput is answers in time a second. The figure is goodput at twice the saturating load over the best goodput
     at any of the loads below. `S10 late` counts the answers that came after their deadline, at any load.
S11  A request to one task every 0.2 s, give or take, alone and beside another task that is asked twice the saturating load without
     deadlines, in turns. The figure is the 99th percentile of its seconds beside the flood over that alone, all repetitions together.

"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence

import grpc
import grpc.aio
import numpy as np

from benchmarks.published import SMOKE as SMOKE_ARCHITECTURE
from benchmarks.published import TINY, Own, System
from benchmarks.reporting import Target, milliseconds, rounded
from benchmarks.serve.loads import Counter
from benchmarks.serve.processes import server_process
from benchmarks.serve.sides import smooth_image, to_jpeg
from benchmarks.serve.workbench import Workbench
from munet.v1 import inference_pb2, inference_pb2_grpc

TASKS = ("first", "second", "third", "fourth")
SYSTEM = System("tasks", TINY, (dict.fromkeys(TASKS, Own((10, 11))),))
SMOKE_SYSTEM = System("tasks", SMOKE_ARCHITECTURE, (dict.fromkeys(TASKS, Own((2,))),))
DEADLINE_SECONDS = 0.5
REQUESTS_AT_A_TIME = 16
LOADS = (0.8, 0.9, 1.0, 1.2, 2.0)
"""Shares of the saturating load; the last one is the overload."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        smoke: tiny models, and no more requests a second than `most_per_second`.
        repetitions: of each measurement.
        seconds: of each load in one repetition.
        quiet_gap_seconds: between requests of the quiet task.
        most_per_second: requests.
    """

    smoke: bool
    repetitions: int
    seconds: float
    quiet_gap_seconds: float
    most_per_second: float


FULL = Effort(smoke=False, repetitions=3, seconds=10.0, quiet_gap_seconds=0.2, most_per_second=1e9)
SMOKE = Effort(smoke=True, repetitions=1, seconds=0.5, quiet_gap_seconds=0.05, most_per_second=100.0)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        seconds: from when it was due to be sent until its end.
        call_seconds: from when it was sent.
        status: name of its gRPC status.
    """

    seconds: float
    call_seconds: float
    status: str


@dataclasses.dataclass(frozen=True)
class Load:
    """What one process asks.

    Attributes:
        address: of the server.
        tasks: asked in turn.
        gaps_seconds: before each request, the first from the beginning.
        timeout_seconds: of each; none means no deadline.
        image: a JPEG file.
        leave_seconds: after the last request, how long to wait before what is open is cancelled.
    """

    address: str
    tasks: tuple[str, ...]
    gaps_seconds: tuple[float, ...]
    timeout_seconds: float | None
    image: bytes
    leave_seconds: float = 10.0


def measure_goodput(bench: Workbench) -> None:
    """Measures S10."""
    with _saturated(bench) as (effort, address, image, saturating):
        _measure_goodput(bench, effort, address, image, saturating)


def measure_fairness(bench: Workbench) -> None:
    """Measures S11."""
    with _saturated(bench) as (effort, address, image, saturating):
        _measure_fairness(bench, effort, address, image, saturating)


@contextlib.contextmanager
def _saturated(bench: Workbench) -> Iterator[tuple[Effort, str, bytes, float]]:
    """Starts a server, and gives how much is measured, its address, an image to ask about and what it answers in a second at most."""
    effort = SMOKE if bench.effort.smoke else FULL
    published = bench.publish(SMOKE_SYSTEM if bench.effort.smoke else SYSTEM)
    image = to_jpeg(smooth_image(published.image_size))
    with server_process(published.repository) as server:
        saturating = bench.apart(saturate, server.address, image, effort.seconds)
        yield effort, server.address, image, min(effort.most_per_second, saturating)


# S10


def _measure_goodput(bench: Workbench, effort: Effort, address: str, image: bytes, saturating: float) -> None:
    """Goodput by load."""
    goodputs: dict[float, list[float]] = {load: [] for load in LOADS}
    counts: dict[float, collections.Counter[str]] = {load: collections.Counter() for load in LOADS}
    seconds: dict[float, list[float]] = {load: [] for load in LOADS}
    late = 0
    for repetition in range(effort.repetitions):
        for load in LOADS:
            gaps = poisson(load * saturating, effort.seconds, seed=repetition)
            outcomes = bench.apart(ask, Load(address, TASKS, gaps, DEADLINE_SECONDS, image))
            answered = [outcome.seconds for outcome in outcomes if outcome.status == "OK"]
            in_time = [taken for taken in answered if taken <= DEADLINE_SECONDS]
            late += sum(outcome.status == "OK" and outcome.call_seconds > DEADLINE_SECONDS for outcome in outcomes)
            goodputs[load].append(len(in_time) / sum(gaps))
            counts[load].update(outcome.status for outcome in outcomes)
            seconds[load] += answered
    medians = {load: statistics.median(values) for load, values in goodputs.items()}
    bench.report.figure("S10", medians[LOADS[-1]] / max(medians[load] for load in LOADS[:-1]), Target(">=", 0.95))
    bench.report.figure("S10 late", late, Target("<=", 0))
    for load in LOADS:
        bench.report.line(
            figure="S10",
            load=load,
            asked_per_second=rounded(load * saturating),
            goodput_per_second=rounded(medians[load]),
            goodputs=[rounded(value) for value in goodputs[load]],
            answered_ms={
                "p50": milliseconds([percentile(seconds[load], 50)]),
                "p99": milliseconds([percentile(seconds[load], 99)]),
            },
            statuses=dict(counts[load]),
        )
    bench.report.line(figure="S10 late", answers=late, deadline_seconds=DEADLINE_SECONDS)


# S11


def _measure_fairness(bench: Workbench, effort: Effort, address: str, image: bytes, saturating: float) -> None:
    """The quiet task, alone and beside the flood, in turns."""
    seconds: dict[str, list[float]] = {"alone": [], "beside a flood": []}
    flooded: collections.Counter[str] = collections.Counter()
    context = multiprocessing.get_context("spawn")
    for repetition in range(effort.repetitions):
        count = round(2 * effort.seconds / effort.quiet_gap_seconds)
        gaps = np.random.default_rng(repetition).uniform(0.5, 1.5, count) * effort.quiet_gap_seconds
        quiet = Load(address, TASKS[:1], tuple(gaps.tolist()), None, image)
        loud = Load(
            address, TASKS[1:2], poisson(2 * saturating, 2 * effort.seconds + 4, repetition), None, image, leave_seconds=0
        )
        for what in sorted(seconds, reverse=bool(repetition % 2)):
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as others:
                flood = others.submit(ask, loud) if what != "alone" else None
                if flood is not None:
                    time.sleep(2.0)
                outcomes = bench.apart(ask, quiet)
                if flood is not None:
                    flooded.update(outcome.status for outcome in flood.result())
            failed = [outcome.status for outcome in outcomes if outcome.status != "OK"]
            if failed:
                raise RuntimeError(f"found {len(failed)} quiet requests that failed ({failed[0]}), expected none")
            seconds[what] += [outcome.seconds for outcome in outcomes]
    p99 = {what: percentile(values, 99) for what, values in seconds.items()}
    bench.report.figure("S11", p99["beside a flood"] / p99["alone"], Target("<=", 1.3))
    for what, values in seconds.items():
        bench.report.line(
            figure="S11",
            quiet=what,
            requests=len(values),
            p50_ms=milliseconds([percentile(values, 50)]),
            p90_ms=milliseconds([percentile(values, 90)]),
            p99_ms=milliseconds([p99[what]]),
            flood={"asked_per_second": rounded(2 * saturating), "statuses": dict(flooded)} if what != "alone" else None,
        )


# Load


def saturate(address: str, image: bytes, seconds: float) -> float:
    """Returns how many requests a server answers in a second, so many at a time. For a process of its own."""

    async def run() -> float:
        async with grpc.aio.insecure_channel(address) as channel:
            # What gRPC generates has no types.
            stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            counter = Counter(seconds)

            async def work(number: int) -> None:
                while not counter.is_over:
                    await stub.Classify(request_of(TASKS[number % len(TASKS)], image))
                    number += 1
                    counter.count()

            await asyncio.gather(*(work(number) for number in range(REQUESTS_AT_A_TIME)))
            return counter.rate.per_second

    return asyncio.run(run())


def ask(load: Load) -> list[Outcome]:
    """Sends requests when they are due, and returns what became of each. For a process of its own."""

    async def run() -> list[Outcome]:
        async with grpc.aio.insecure_channel(load.address) as channel:
            # What gRPC generates has no types.
            stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            await channel.channel_ready()
            loop = asyncio.get_running_loop()
            requests = [request_of(task, load.image) for task in load.tasks]

            async def send(number: int, due: float) -> Outcome:
                status, sent = "OK", loop.time()
                try:
                    await stub.Classify(requests[number % len(requests)], timeout=load.timeout_seconds)
                except grpc.aio.AioRpcError as error:
                    status = error.code().name
                except asyncio.CancelledError:
                    status = "LEFT"
                return Outcome(loop.time() - due, loop.time() - sent, status)

            calls = []
            due = loop.time()
            for number, gap in enumerate(load.gaps_seconds):
                due += gap
                await asyncio.sleep(max(0.0, due - loop.time()))
                calls.append(asyncio.create_task(send(number, due)))
            await asyncio.wait(calls, timeout=load.leave_seconds)
            for call in calls:
                call.cancel()
            return await asyncio.gather(*calls)

    return asyncio.run(run())


def request_of(task: str, image: bytes) -> inference_pb2.ClassifyRequest:
    """Returns a request about one image."""
    return inference_pb2.ClassifyRequest(task=task, images=[inference_pb2.Image(encoded=image)])


def poisson(per_second: float, seconds: float, seed: int) -> tuple[float, ...]:
    """Returns gaps between so many requests a second, that go on for about so long."""
    return tuple(np.random.default_rng(seed).exponential(1 / per_second, max(1, round(per_second * seconds))).tolist())


def percentile(values: Sequence[float], share: float) -> float:
    """Returns a percentile; no number if there is none."""
    return float(np.percentile(values, share)) if len(values) else float("nan")
