"""S9: from the rename of CURRENT to the first answer of the new generation.

ViT-Ti/16 at 224 px. Each generation gives one of two tasks a cloned block, three adapters, final norm and head. An adapter and its block
are one segment, so that four of seven are new, 6 MB. `munet-server serve` with default settings notices by itself, looking at CURRENT every
0.2 seconds; one caller asks that task without pause, one image at a time. The figure is the median; the line holds each. The first swap, in
which the trunk is cut for the task, loads all blocks anew; it stands apart in the line.
"""

from __future__ import annotations

import asyncio
import statistics
import time

import numpy as np

from benchmarks.published import SMOKE, TINY, Own, Published, System, make_current
from benchmarks.reporting import Target, rounded
from benchmarks.serve.processes import server_process
from benchmarks.serve.sides import smooth_image
from benchmarks.serve.workbench import FULL, Workbench
from benchmarks.serve.workbench import SMOKE as SMOKE_EFFORT
from server.client import AsyncClient

MOVING = "moving"
MOST_SECONDS = 60
SYSTEM = System(
    "swaps",
    TINY,
    ({"still": Own(), MOVING: Own()}, *({MOVING: Own((11,), adapters=(3, 7, 11))} for _ in range(FULL.swaps + 1))),
)
SMOKE_SYSTEM = System(
    "swaps",
    SMOKE,
    ({"still": Own(), MOVING: Own()}, *({MOVING: Own((2,), adapters=(2,))} for _ in range(SMOKE_EFFORT.swaps + 1))),
)


def measure(bench: Workbench) -> None:
    """Measures S9."""
    models = bench.publish(SMOKE_SYSTEM if bench.effort.smoke else SYSTEM)
    with server_process(models.repository) as server:
        (cutting, *seconds), answer_seconds = asyncio.run(time_swaps(server.address, models, bench.effort.swaps + 1))
    bench.report.figure("S9", statistics.median(seconds), Target("<=", 0.5))
    bench.report.line(
        figure="S9",
        seconds=[rounded(each) for each in seconds],
        median=rounded(statistics.median(seconds)),
        longest=rounded(max(seconds)),
        first_swap_seconds=rounded(cutting),
        answer_ms=rounded(1e3 * answer_seconds),
    )


async def time_swaps(address: str, models: Published, count: int) -> tuple[list[float], float]:
    """Returns the seconds that each swap took, and those of an answer meanwhile."""
    image = smooth_image(models.image_size)
    random = np.random.default_rng(0)
    swaps, answers = [], []
    async with AsyncClient(address) as client:

        async def ask() -> int:
            begun = time.perf_counter()
            generation = (await client.classify(MOVING, image)).generation
            answers.append(time.perf_counter() - begun)
            return generation

        for number in range(2, count + 2):
            # The server looks at CURRENT at some moment of its interval, not always the same one.
            end = time.perf_counter() + random.uniform(0.3, 0.6)
            while time.perf_counter() < end:
                await ask()
            make_current(models.repository, number)
            renamed = time.perf_counter()
            while await ask() != number:
                if time.perf_counter() > renamed + MOST_SECONDS:
                    raise RuntimeError(
                        f"found no answer of generation {number} in {MOST_SECONDS} seconds; the server says why above"
                    )
            swaps.append(time.perf_counter() - renamed)
    return swaps, statistics.median(answers)
