"""Every bad request gets its own status and words, and the server answers the next one."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from munet.v1 import inference_pb2 as pb
from server.client import Client
from server.config import Limits
from server.errors import CallRefusedError, TaskNotFoundError
from tests.support.images import bomb, encode
from tests.support.repository import TRAP, RepositoryBuilder, random_images
from tests.support.serving import ServerThread, serving

LIMITS = Limits(
    max_image_bytes=20_000,
    max_image_pixels=10_000,
    max_images=4,
    max_tasks=6,
    max_message_bytes=200_000,
    max_bytes_in_flight=10**9,
)
PIXELS = random_images(1, 40)[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    from tests.support.repository import TASKS

    root = tmp_path_factory.mktemp("repository")
    RepositoryBuilder(root).publish({**TASKS, "trap": TRAP})
    with serving(root, limits=LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: ServerThread) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def call(channel: grpc.Channel, method: str, request: object, timeout: float | None = 10) -> tuple[grpc.StatusCode, str]:
    """Returns the status of a call, and the words that came with it."""
    content = request if isinstance(request, bytes) else request.SerializeToString()  # type: ignore[attr-defined]
    unary = channel.unary_unary(f"/munet.v1.InferenceService/{method}")
    try:
        unary(content, timeout=timeout)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def encoded(data: bytes) -> pb.Image:
    return pb.Image(encoded=data)


def raw(height: int, width: int, channels: int, data: bytes) -> pb.Image:
    return pb.Image(raw=pb.RawImage(height=height, width=width, channels=channels, data=data))


JPEG = encode(PIXELS, "JPEG")

BAD_IMAGES = {
    "no content": (pb.Image(), "no content"),
    "no bytes": (encoded(b""), "no bytes"),
    "no image": (encoded(b"hello, this is no image at all"), "expected a JPEG, PNG, WEBP or BMP file"),
    "truncated jpeg": (encoded(JPEG[: len(JPEG) // 2]), "damaged"),
    "truncated png": (encoded(encode(PIXELS)[:200]), "damaged"),
    "bomb": (encoded(bomb(50_000)), "2500000000 pixels"),
    "too many pixels": (encoded(encode(np.zeros((101, 100, 3), np.uint8))), "expected at most 10000"),
    "too many bytes": (encoded(bytes(20_001)), "found 20001 bytes, expected at most 20000"),
    "gif": (encoded(encode(PIXELS, "GIF")), "expected a JPEG"),
    "raw of too few bytes": (raw(8, 8, 3, bytes(191)), "found 191 bytes of raw data"),
    "raw of too many bytes": (raw(8, 8, 3, bytes(193)), "found 193 bytes of raw data"),
    "raw of no height": (raw(0, 8, 3, b""), "at least 1 x 1"),
    "raw of two channels": (raw(8, 8, 2, bytes(128)), "2 channels"),
    "raw of too many pixels": (raw(2**32 - 1, 2**32 - 1, 3, b""), "expected at most 10000"),
    "raw of nothing": (pb.Image(raw=pb.RawImage()), "found"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(channel: grpc.Channel, name: str) -> None:
    image, words = BAD_IMAGES[name]
    status, details = call(channel, "Classify", pb.ClassifyRequest(task="digits", images=[encoded(JPEG), image]))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("images[1]: ")
    assert words in details
    status, details = call(channel, "ClassifyTasks", pb.ClassifyTasksRequest(image=image))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("image: ")
    assert call(channel, "Classify", pb.ClassifyRequest(task="digits", images=[encoded(JPEG)]))[0] is grpc.StatusCode.OK


@pytest.mark.parametrize("task", ["", "digit", "DIGITS", "x" * 5000, "seg-000000000000", "../etc"])
def test_unknown_tasks(channel: grpc.Channel, task: str) -> None:
    for method, request in (
        ("Classify", pb.ClassifyRequest(task=task, images=[encoded(JPEG)])),
        ("ClassifyTasks", pb.ClassifyTasksRequest(tasks=["digits", task], image=encoded(JPEG))),
        ("GetTask", pb.GetTaskRequest(task=task)),
    ):
        status, details = call(channel, method, request)
        assert status is grpc.StatusCode.NOT_FOUND
        assert len(details) < 400
        if task in ("digit", "DIGITS"):
            assert "did you mean 'digits'?" in details


def test_counts(channel: grpc.Channel) -> None:
    cases = (
        ("Classify", pb.ClassifyRequest(task="digits"), "images: found 0"),
        ("Classify", pb.ClassifyRequest(task="digits", images=[encoded(JPEG)] * 5), "images: found 5, expected at most 4"),
        (
            "ClassifyTasks",
            pb.ClassifyTasksRequest(image=encoded(JPEG), tasks=["digits"] * 7),
            "tasks: found 7, expected at most 6",
        ),
        ("ClassifyTasks", pb.ClassifyTasksRequest(tasks=["digits"]), "image: found no content"),
    )
    for method, request, words in cases:
        status, details = call(channel, method, request)
        assert (status, words in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details


def test_messages_that_are_too_large(channel: grpc.Channel) -> None:
    status, _ = call(channel, "Classify", pb.ClassifyRequest(task="digits", images=[encoded(bytes(300_000))]))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", ["Classify", "ClassifyTasks", "ListTasks", "GetTask"])
def test_bytes_that_are_no_request(channel: grpc.Channel, method: str) -> None:
    for garbage in (b"\xff" * 50, b"\x0a\xff", bytes(range(256)), b"\x0a\x02\xff\xfe"):
        status, details = call(channel, method, garbage)
        # Some bytes happen to be a request of unknown fields.
        assert status in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OK)
        if garbage[0] == 0xFF:
            assert status is grpc.StatusCode.INVALID_ARGUMENT
            assert f"expected a {method}Request" in details


def test_an_unknown_method(channel: grpc.Channel) -> None:
    assert call(channel, "Teleport", b"")[0] is grpc.StatusCode.UNIMPLEMENTED


def test_what_goes_wrong_inside_is_told_by_an_id_only(channel: grpc.Channel, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.full((8, 8, 3), 255, np.uint8)
    request = pb.ClassifyRequest(task="trap", images=[raw(8, 8, 3, pixels.tobytes())])
    with caplog.at_level("ERROR"):
        status, details = call(channel, "Classify", request)
    assert status is grpc.StatusCode.INTERNAL
    assert details.startswith("the server failed to answer; its log says why under the id ")
    assert details.split()[-1] in caplog.text
    assert "Gather" in caplog.text
    assert "Gather" not in details


def test_a_passed_deadline(channel: grpc.Channel) -> None:
    request = pb.ClassifyRequest(task="digits", images=[encoded(JPEG)])
    assert call(channel, "Classify", request, timeout=0)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert call(channel, "Classify", request, timeout=1e-6)[0] is grpc.StatusCode.DEADLINE_EXCEEDED


def test_the_client_raises_by_kind(server: ServerThread, tmp_path: pathlib.Path) -> None:
    with Client(server.address) as client:
        with pytest.raises(TaskNotFoundError, match="did you mean 'greek'") as caught:
            client.classify("geek", JPEG)
        assert (caught.value.status, caught.value.method, caught.value.server) == ("NOT_FOUND", "Classify", server.address)
        with pytest.raises(CallRefusedError, match="images\\[0\\]"):
            client.classify("digits", b"nothing")
        with pytest.raises(FileNotFoundError):
            client.classify("digits", tmp_path / "none.png")
        with pytest.raises(TypeError, match=r"expected bytes, pathlib\.Path or a numpy array"):
            client.classify("digits", "image.png")
        with pytest.raises(ValueError, match="found pixels"):
            client.classify("digits", PIXELS.astype(np.float32))
        with pytest.raises(TypeError, match=r"write \['digits'\]"):
            client.classify_tasks(JPEG, "digits")
