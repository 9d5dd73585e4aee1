"""Anything at all to every call of every service: a proper status each time, and the server answers the next one as before.

MUNET_FUZZ=50 tries fifty times as much, MUNET_FUZZ_SEED=1 something else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from munet.preprocessing import ImageError, ImageLimits, decode
from munet.v1 import inference_pb2 as pb
from munet.v1 import inference_pb2_grpc
from server.config import Limits
from server.preprocessing import EncodedImage
from tests.support import anything
from tests.support.images import encode
from tests.support.repository import TASKS, RepositoryBuilder, random_images
from tests.support.serving import ServerThread, is_empty, serving, wait_until

# Pillow warns of what is odd about an image, which says nothing to whoever reads the log of a server.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

LIMITS = Limits(max_image_bytes=30_000, max_image_pixels=10_000, max_images=8, max_tasks=6, max_message_bytes=400_000)
PICTURE = encode(random_images(1, 20)[0])

PROPER = {
    grpc.StatusCode[name]
    for name in (
        "OK",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "UNIMPLEMENTED",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED",
    )
}
"""What a request can be answered with whose fault is its own."""

OBEYED = ("Drain",)
"""Methods that do what they are told to everybody: they only get what they cannot understand."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of a server.

    Attributes:
        address: where.
        name: as gRPC calls it.
        descriptor: what it takes and gives.
    """

    address: str
    name: str
    descriptor: Any


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    root = tmp_path_factory.mktemp("repository")
    RepositoryBuilder(root).publish()
    with serving(root, limits=LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def channels(server: ServerThread) -> Iterator[dict[str, grpc.Channel]]:
    with contextlib.ExitStack() as stack:
        addresses = (server.address, server.admin_address)
        yield {address: stack.enter_context(grpc.insecure_channel(address)) for address in addresses}


@pytest.fixture(scope="module")
def methods(channels: dict[str, grpc.Channel]) -> list[Method]:
    """Every method, as the server itself says."""
    found = []
    for address, channel in channels.items():
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=10)
        for service in answer.list_services_response.service:
            descriptor = descriptor_pool.Default().FindServiceByName(service.name)
            found += [Method(address, f"/{service.name}/{method.name}", method) for method in descriptor.methods]
    return found


@pytest.fixture(autouse=True)
def answers_as_before(channels: dict[str, grpc.Channel], server: ServerThread) -> Iterator[None]:
    """Whatever was sent, a good request afterwards has the very same answer, and nothing of the others is left."""
    before = good_answer(channels[server.address])
    yield
    assert good_answer(channels[server.address]) == before
    wait_until(lambda: is_empty(server))


def good_answer(channel: grpc.Channel) -> bytes:
    request = pb.ClassifyTasksRequest(image=pb.Image(encoded=PICTURE), include_logits=True)
    answer = inference_pb2_grpc.InferenceServiceStub(channel).ClassifyTasks(request, timeout=10)
    assert [task.task for task in answer.tasks] == sorted(TASKS)
    return bytes(answer.SerializeToString(deterministic=True))


def send(channel: grpc.Channel, method: Method, contents: list[bytes]) -> tuple[grpc.StatusCode, str]:
    """Calls a method with some messages and returns its status, and the words that came with it. Streams are read to their end."""
    try:
        if not method.descriptor.client_streaming and not method.descriptor.server_streaming:
            channel.unary_unary(method.name)(contents[0], timeout=10)
            return grpc.StatusCode.OK, ""
        if method.descriptor.client_streaming:
            answers = list(channel.stream_stream(method.name)(iter(contents), timeout=10))
            assert len(answers) == len(contents)
            return grpc.StatusCode.OK, ""
        # A stream of answers has no end of its own.
        watch = channel.unary_stream(method.name)(contents[0], timeout=10)
        next(watch)
        watch.cancel()
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def try_everywhere(
    methods: list[Method], channels: dict[str, grpc.Channel], chance: random.Random, count: int, make: Any
) -> dict[str, set[grpc.StatusCode]]:
    """Sends every method something, so many times, and returns what each answered with."""
    seen: dict[str, set[grpc.StatusCode]] = {}
    for method in methods:
        for _ in range(count):
            contents = [make(method.descriptor.input_type, chance) for _ in range(3)]
            began = time.monotonic()
            status, words = send(channels[method.address], method, contents)
            assert time.monotonic() - began < 5, (method.name, contents)
            assert status in PROPER, (method.name, status, words, contents)
            assert status is grpc.StatusCode.OK or words, (method.name, status)
            seen.setdefault(method.name, set()).add(status)
    return seen


def test_messages_at_random(methods: list[Method], channels: dict[str, grpc.Channel]) -> None:
    told = [method for method in methods if method.descriptor.name not in OBEYED]

    def make(descriptor: Any, chance: random.Random) -> bytes:
        return bytes(anything.message(descriptor, chance).SerializeToString())

    seen = try_everywhere(told, channels, anything.seeded(1), anything.scaled(20), make)
    # Not everything fails at the first look.
    assert seen["/munet.v1.InferenceService/GetTask"] == {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}
    assert len(seen) >= 20


def test_bytes_at_random(methods: list[Method], channels: dict[str, grpc.Channel]) -> None:
    def make(descriptor: Any, chance: random.Random) -> bytes:
        good = anything.message(descriptor, chance).SerializeToString()
        # What begins so is no message of any kind.
        bad = b"\xff" + chance.randbytes(chance.randrange(40))
        return bad if descriptor.name == "DrainRequest" or chance.random() < 0.3 else anything.damaged_bytes(good, chance)

    try_everywhere(methods, channels, anything.seeded(2), anything.scaled(12), make)


def test_what_is_no_message_is_the_callers_fault(methods: list[Method], channels: dict[str, grpc.Channel]) -> None:
    for method in methods:
        if not method.descriptor.client_streaming:
            status, words = send(channels[method.address], method, [b"\xff" * 20])
            assert status is grpc.StatusCode.INVALID_ARGUMENT, (method.name, status, words)
            assert f"expected a {method.descriptor.input_type.name}" in words


def test_damaged_images(methods: list[Method], channels: dict[str, grpc.Channel]) -> None:
    (classify,) = [method for method in methods if method.name == "/munet.v1.InferenceService/Classify"]
    chance = anything.seeded(3)
    num_refused = 0
    for _ in range(anything.scaled(200)):
        image = pb.Image(encoded=anything.damaged_image(chance))
        content = pb.ClassifyRequest(task="digits", images=[image]).SerializeToString()
        status, words = send(channels[classify.address], classify, [content])
        # Some that are damaged can be read all the same.
        if status is not grpc.StatusCode.OK:
            assert (status, words[:11]) == (grpc.StatusCode.INVALID_ARGUMENT, "images[0]: "), (words, image)
            num_refused += 1
    assert num_refused > anything.scaled(80)


def test_nothing_is_kept_of_what_was_refused(methods: list[Method], channels: dict[str, grpc.Channel]) -> None:
    """Not even until garbage is collected, which the sizes of images do not hasten."""
    (classify,) = [method for method in methods if method.name == "/munet.v1.InferenceService/Classify"]
    whole = encode(random_images(1, 90)[0])
    content = pb.ClassifyRequest(task="digits", images=[pb.Image(encoded=whole[:-9000])]).SerializeToString()

    def kept() -> int:
        return sum(isinstance(found, Image.Image | EncodedImage) and id(found) not in others for found in gc.get_objects())

    gc.collect()
    gc.disable()
    # What other tests of this process hold on to.
    held = [found for found in gc.get_objects() if isinstance(found, Image.Image | EncodedImage)]
    others = set(map(id, held))
    try:
        for _ in range(5):
            status, words = send(channels[classify.address], classify, [content])
            assert (status, "damaged" in words) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        wait_until(lambda: not kept())
    finally:
        gc.enable()


def test_a_damaged_image_is_pixels_or_refused_in_words() -> None:
    chance = anything.seeded(4)
    limits = ImageLimits(max_bytes=20_000, max_pixels=10_000, formats=anything.FORMATS)
    kinds = {"pixels": 0, "refused": 0}
    for _ in range(anything.scaled(1500)):
        content = anything.damaged_image(chance)
        try:
            pixels = decode(content, limits)
        except ImageError:
            kinds["refused"] += 1
            continue
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert 0 < pixels.shape[0] * pixels.shape[1] <= 10_000
        kinds["pixels"] += 1
    assert min(kinds.values()) > anything.scaled(100)


@pytest.mark.parametrize("image_format", anything.FORMATS)
def test_a_file_cut_off_anywhere_is_pixels_or_refused_in_words(image_format: str) -> None:
    whole = encode(random_images(1, 12)[0], image_format)
    num_refused = 0
    for size in range(len(whole)):
        try:
            decode(whole[:size])
        except ImageError:
            num_refused += 1
    # A reader may do without the last bytes of some kinds.
    assert num_refused > 0.9 * len(whole)
