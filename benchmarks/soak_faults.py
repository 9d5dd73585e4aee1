"""What strangers and publishers do to a server during a soak, drawn at random."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import random
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from benchmarks.reporting import TOP
from benchmarks.soak_load import TIMEOUT_SECONDS, Question, Tally, tensor
from munet.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

_METHODS = (
    "/munet.v1.InferenceService/Classify",
    "/munet.v1.InferenceService/ClassifyTasks",
    "/munet.v1.InferenceService/GetTask",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelConfig",
    "/grpc.health.v1.Health/Check",
)
_REFUSED = ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED")
"""How a call may end that is not well-formed. Some happen to be."""

_HALF_OPEN = (
    b"",
    b"PRI * HTTP/2.0\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"GET / HTTP/1.1\r\n",
)
"""What comes over a connection that is no use to anybody, before nothing more does."""


class Strangers:
    """Callers who mean harm, or whose machines or networks fail.

    Args:
        address: of the server.
        questions: what well-behaved callers ask.
        tally: where it is counted how their calls end.
        chance: what they draw from.
    """

    def __init__(self, address: str, questions: Sequence[Question], tally: Tally, chance: random.Random) -> None:
        self._address = address
        self._questions = questions
        self._tally = tally
        self._chance = chance
        self._faults: dict[str, Callable[[grpc.aio.Channel], Awaitable[None]]] = {
            "damaged images": self._damaged_images,
            "no requests": self._no_requests,
            "calls left": self._calls_left,
            "connections half open": self._half_open,
            "streams never read": self._never_read,
            "callers killed": self._killed,
        }

    async def disturb(self, stop: asyncio.Event) -> None:
        """Does one thing after another until told to stop; each at least once if there is time."""
        undone = list(self._faults)
        async with grpc.aio.insecure_channel(self._address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
            while not stop.is_set():
                fault = undone.pop(self._chance.randrange(len(undone))) if undone else self._chance.choice(list(self._faults))
                self._tally.did(fault)
                try:
                    await self._faults[fault](channel)
                except Exception as error:
                    # The edge of the task: whatever else happens is the server's doing.
                    self._tally.unexpected(f"{fault}: {error!r}")

    async def _damaged_images(self, channel: grpc.aio.Channel) -> None:
        for _ in range(20):
            content = bytearray(self._draw().encoded(self._chance.choice(["PNG", "JPEG", "BMP", "WEBP"])))
            if self._chance.random() < 0.3:
                del content[self._chance.randrange(len(content)) :]
            for _ in range(self._chance.randrange(10) if content else 0):
                content[self._chance.randrange(min(len(content), self._chance.choice([40, len(content)])))] = (
                    self._chance.randrange(256)
                )
            request = inference_pb2.ClassifyRequest(task="steady", images=[inference_pb2.Image(encoded=bytes(content))])
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await self._end("a damaged image", stub.Classify(request, timeout=TIMEOUT_SECONDS), ("OK", "INVALID_ARGUMENT"))

    async def _no_requests(self, channel: grpc.aio.Channel) -> None:
        for _ in range(20):
            content = bytes([self._chance.choice([8, 10, 18, 26, 42, 255])]) + self._chance.randbytes(
                self._chance.choice([0, 3, 40, 5000])
            )
            method = self._chance.choice(_METHODS)
            await self._end(f"{method} with no request", channel.unary_unary(method)(content, timeout=TIMEOUT_SECONDS), _REFUSED)

    async def _calls_left(self, channel: grpc.aio.Channel) -> None:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = []
        for _ in range(20):
            question = self._draw()
            request = inference_pb2.ClassifyRequest(task=question.task, images=[question.raw] * self._chance.choice([1, 30]))
            calls.append(stub.Classify(request, timeout=TIMEOUT_SECONDS))
            await asyncio.sleep(self._chance.choice([0, 0.001, 0.01]))
            if self._chance.random() < 0.7:
                self._chance.choice(calls).cancel()
        for call in calls:
            call.cancel()
            await self._end("a call left", call, ("OK", "CANCELLED"))

    async def _half_open(self, channel: grpc.aio.Channel) -> None:
        host, _, port = self._address.rpartition(":")
        with contextlib.ExitStack() as stack:
            for _ in range(self._chance.choice([10, 200])):
                connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
                connection.sendall(self._chance.choice(_HALF_OPEN))
            await asyncio.sleep(self._chance.choice([0, 0.1, 3]))

    async def _never_read(self, channel: grpc.aio.Channel) -> None:
        # On a connection of their own: their answers would fill the window that others' come through.
        async with grpc.aio.insecure_channel(self._address, (("grpc.use_local_subchannel_pool", 1),)) as own:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(own)
            streams = [stub.ModelStreamInfer(iter([tensor([self._draw()])] * 100), timeout=TIMEOUT_SECONDS) for _ in range(5)]
            await asyncio.sleep(self._chance.choice([0.01, 0.3]))
            for stream in streams:
                stream.cancel()
                await self._end("a stream never read", stream, ("OK", "CANCELLED"))

    async def _killed(self, channel: grpc.aio.Channel) -> None:
        arguments = (self._address, "steady", str(len(self._questions[0].image)))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.soak_load", *arguments), cwd=TOP, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            if not await asyncio.wait_for(process.stdout.readline(), TIMEOUT_SECONDS):
                self._tally.unexpected("a caller ended before it was killed")
            await asyncio.sleep(self._chance.random() * 0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def _end(self, what: str, call: Any, may: Sequence[str]) -> None:
        status = await call.code()
        self._tally.ended(what, status.name, await call.details() or "", may)

    def _draw(self) -> Question:
        return self._chance.choice(self._questions)


class Publisher:
    """Whoever changes the repository: to the other generation and back, mostly; and does harm to it.

    Args:
        repository: with generations 1 and 2.
        admin_address: of the server.
        tally: where it is counted what went as it should not.
        chance: what is drawn from.

    Attributes:
        num_reloads: how often another generation was served.
    """

    def __init__(self, repository: pathlib.Path, admin_address: str, tally: Tally, chance: random.Random) -> None:
        self._repository = repository
        self._admin_address = admin_address
        self._tally = tally
        self._chance = chance
        self._current = 1
        self.num_reloads = 0

    async def publish(self, stop: asyncio.Event, num_reloads: int | None) -> None:
        """Does one thing after another until told to stop; if a number is given, only reloads, until there were so many in all."""
        async with grpc.aio.insecure_channel(self._admin_address) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            while not stop.is_set():
                if num_reloads is not None:
                    if self.num_reloads >= num_reloads:
                        return
                    await self._reload(stub)
                    continue
                harm = self._chance.choice([self._reload, self._reload, self._altered, self._cut_off, self._pointing_nowhere])
                self._tally.did(harm.__name__.strip("_").replace("_", " "))
                await harm(stub)
                await asyncio.sleep(self._chance.random() * 0.3)

    async def _reload(self, stub: Any) -> None:
        self._point_at(3 - self._current)
        self._current = 3 - self._current
        await self._until_served(stub)
        self.num_reloads += 1

    async def _altered(self, stub: Any) -> None:
        await self._spoilt(stub, lambda content: bytes([content[0] ^ 1]) + content[1:])

    async def _cut_off(self, stub: Any) -> None:
        await self._spoilt(stub, lambda content: content[: len(content) // 2])

    async def _spoilt(self, stub: Any, spoil: Callable[[bytes], bytes]) -> None:
        """Makes the other generation current while a file that only it needs is not what it was, and then mends the file."""
        file = self._repository / self._chance.choice(sorted(self._files(3 - self._current) - self._files(self._current)))
        content = file.read_bytes()
        _replace(file, spoil(content))
        self._point_at(3 - self._current)
        await self._until_refused(stub)
        _replace(file, content)
        self._current = 3 - self._current
        await self._until_served(stub)
        self.num_reloads += 1

    async def _pointing_nowhere(self, stub: Any) -> None:
        nowhere = self._chance.choice([b"4711\n", b"", b"\xff\x00 nonsense", b"1" * 100_000])
        _replace(self._repository / "CURRENT", nowhere)
        await self._until_refused(stub)
        self._point_at(self._current)
        await self._until_served(stub)

    async def _until_refused(self, stub: Any) -> None:
        call = stub.Reload(admin_pb2.ReloadRequest(), timeout=TIMEOUT_SECONDS)
        self._tally.ended(
            "a reload of what is spoilt", (await call.code()).name, await call.details() or "", ["FAILED_PRECONDITION"]
        )

    async def _until_served(self, stub: Any) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            status = await stub.Status(admin_pb2.StatusRequest(), timeout=TIMEOUT_SECONDS)
            if status.generation == self._current:
                return
            await asyncio.sleep(0.01)
        self._tally.unexpected(f"generation {self._current} is not served; the last reload: {status.last_reload.error}")

    def _files(self, number: int) -> set[str]:
        manifest = json.loads((self._repository / f"generation-{number}.json").read_text())
        return {entry["path"] for entry in manifest["files"]}

    def _point_at(self, number: int) -> None:
        _replace(self._repository / "CURRENT", f"{number}\n".encode())


def _replace(file: pathlib.Path, content: bytes) -> None:
    temporary = file.with_name(f"{file.name}.new")
    temporary.write_bytes(content)
    temporary.replace(file)
