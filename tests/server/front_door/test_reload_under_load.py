"""Reloads while requests run: none fails, none mixes generations, unchanged tasks answer bit for bit as before."""

from __future__ import annotations

import asyncio
import pathlib
import time

import numpy as np

from server.client import AsyncClient, ClassifyTasksResult
from tests.support.repository import DIGITS, GREEK, HEBREW, SHORT, RepositoryBuilder, TaskPlan, answer, random_images
from tests.support.serving import serving

IMAGES = random_images(8, 8, seed=6)
NUM_RELOADS = 25

# `digits` never changes, though the segments beside it come and go; `moving` is another path in each.
SYSTEMS: tuple[dict[str, TaskPlan], ...] = (
    {"digits": DIGITS, "moving": SHORT},
    {"digits": DIGITS, "moving": TaskPlan((*HEBREW.route[:3], "head:moving:3"), SHORT.labels), "greek": GREEK},
)


def test_no_failed_and_no_torn_answer(tmp_path: pathlib.Path) -> None:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish(SYSTEMS[0])
    expected = [{name: answer(plan, IMAGES) for name, plan in system.items()} for system in SYSTEMS]
    seen: list[tuple[int, ClassifyTasksResult]] = []

    async def ask(client: AsyncClient, stop: asyncio.Event, seed: int) -> None:
        index = seed
        while not stop.is_set():
            index = (index + 1) % len(IMAGES)
            seen.append((index, await client.classify_tasks(IMAGES[index], ["moving", "digits"], include_logits=True)))

    async def run(address: str) -> None:
        stop = asyncio.Event()
        async with AsyncClient(address) as client:
            callers = [asyncio.create_task(ask(client, stop, seed)) for seed in range(8)]
            for number in range(2, NUM_RELOADS + 2):
                builder.publish(SYSTEMS[(number - 1) % 2])
                deadline = time.monotonic() + 10
                while not seen or seen[-1][1].generation != number:
                    assert time.monotonic() < deadline
                    assert not any(caller.done() for caller in callers)
                    await asyncio.sleep(0.005)
            stop.set()
            await asyncio.gather(*callers)

    with serving(builder.root) as server:
        asyncio.run(run(server.address))
        segments = {segment.name for segment in server.server.engine.statistics()}
        assert segments == set(server.server.reloader.generation.segments)

    first: dict[tuple[str, int, int], bytes] = {}
    for index, result in seen:
        system = (result.generation - 1) % 2
        for found in result.tasks:
            logits = found.classification.logits
            np.testing.assert_allclose(logits, expected[system][found.task][index], atol=1e-4)
            # `digits` answers alike in all generations, `moving` in all of its kind.
            key = (found.task, index, 0 if found.task == "digits" else system)
            assert first.setdefault(key, logits.tobytes()) == logits.tobytes()
    assert {result.generation for _, result in seen} >= {1, NUM_RELOADS + 1}
