"""Clients that leave at any moment and clients that never take their answers: nobody else hears of it, and nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from munet.v1 import inference_pb2 as pb
from munet.v1 import inference_pb2_grpc
from server.client import AsyncClient
from tests.support import anything
from tests.support.http2 import PREFACE, SETTINGS, call, connect, frame, settings
from tests.support.images import encode
from tests.support.repository import TASKS, RepositoryBuilder, TaskPlan, random_images
from tests.support.serving import ServerThread, is_empty, serving, wait_until

IMAGES = random_images(4, 8, seed=3)
PICTURES = [encode(image) for image in random_images(4, 30, seed=4)]
MANY = TaskPlan(("stem:8:a", "block:trunk", "head:many:5000"), tuple(f"class {index}" for index in range(5000)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    root = tmp_path_factory.mktemp("repository")
    RepositoryBuilder(root).publish({**TASKS, "many": MANY})
    with serving(root) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_left(server: ServerThread, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    wait_until(lambda: is_empty(server))
    # gRPC itself logs that it could not send an answer.
    assert not [record for record in caplog.records if record.name.startswith("server")]


async def ask_well(address: str, stop: asyncio.Event) -> set[bytes]:
    """Returns the different answers to the same question, asked until it is told to stop."""
    seen = set()
    async with AsyncClient(address) as client:
        while not stop.is_set():
            result = await client.classify_tasks(PICTURES[0], include_logits=True)
            seen.add(b"".join(task.classification.logits.tobytes() for task in result.tasks))
    return seen


async def ask_and_leave(channel: grpc.aio.Channel, chance: random.Random) -> str:
    """Asks something, leaves at a random moment, and returns how it ended."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    image = pb.Image(encoded=chance.choice(PICTURES))
    match chance.randrange(3):
        case 0:
            asked = stub.Classify(pb.ClassifyRequest(task="many", images=[image] * 8), timeout=20)
        case 1:
            asked = stub.ClassifyTasks(pb.ClassifyTasksRequest(image=image, tasks=["digits", "large", "many"]), timeout=20)
        case _:
            request = service_pb2.ModelInferRequest(model_name="greek", raw_input_contents=[IMAGES[:2].tobytes()])
            request.inputs.add(name="image", datatype="UINT8", shape=[2, 8, 8, 3])
            requests = iter([request] * chance.randrange(1, 60))
            asked = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests, timeout=20)
    await asyncio.sleep(chance.choice([0, 0.001, 0.005, 0.02]) * chance.random())
    asked.cancel()
    return (await asked.code()).name


def test_clients_that_leave_at_random_disturb_nobody(server: ServerThread) -> None:
    async def run() -> tuple[set[bytes], set[bytes], list[str]]:
        chance = anything.seeded(5)
        async with grpc.aio.insecure_channel(server.address) as channel:
            stop = asyncio.Event()
            asking = asyncio.ensure_future(ask_well(server.address, stop))
            await asyncio.sleep(0)
            ends: list[str] = []
            for _ in range(anything.scaled(15)):
                ends += await asyncio.gather(*(ask_and_leave(channel, chance) for _ in range(20)))
            stop.set()
            disturbed = await asking
        quiet = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, quiet.set)
        return await ask_well(server.address, quiet), disturbed, ends

    undisturbed, disturbed, ends = asyncio.run(run())
    # Calls that end in a cycle of garbage would otherwise end in another test.
    gc.collect()
    assert len(undisturbed) == 1
    assert disturbed == undisturbed
    assert set(ends) <= {"OK", "CANCELLED"}
    assert ends.count("CANCELLED") > len(ends) / 2


def test_clients_that_never_take_their_answers_hold_up_nobody(server: ServerThread) -> None:
    image = pb.Image(raw=pb.RawImage(height=8, width=8, channels=3, data=IMAGES[0].tobytes()))
    question = pb.ClassifyRequest(task="many", images=[image] * 4, include_logits=True).SerializeToString()
    calls = b"".join(call("/munet.v1.InferenceService/Classify", question, stream=2 * index + 1) for index in range(20))
    watch = call("/grpc.health.v1.Health/Watch", b"", stream=101)
    with contextlib.ExitStack() as stack:
        head = server.server.reloader.generation.tasks["many"].route[-1]
        before = _num_asked(server, head)
        for _ in range(10):
            connection = stack.enter_context(connect(server.address))
            # Not one byte of an answer may be sent.
            connection.sendall(PREFACE + settings(window_bytes=0) + frame(SETTINGS, flags=1) + calls + watch)
        wait_until(lambda: _num_asked(server, head) >= before + 10 * 20 * 4)
        wait_until(lambda: is_empty(server))
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            answers = {
                stub.Classify(
                    pb.ClassifyRequest(task="digits", images=[image], include_logits=True), timeout=10
                ).SerializeToString()
                for _ in range(20)
            }
        assert len(answers) == 1


def _num_asked(server: ServerThread, segment: str) -> int:
    return {found.name: found.rows_requested for found in server.server.engine.statistics()}[segment]
