"""Taking a server out of service and putting it back, without losing anybody's answer."""

from __future__ import annotations

import asyncio

from server.front_door.edge import Edge
from server.front_door.health import Health


class Draining:
    """Takes a server out of service: health says so, then no new questions, then those in flight finish. For one event loop.

    Args:
        health: says whether questions are answered.
        edge: lets them in.
        drain_seconds: between health's word and the end of new questions, so that load balancers look away first.
    """

    def __init__(self, health: Health, edge: Edge, drain_seconds: float) -> None:
        self._health = health
        self._edge = edge
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None

    @property
    def is_draining(self) -> bool:
        """Whether the server is out of service, or about to be."""
        return self._draining is not None

    @property
    def num_in_flight(self) -> int:
        """Questions and streams that are open."""
        return self._edge.num_in_flight

    async def drain(self) -> bool:
        """Takes the server out of service, and waits until nothing is in flight. Whoever stops waiting leaves it out of service.

        Returns:
            Whether nothing is in flight; False if somebody put the server back meanwhile.
        """
        if self._draining is None:
            self._health.drain(True)
            self._draining = asyncio.create_task(self._drain())
        draining = self._draining
        await asyncio.wait([draining])
        return not draining.cancelled()

    def resume(self) -> None:
        """Puts the server back into service; nothing happens if it is in service."""
        if self._draining is not None:
            self._draining.cancel()
            self._draining = None
            self._edge.refuse_questions("")
            self._health.drain(False)

    async def shut_down(self) -> None:
        """Takes the server out of service for good, at once if it is out of service already; waits for nothing in flight."""
        self._health.stop()
        if self._draining is None:
            await asyncio.sleep(self._drain_seconds)
        self._edge.shut_down()
        self._health.end_watches()

    async def _drain(self) -> None:
        await asyncio.sleep(self._drain_seconds)
        self._edge.refuse_questions("draining")
        await self._edge.wait_until_empty()
