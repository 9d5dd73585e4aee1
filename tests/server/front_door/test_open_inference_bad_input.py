"""The Open Inference Protocol under bad input of every kind: a clear error each time, and nobody else hears of it."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from server.config import Limits
from tests.support.images import bomb, encode
from tests.support.open_inference import IMAGES, Request, Stub, good, infer, tensor
from tests.support.repository import TASKS, TRAP, RepositoryBuilder
from tests.support.serving import ServerThread, serving

LIMITS = Limits(max_image_bytes=20_000, max_image_pixels=10_000, max_images=4, max_message_bytes=200_000)
PICTURE = encode(IMAGES[0])


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("repository"))
    builder.publish({**TASKS, "trap": TRAP})
    return builder


@pytest.fixture(scope="module")
def server(builder: RepositoryBuilder) -> Iterator[ServerThread]:
    with serving(builder.root, limits=LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: ServerThread) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def asking(*outputs: tuple[str, dict[str, Any]]) -> Any:
    request = good()
    for name, parameters in outputs:
        output = request.outputs.add(name=name)
        for key, value in parameters.items():
            output.parameters[key].CopyFrom(value)
    return request


def elements(*contents: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(content)) + content for content in contents)


def number(**value: Any) -> Any:
    return service_pb2.InferParameter(**value)


SHARED = {"shared_memory_region": number(string_param="region")}
TWICE = good()
TWICE.inputs.add(name="image", datatype="UINT8", shape=[1, 8, 8, 3])
LATE = good()
LATE.parameters["timeout"].string_param = "soon"

BAD = {
    "no input": (Request(model_name="digits"), "inputs: found 0 tensors, expected one, 'image'"),
    "two inputs": (TWICE, "inputs: found 2 tensors"),
    "another input": (tensor([1], name="x" * 10_000), "expected 'image'"),
    "no type": (
        tensor([2, 8, 8, 3], "", raw=IMAGES.tobytes()),
        "found '' [2, 8, 8, 3], expected UINT8 [images, 8, 8, 3] or BYTES",
    ),
    "floats": (tensor([2, 8, 8, 3], "FP32", raw=bytes(1536)), "found 'FP32' [2, 8, 8, 3]"),
    "a type of 10 kB": (tensor([2, 8, 8, 3], "é" * 10_000, raw=b""), "..."),
    "no shape": (tensor([], raw=IMAGES.tobytes()), "found 'UINT8' []"),
    "one image without a batch": (tensor([8, 8, 3], raw=bytes(192)), "found 'UINT8' [8, 8, 3]"),
    "channels first": (
        tensor([2, 3, 8, 8], raw=IMAGES.tobytes()),
        "found 'UINT8' [2, 3, 8, 8], expected UINT8 [images, 8, 8, 3]",
    ),
    "another size": (tensor([1, 9, 8, 3], raw=bytes(216)), "resize images to 8 x 8 pixels"),
    "a thousand dimensions": (tensor([1] * 1000, raw=b"1"), "(1000 dimensions)"),
    "no image": (tensor([0, 8, 8, 3], raw=b""), "images: found 0, expected at least one"),
    "fewer than no image": (tensor([-1, 8, 8, 3], raw=IMAGES.tobytes()), "images: found -1, expected at least one"),
    "negative height": (tensor([1, -8, -8, 3], raw=bytes(192)), "found 'UINT8' [1, -8, -8, 3]"),
    "a huge batch": (tensor([2**62, 8, 8, 3], raw=IMAGES.tobytes()), f"images: found {2**62}, expected at most 4"),
    # The product of these is 0 and 192 in 64 bits.
    "a shape whose product overflows": (tensor([2**32, 2**32, 8, 3], raw=b""), "found 'UINT8' [4294967296, 4294967296, 8, 3]"),
    "a batch whose bytes overflow": (tensor([2**58 + 1, 8, 8, 3], raw=bytes(192)), "expected at most 4"),
    "too few bytes": (tensor([2, 8, 8, 3], raw=bytes(383)), "found 383 bytes, expected 384, which fill [2, 8, 8, 3]"),
    "too many bytes": (tensor([2, 8, 8, 3], raw=bytes(385)), "found 385 bytes, expected 384"),
    "no bytes": (tensor([2, 8, 8, 3], raw=b""), "found 0 bytes, expected 384"),
    "no content": (tensor([2, 8, 8, 3]), "found 0 numbers in `uint_contents`, expected 384"),
    "content twice": (tensor([2, 8, 8, 3], raw=bytes(384), uint_contents=[0] * 384), "expected it in one of them"),
    "two raw contents": (good(raw_input_contents=[b""]), "raw_input_contents: found 2 contents"),
    "content of another type": (tensor([2, 8, 8, 3], int_contents=[0] * 384), "found 0 numbers in `uint_contents`"),
    "a number above 255": (tensor([2, 8, 8, 3], uint_contents=[256] * 384), "found a number above 255"),
    "shared memory": (tensor([2, 8, 8, 3], raw=bytes(384), parameters=SHARED), "found shared memory"),
    "no file": (tensor([0], "BYTES", raw=b""), "images: found 0, expected at least one"),
    "too many files": (tensor([5], "BYTES", raw=elements(*[PICTURE] * 5)), "images: found 5, expected at most 4"),
    "a huge number of files": (tensor([2**63 - 1], "BYTES", raw=elements(PICTURE)), "expected at most 4"),
    "files in a matrix": (tensor([1, 1], "BYTES", raw=elements(PICTURE)), "found 'BYTES' [1, 1]"),
    "fewer files than said": (tensor([2], "BYTES", raw=elements(PICTURE)), "found 1 elements in"),
    "more files than said": (tensor([1], "BYTES", raw=elements(PICTURE, PICTURE)), "bytes after the last element"),
    "files without a length": (tensor([1], "BYTES", raw=PICTURE), "the lowest first"),
    "half a length": (tensor([1], "BYTES", raw=b"\x01\x00"), "found 0 elements in 2 bytes"),
    "a length beyond the end": (tensor([1], "BYTES", raw=b"\xff\xff\xff\xff123"), "found 3 bytes after the length of element 0"),
    "fewer elements than said": (tensor([2], "BYTES", bytes_contents=[PICTURE]), "found 1 elements in `bytes_contents`"),
    "an empty file": (tensor([1], "BYTES", raw=elements(b"")), "images[0]: found no bytes"),
    "no picture": (tensor([2], "BYTES", bytes_contents=[PICTURE, b"no picture"]), "images[1]: found 10 bytes that start with"),
    "a bomb": (tensor([1], "BYTES", raw=elements(bomb(50_000))), "2500000000 pixels"),
    "another output": (asking(("labels", {})), "outputs[0]: found 'labels', expected 'logits' or 'probabilities'"),
    "an output twice": (asking(("logits", {}), ("logits", {})), "outputs[1]: found 'logits' a second time"),
    "a thousand outputs": (asking(*[("logits", {})] * 1000), "outputs: found 1000 tensors"),
    "an output in shared memory": (asking(("logits", SHARED)), "outputs[0]: found shared memory"),
    "classes in words": (
        asking(("logits", {"classification": number(string_param="three")})),
        "outputs[0]: classification: found string_param 'three', expected int64_param of 1 or more",
    ),
    "fewer classes than one": (asking(("logits", {"classification": number(int64_param=-1)})), "found int64_param -1"),
    "classes that say nothing": (asking(("logits", {"classification": number()})), "classification: found nothing"),
    "a timeout in words": (LATE, "timeout (microseconds): found string_param 'soon'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(channel: grpc.Channel, name: str) -> None:
    request, words = BAD[name]
    status, details = infer(channel, request)
    assert (status, words in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details
    assert len(details) < 600
    # In a stream the same words come, and the next message is answered.
    failed, answered = Stub(channel).ModelStreamInfer(iter([request, good()]), timeout=10)
    assert failed.error_message == details
    assert answered.infer_response.model_name == "digits"


@pytest.mark.parametrize(
    "task", ["", "digit", "DIGITS", "x" * 10_000, "数字" * 2000, "\x00\n\u202e", "seg-000000000000", "../etc"]
)
def test_unknown_tasks(channel: grpc.Channel, task: str) -> None:
    stub = Stub(channel)
    for call in (
        lambda: stub.ModelInfer(good(task), timeout=10),
        lambda: stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=task), timeout=10),
        lambda: stub.ModelConfig(service_pb2.ModelConfigRequest(name=task), timeout=10),
        lambda: stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=task or "-"), timeout=10),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert len(caught.value.details()) < 1000
    assert not stub.ModelReady(service_pb2.ModelReadyRequest(name=task), timeout=10).ready


@pytest.mark.parametrize("version", ["0", "-1", "01", "\uff11", "x" * 10_000, "1 "])
def test_unknown_versions(channel: grpc.Channel, version: str) -> None:
    status, details = infer(channel, good(model_version=version))
    assert status is grpc.StatusCode.NOT_FOUND
    assert details.startswith("model_version: found ")
    assert len(details) < 1000


def test_a_great_count_of_classes_is_all_of_them(channel: grpc.Channel) -> None:
    request = asking(("logits", {"classification": number(uint64_param=2**64 - 1)}))
    assert list(Stub(channel).ModelInfer(request, timeout=10).outputs[0].shape) == [2, 10]


def test_bytes_that_are_no_request(channel: grpc.Channel) -> None:
    for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        if method.client_streaming:
            continue
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/inference.GRPCInferenceService/{method.name}")(b"\xff" * 50, timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"expected a {method.name}Request; build it from grpc_service.proto" in caught.value.details()


@pytest.mark.parametrize("seed", range(3))
def test_bytes_at_random(channel: grpc.Channel, seed: int) -> None:
    chance = random.Random(seed)
    for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        stream = channel.stream_stream(
            f"/inference.GRPCInferenceService/{method.name}",
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method.name}")
        for _ in range(20):
            # The tag of a short field of bytes first, so that some do parse.
            content = bytes([chance.choice([10, 18, 26, 42]), chance.randrange(6)]) + chance.randbytes(chance.randrange(12))
            if method.client_streaming:
                (answer,) = stream(iter([content]), timeout=10)
                assert "found " in answer.error_message
                continue
            try:
                call(content, timeout=10)
            except grpc.RpcError as error:
                status, words = error.code(), error.details()
            else:
                continue
            assert status in ALLOWED | {grpc.StatusCode.UNIMPLEMENTED}
            assert "found " in words or "because " in words


def test_bytes_that_are_no_message_do_not_end_a_stream(channel: grpc.Channel) -> None:
    stream = channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )
    answers = list(stream(iter([b"\xff" * 50, good().SerializeToString(), b"\x0a\xff"]), timeout=10))
    assert "expected a ModelInferRequest" in answers[0].error_message
    assert not answers[1].error_message
    assert "expected a ModelInferRequest" in answers[2].error_message


def test_a_message_that_is_too_large_ends_its_stream_only(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(Stub(channel).ModelStreamInfer(iter([good(id="x" * 300_000)]), timeout=10))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert infer(channel, good())[0] is grpc.StatusCode.OK


def test_what_goes_wrong_inside_is_told_by_an_id_only(channel: grpc.Channel, caplog: pytest.LogCaptureFixture) -> None:
    bad = tensor([1, 8, 8, 3], raw=b"\xff" * 192, model_name="trap", id="bad")
    with caplog.at_level("ERROR"):
        status, details = infer(channel, bad)
        failed, answered = Stub(channel).ModelStreamInfer(iter([bad, good()]), timeout=10)
    assert status is grpc.StatusCode.INTERNAL
    assert answered.infer_response.model_name == "digits"
    assert failed.infer_response.id == "bad"
    for words in (details, failed.error_message):
        assert words.startswith("the server failed to answer; its log says why under the id ")
        assert words.split()[-1] in caplog.text
        assert "Gather" not in words


# Anything at all


SIZES = [-(2**63), -1, 0, 1, 2, 3, 4, 8, 16, 2**31, 2**32, 2**63 - 1]
CONTENTS = [b"", bytes(192), IMAGES.tobytes(), elements(PICTURE), elements(b"", b""), b"\xff" * 9]


def _spoil(request: Any, chance: random.Random) -> None:
    """Changes something of a request at random."""
    sent = chance.choice(request.inputs) if request.inputs else request.inputs.add()
    match chance.randrange(10):
        case 0:
            request.model_name = chance.choice(["large", "", "ß" * 100])
        case 1:
            request.model_version = chance.choice(["1", "2", "-"])
        case 2:
            sent.name = chance.choice(["", "logits"])
        case 3:
            sent.datatype = chance.choice(["UINT8", "BYTES", "FP32", "", "BF16"])
        case 4:
            sent.shape[:] = chance.choice([[1], [2], [1, 8, 8, 3], chance.choices(SIZES, k=chance.randrange(6))])
        case 5:
            sent.contents.uint_contents.extend(chance.choices(range(260), k=chance.choice([0, 3, 192])))
        case 6:
            sent.contents.bytes_contents.extend(chance.choice([[], [b""], [PICTURE], [PICTURE[:40], b"x"]]))
        case 7:
            request.raw_input_contents[:] = chance.choices(CONTENTS, k=chance.choice([0, 1, 1, 2]))
        case 8:
            output = request.outputs.add(name=chance.choice(["logits", "probabilities", "x"]))
            output.parameters["classification"].int64_param = chance.choice([-1, 0, 1, 5, 2**62])
        case _:
            request.parameters[chance.choice(["timeout", "priority"])].int64_param = chance.choice([-1, 0, 1, 2**62])


def _anything(chance: random.Random) -> Any:
    """Returns a request that was good before something was changed, or nothing."""
    request = chance.choice([good(), tensor([1], "BYTES", raw=elements(PICTURE)), tensor([1], "BYTES", bytes_contents=[PICTURE])])
    request.id = chance.choice(["", "a", "é" * 500])
    for _ in range(chance.randrange(4)):
        _spoil(request, chance)
    return request


ALLOWED = {grpc.StatusCode[name] for name in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED")}


def test_anything_at_all_is_answered_and_disturbs_nobody(channel: grpc.Channel, server: ServerThread) -> None:
    chance = random.Random(7)
    stop = threading.Event()
    others: set[tuple[bytes, ...]] = set()

    def ask_well() -> None:
        with grpc.insecure_channel(server.address) as other:
            while not stop.is_set():
                others.add(tuple(Stub(other).ModelInfer(good(), timeout=20).raw_output_contents))

    asking_well = threading.Thread(target=ask_well)
    asking_well.start()
    try:
        seen = dict.fromkeys(ALLOWED, 0)
        requests = [_anything(chance) for _ in range(300)]
        for request in requests:
            status, details = infer(channel, request)
            assert status in ALLOWED, (status, details, request)
            assert status is grpc.StatusCode.OK or "found " in details or "deadline" in details
            seen[status] += 1
        answers = list(Stub(channel).ModelStreamInfer(iter(requests), timeout=60))
        # Bytes at random, as they are and as an alteration of what is good.
        for _ in range(300):
            content = bytearray(good().SerializeToString())
            for _ in range(chance.randrange(1, 20)):
                content[chance.randrange(40)] = chance.randrange(256)
            assert _status_of_bytes(channel, bytes(content)) in ALLOWED
    finally:
        stop.set()
        asking_well.join()
    assert min(seen[status] for status in ALLOWED - {grpc.StatusCode.DEADLINE_EXCEEDED}) >= 20
    assert [answer.infer_response.id for answer in answers] == [request.id for request in requests]
    assert len(others) == 1


def _status_of_bytes(channel: grpc.Channel, content: bytes) -> grpc.StatusCode:
    try:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(content, timeout=10)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
