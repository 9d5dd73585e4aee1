"""A Ray without processes: actors on nodes with room for one each, that answer, fail, die or hang as a test says, in no time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import ray.exceptions

from evolve.errors import EvolveError

HANGS = object()
"""What a method answers that never ends."""


class ManualClock:
    """Each look at it takes a second.

    Attributes:
        now: in seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Returns the time, in seconds."""
        self.now += 1
        return self.now


@dataclasses.dataclass(eq=False)
class FakeActor:
    """An actor.

    Attributes:
        number: counted from 0, of those that were asked for.
        avoided: nodes that it may not be placed on.
        node: where it is; None while there is no room.
        is_alive: whether it was not killed.
        calls: methods and arguments, each with its future.
    """

    ray: FakeRay
    number: int
    avoided: str
    node: str | None = None
    is_alive: bool = True
    calls: list[tuple[str, tuple[Any, ...], concurrent.futures.Future[Any]]] = dataclasses.field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return types.SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.calls.append((name, arguments, future))
        if self.node is not None:
            self.answer()
        return types.SimpleNamespace(future=lambda: future)

    def answer(self) -> None:
        """Answers what it was asked and has not answered yet."""
        for name, arguments, future in self.calls:
            if not future.done():
                answer = self.ray.answers(self, name, arguments)
                if isinstance(answer, ray.exceptions.RayError):
                    self.ray.lose(self)
                if isinstance(answer, BaseException):
                    with contextlib.suppress(concurrent.futures.InvalidStateError):
                        future.set_exception(answer)
                elif answer is not HANGS:
                    future.set_result(answer)


class FakeRay:
    """Stands for the module ray, connected to a cluster.

    Attributes:
        exceptions: Ray's own.
        names: of the nodes that live, each with room for one actor.
        actors: all that were asked for.
        processors: of nodes, where it is no common one.
        play: answers for an actor, a method of the gate and its arguments; None lets it answer as a worker does that is well.
    """

    def __init__(self, names: list[str], installed: dict[str, str]) -> None:
        self.exceptions = ray.exceptions
        self.cloudpickle = types.SimpleNamespace(register_pickle_by_value=lambda _: None)
        self.names = names
        self.actors: list[FakeActor] = []
        self.processors: dict[str | None, str] = {}
        self.play: Callable[[FakeActor, str, tuple[Any, ...]], Any] = lambda *_: None
        self._installed = installed

    def is_initialized(self) -> bool:
        return True

    def put(self, value: Any) -> Any:
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True, "Resources": {"CPU": 1}} for name in self.names]

    def remote(self, **_: Any) -> Callable[[type], Any]:
        return lambda _: types.SimpleNamespace(
            options=lambda **options: types.SimpleNamespace(remote=lambda: self._hire(options))
        )

    def _hire(self, options: dict[str, Any]) -> FakeActor:
        actor = FakeActor(self, len(self.actors), options.get("label_selector", {}).get("ray.io/node-id", ""))
        self.actors.append(actor)
        self._place()
        return actor

    def kill(self, actor: FakeActor) -> None:
        actor.is_alive = False
        self._place()

    def lose(self, actor: FakeActor) -> None:
        """An actor dies."""
        actor.is_alive = False
        for _, _, future in actor.calls:
            if not future.done():
                future.set_exception(ray.exceptions.RayActorError())
        self._place()

    def _place(self) -> None:
        for actor in self.actors:
            taken = {other.node for other in self.actors if other.is_alive}
            free = [name for name in self.names if name not in taken and name not in actor.avoided]
            if actor.is_alive and actor.node is None and free:
                actor.node = free[0]
                actor.answer()

    def answers(self, actor: FakeActor, name: str, arguments: tuple[Any, ...]) -> Any:
        if not actor.is_alive or actor.node not in self.names:
            return ray.exceptions.RayActorError()
        played = self.play(actor, name, arguments)
        if name == "begin" and (played is None or isinstance(played, EvolveError)):
            return {
                "installed": self._installed,
                **({"processor": self.processors.get(actor.node, "a processor")} if played is None else {"error": played}),
            }
        if played is not None:
            return played
        if name == "greet":
            return {"node": actor.node, "host": f"host-{actor.node}", "process": actor.number}
        return [(actor.number, arguments[0])]
