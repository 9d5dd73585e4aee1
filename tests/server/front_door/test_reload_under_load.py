"""Reloads while requests run: none fails, none mixes generations, unchanged tasks answer bit for bit as before."""

from __future__ import annotations

import asyncio
import pathlib
import time
from typing import Any

import numpy as np
import pytest

from server.client import AsyncClient, ClassifyTasksResult
from server.triton.process import TritonProcess
from tests.support.reloading import until
from tests.support.repository import DIGITS, GREEK, HEBREW, SHORT, RepositoryBuilder, TaskPlan, answer, random_images
from tests.support.serving import serving
from tests.support.triton import Caller, triton_settings, wait_until

IMAGES = random_images(8, 8, seed=6)

Systems = tuple[dict[str, TaskPlan], dict[str, TaskPlan]]

# `digits` never changes, though the segments beside it come and go; `moving` is another path in each.
EMBEDDED: Systems = (
    {"digits": DIGITS, "moving": SHORT},
    {"digits": DIGITS, "moving": TaskPlan((*HEBREW.route[:3], "head:moving:3"), SHORT.labels), "greek": GREEK},
)
# One segment each that the other has not: Triton starts a process for every one.
TRITON: Systems = (EMBEDDED[0], {"digits": DIGITS, "moving": TaskPlan((*SHORT.route[:2], "head:moving:3"), SHORT.labels)})


def segments_at(triton: TritonProcess) -> set[str]:
    with Caller(triton.addresses.grpc) as caller:
        return {name for name in caller.ready() if name.startswith("seg-")}


def current_segments(builder: RepositoryBuilder) -> set[str]:
    return {segment.name for segment in builder.read_manifest(builder.newest()).segments}


@pytest.mark.parametrize(
    ("systems", "num_reloads"), [pytest.param(EMBEDDED, 25, id="embedded"), pytest.param(TRITON, 50, id="triton")]
)
def test_no_failed_and_no_torn_answer(
    systems: Systems, num_reloads: int, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    builder = RepositoryBuilder(tmp_path / "repository")
    settings: dict[str, Any] = {}
    triton: TritonProcess | None = None
    if systems is TRITON:
        triton = request.getfixturevalue("triton")
        builder = RepositoryBuilder(request.getfixturevalue("triton_folder"))
        # What is not needed any more goes soon, and at times it is waited for, so that what comes back has to be loaded again.
        told = triton_settings(builder.root, triton, unload_after_seconds=0.2)
        settings = {"engine": told.engine, "triton": told.triton}
    first_number = builder.newest() + 1
    last_number = first_number + num_reloads
    builder.publish(systems[0])
    expected = [{name: answer(plan, IMAGES) for name, plan in system.items()} for system in systems]
    seen: list[tuple[int, ClassifyTasksResult]] = []

    async def ask(client: AsyncClient, stop: asyncio.Event, seed: int) -> None:
        index = seed
        while not stop.is_set():
            index = (index + 1) % len(IMAGES)
            # Most of the time is for whoever loads: another process.
            await asyncio.sleep(0.05 if settings else 0)
            seen.append((index, await client.classify_tasks(IMAGES[index], ["moving", "digits"], include_logits=True)))

    async def run(address: str) -> None:
        stop = asyncio.Event()
        async with AsyncClient(address) as client:
            callers = [asyncio.create_task(ask(client, stop, seed)) for seed in range(8)]
            await until(lambda: bool(seen) or any(caller.done() for caller in callers))
            for number in range(first_number + 1, last_number + 1):
                builder.publish(systems[(number - first_number) % 2])
                deadline = time.monotonic() + 60
                while not seen or seen[-1][1].generation != number:
                    assert time.monotonic() < deadline
                    assert not any(caller.done() for caller in callers)
                    await asyncio.sleep(0.005)
                if triton is not None and number % 10 == 0:
                    await asyncio.to_thread(wait_until, lambda: segments_at(triton) == current_segments(builder))
            stop.set()
            await asyncio.gather(*callers)

    with serving(builder.root, **settings) as server:
        asyncio.run(run(server.address))
        # The generation before is unloaded in a thread.
        segments = set(server.server.reloader.generation.segments)
        wait_until(lambda: {segment.name for segment in server.server.engine.statistics()} == segments)

    first: dict[tuple[str, int, int], bytes] = {}
    for index, result in seen:
        system = (result.generation - first_number) % 2
        for found in result.tasks:
            logits = found.classification.logits
            np.testing.assert_allclose(logits, expected[system][found.task][index], atol=1e-4)
            # `digits` answers alike in all generations, `moving` in all of its kind.
            key = (found.task, index, 0 if found.task == "digits" else system)
            assert first.setdefault(key, logits.tobytes()) == logits.tobytes()
    assert {result.generation for _, result in seen} >= {first_number, last_number}
