"""A reloader in a loop of its own, with what it told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from server.embedded.engine import EmbeddedEngine
from server.generation import Generation
from server.reload import ReloadAttempt, Reloader
from server.repository import Repository
from tests.support.repository import RepositoryBuilder


class Watched:
    """A reloader with what it told."""

    def __init__(self, builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
        self.swaps: list[Generation] = []
        self.attempts: list[ReloadAttempt] = []
        self.reloader = Reloader(Repository(builder.root), engine, self.swaps.append, self.attempts.append)

    @property
    def number(self) -> int:
        """Of the generation that serves."""
        assert self.reloader.generation is not None
        return self.reloader.generation.number


def run(builder: RepositoryBuilder, engine: EmbeddedEngine, test: Callable[[Watched], Awaitable[Any]]) -> Watched:
    """Runs a test with a reloader, and then closes that."""

    async def work() -> Watched:
        watched = Watched(builder, engine)
        await test(watched)
        await watched.reloader.close()
        return watched

    return asyncio.run(work())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)
