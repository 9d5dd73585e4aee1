"""The standard health service (grpc.health.v1): the server as a whole under the empty name, and each task under its own.

grpc_health's own asyncio servicer is not used: when one of several watchers of a service leaves, the others hear nothing more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.access import current_grant

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says what serves. For one event loop.

    Args:
        services: names that are healthy together with the server, beside the empty one.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(["", *services])
        self._tasks: frozenset[str] = frozenset()
        self._serving = False
        self._paused = False
        self._draining = False
        self._stopped = False
        self._ended = False
        self._changed = asyncio.Event()

    def set_serving(self, tasks: Iterable[str]) -> None:
        """Says that the server answers for these tasks; after `stop`, only which there are."""
        self._tasks = frozenset(tasks)
        self._serving = not self._stopped
        self._notify()

    def pause(self, is_paused: bool) -> None:
        """Says that nothing can be answered for now, because what computes is lost; or that it is back."""
        if is_paused != self._paused:
            self._paused = is_paused
            self._notify()

    def drain(self, is_draining: bool) -> None:
        """Says that the server is taken out of service; or that it is back."""
        self._draining = is_draining
        self._notify()

    def stop(self) -> None:
        """Says, once and for all, that the server takes no more requests."""
        self._stopped = True
        self._serving = False
        self._notify()

    def end_watches(self) -> None:
        """Ends all watches, which would otherwise hold up a server that waits for its calls to finish."""
        self._ended = True
        self._notify()

    @property
    def is_serving(self) -> bool:
        """Whether the server answers questions now."""
        return self._serving and not self._paused and not self._draining

    def is_ready(self, task: str) -> bool:
        """Whether a task that exists for the caller is answered for now."""
        return self.is_serving and self._knows(task)

    def status(self, service: str) -> Any:
        """Returns the status of a service, or of a task that exists for the caller."""
        if service not in self._services and not self._knows(service):
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if self.is_serving else _Response.NOT_SERVING

    def _knows(self, task: str) -> bool:
        return task in self._tasks and current_grant().sees(task)

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        """Answers the status now; NOT_FOUND for what is not known."""
        status = self.status(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"service: found {request.service[:80]!r}, expected '' or a task's name"
            )
        return _Response(status=status)

    async def Watch(  # noqa: N802
        self,
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[Any]:
        """Answers the status now and at each change."""
        last = None
        while True:
            changed = self._changed
            status = self.status(request.service)
            if status != last:
                yield _Response(status=status)
                last = status
            if self._ended:
                return
            await changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
