"""S5: images per second of `munet-server serve`, against raw batches through ONNX Runtime.

ViT-Ti/16 at 224 px, one task of a route in three pieces, the server in a process of its own with default settings: images per second that
16 requests at a time of one JPEG each get through gRPC, against raw batches by as many threads as the server has workers, of the size that
takes the least CPU time. The load's own CPU time counts against the server: it has the same CPUs. The second line is the same with raw
pixels instead of JPEG files.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.published import Published
from benchmarks.reporting import Ratio, Target, milliseconds, rounded
from benchmarks.serve.loads import Rate, rate_of_requests, rate_of_threads
from benchmarks.serve.pieces import SMOKE_SYSTEM, SYSTEM, TASK
from benchmarks.serve.processes import Server, server_process
from benchmarks.serve.sides import Pixels, random_images, smooth_image, to_jpeg, whole_model
from benchmarks.serve.workbench import Effort, Workbench
from server.client import AsyncClient
from server.config import num_usable_cpus

BATCH_SIZES = (1, 2, 4, 8)
"""That raw ONNX Runtime is tried with."""

Sides = tuple[list[Rate], list[Rate]]
"""The server and ONNX Runtime, repetition by repetition."""


def measure(bench: Workbench) -> None:
    """Measures S5."""
    models = bench.publish(SMOKE_SYSTEM if bench.effort.smoke else SYSTEM)
    by_size, sides = bench.apart(time_server, models, bench.effort)
    for traffic, (served, raw) in sides.items():
        ratio = Ratio([side.per_second for side in served], [side.per_second for side in raw])
        if traffic == "jpeg":
            bench.report.figure("S5", ratio.median, Target(">=", 0.9))
        bench.report.line(
            figure="S5",
            traffic=traffic,
            requests_at_a_time=bench.effort.requests,
            served_per_second=rounded(statistics.median(ratio.above)),
            raw_per_second=rounded(statistics.median(ratio.below)),
            raw_batch_size=min(by_size, key=lambda size: by_size[size]),
            raw_cpu_ms_by_batch_size={str(size): milliseconds([seconds]) for size, seconds in by_size.items()},
            cpu_ms_per_image={
                "server": milliseconds([side.server_cpu for side in served]),
                "load": milliseconds([side.own_cpu for side in served]),
                "raw": milliseconds([side.own_cpu for side in raw]),
            },
            ratio=ratio.spread(),
        )


def time_server(models: Published, effort: Effort) -> tuple[dict[int, float], dict[str, Sides]]:
    """Returns raw seconds of CPU time an image by batch size, and both sides for each traffic."""
    whole = whole_model(models.whole[TASK], 1)
    sizes = BATCH_SIZES[:1] if effort.smoke else BATCH_SIZES
    # By CPU time, which other work on the machine moves least: the fastest batches are what the server has to stand beside.
    by_size = {size: min(raw_rate(whole, random_images(models, size), effort).own_cpu for _ in range(2)) for size in sizes}
    batch = random_images(models, min(by_size, key=lambda size: by_size[size]))
    pixels = smooth_image(models.image_size)
    images: dict[str, Pixels | bytes] = {"jpeg": to_jpeg(pixels), "pixels": pixels}
    sides: dict[str, Sides] = {traffic: ([], []) for traffic in images}
    with server_process(models.repository) as server:
        for repetition in range(-1, effort.repetitions):
            for traffic, image in images.items():
                served = asyncio.run(served_rate(server, image, effort))
                raw = raw_rate(whole, batch, effort)
                # The first one warms up.
                if repetition >= 0:
                    sides[traffic][0].append(served)
                    sides[traffic][1].append(raw)
    return by_size, sides


def raw_rate(whole: Callable[[Pixels], Any], batch: Pixels, effort: Effort) -> Rate:
    """Returns how fast batches go through a session, by one thread a CPU."""
    return rate_of_threads(lambda: len(whole(batch)), num_usable_cpus(), effort.seconds)


async def served_rate(server: Server, image: Pixels | bytes, effort: Effort) -> Rate:
    """Returns how fast a server answers so many requests at a time."""
    async with AsyncClient(server.address) as client:
        rate, _ = await rate_of_requests(lambda: client.classify(TASK, image), effort.requests, effort.seconds, server)
        return rate
