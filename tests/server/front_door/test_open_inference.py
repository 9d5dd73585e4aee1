"""The Open Inference Protocol over real gRPC, asked by an unmodified tritonclient."""

from __future__ import annotations

import asyncio
import json
import pathlib
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

import munet
from server.classification import softmax
from server.client import Client
from server.triton.process import TritonProcess
from tests.support.images import encode
from tests.support.repository import DIGITS, HEBREW, SHORT, TASKS, RepositoryBuilder, random_images
from tests.support.serving import ServerThread, serving, wait_until
from tests.support.triton import Caller

IMAGES = random_images(5, 8, seed=11)
PICTURES = [encode(random_images(1, side, seed=side)[0], "PNG") for side in (8, 21, 40)]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("repository"))
    builder.publish()
    return builder


@pytest.fixture(scope="module")
def server(builder: RepositoryBuilder) -> Iterator[ServerThread]:
    with serving(builder.root) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerThread) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with tritonclient.grpc.InferenceServerClient(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def stub(server: ServerThread) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def pixels(images: np.ndarray) -> list[tritonclient.grpc.InferInput]:
    tensor = tritonclient.grpc.InferInput("image", images.shape, "UINT8")
    return [tensor.set_data_from_numpy(images)]


def files(contents: list[bytes]) -> list[tritonclient.grpc.InferInput]:
    tensor = tritonclient.grpc.InferInput("image", [len(contents)], "BYTES")
    return [tensor.set_data_from_numpy(np.array(contents, dtype=np.object_))]


def reference(server: ServerThread, task: str, images: list[Any]) -> np.ndarray:
    with Client(server.address) as client:
        result = client.classify(task, images, include_logits=True)
    return np.stack([found.logits for found in result.classifications])


# What is asked of the server and its tasks


def test_it_lives_and_is_ready(client: tritonclient.grpc.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert not client.is_model_ready("digits", "2")
    assert not client.is_model_ready("unknown")


def test_what_the_server_is(client: tritonclient.grpc.InferenceServerClient) -> None:
    metadata = client.get_server_metadata(as_json=True)
    assert (metadata["name"], metadata["version"]) == ("munet", munet.__version__)
    assert "classification" in metadata["extensions"]


def test_what_a_task_takes_and_gives(client: tritonclient.grpc.InferenceServerClient) -> None:
    assert client.get_model_metadata("large", as_json=True) == {
        "name": "large",
        "versions": ["1"],
        "platform": "munet",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": ["-1", "16", "16", "3"]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": ["-1", "4"]},
            {"name": "probabilities", "datatype": "FP32", "shape": ["-1", "4"]},
        ],
    }


def test_the_config_is_tritons_own_message_with_the_labels(client: tritonclient.grpc.InferenceServerClient) -> None:
    config = client.get_model_config("digits", "1").config
    assert isinstance(config, model_config_pb2.ModelConfig)
    assert (config.name, config.max_batch_size, list(config.version_policy.specific.versions)) == ("digits", 64, [1])
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.input] == [
        ("image", model_config_pb2.TYPE_UINT8, [8, 8, 3])
    ]
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.output] == [
        ("logits", model_config_pb2.TYPE_FP32, [10]),
        ("probabilities", model_config_pb2.TYPE_FP32, [10]),
    ]
    assert json.loads(config.parameters["labels"].string_value) == list(DIGITS.labels)
    assert config.parameters["generation"].string_value == "1"


def test_the_index_names_every_task(client: tritonclient.grpc.InferenceServerClient) -> None:
    index = client.get_model_repository_index().models
    assert [(model.name, model.version, model.state) for model in index] == [(name, "1", "READY") for name in sorted(TASKS)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda client: client.load_model("digits"), "munet-evolve export"),
        (lambda client: client.unload_model("digits"), "munet-evolve remove"),
        (lambda client: client.get_system_shared_memory_status(), "send tensors in the message"),
        (lambda client: client.register_system_shared_memory("a", "/a", 8), "send tensors in the message"),
        (lambda client: client.unregister_system_shared_memory(), "send tensors in the message"),
        (lambda client: client.get_cuda_shared_memory_status(), "send tensors in the message"),
        (lambda client: client.register_cuda_shared_memory("a", b"", 0, 8), "send tensors in the message"),
        (lambda client: client.unregister_cuda_shared_memory(), "send tensors in the message"),
        (lambda client: client.get_trace_settings(), "callers do not decide"),
        (lambda client: client.update_trace_settings("digits", {"trace_rate": "1"}), "callers do not decide"),
        (lambda client: client.get_log_settings(), "callers do not decide"),
        (lambda client: client.update_log_settings({"log_info": False}), "callers do not decide"),
    ],
)
def test_what_is_not_here_says_why(client: tritonclient.grpc.InferenceServerClient, call: Any, words: str) -> None:
    with pytest.raises(InferenceServerException, match=words) as caught:
        call(client)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_no_method_of_the_protocol_is_missing(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    refused = {}
    for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        if not method.client_streaming:
            try:
                getattr(stub, method.name)(getattr(service_pb2, method.input_type.name)(), timeout=10)
            except grpc.RpcError as error:
                refused[method.name] = (error.code(), error.details())
    nameless = {name for name, (code, words) in refused.items() if code is grpc.StatusCode.NOT_FOUND and "found ''" in words}
    assert nameless == {"ModelMetadata", "ModelConfig", "ModelInfer"}
    reasons = {name: words for name, (code, words) in refused.items() if code is grpc.StatusCode.UNIMPLEMENTED}
    assert len(reasons) == 10
    assert all("this server has none, because" in words for words in reasons.values())
    assert set(refused) == nameless | set(reasons)


# Answers


@pytest.mark.parametrize("task", TASKS)
def test_pixels_are_answered_as_classify_answers(
    server: ServerThread, client: tritonclient.grpc.InferenceServerClient, task: str
) -> None:
    images = random_images(3, TASKS[task].image_size, seed=3)
    answer = client.infer(task, pixels(images), request_id="seven")
    expected = reference(server, task, list(images))
    assert answer.as_numpy("logits").tobytes() == expected.tobytes()
    assert np.array_equal(answer.as_numpy("probabilities"), softmax(expected).astype(np.float32))
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == (task, "1", "seven")
    with Client(server.address) as ours:
        assert response.parameters["path_id"].string_param == ours.get_task(task).path_id


def test_files_are_answered_as_classify_answers(server: ServerThread, client: tritonclient.grpc.InferenceServerClient) -> None:
    answer = client.infer("hebrew", files(PICTURES))
    assert answer.as_numpy("logits").tobytes() == reference(server, "hebrew", PICTURES).tobytes()


def test_contents_in_the_tensor_are_the_same(server: ServerThread, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    request = service_pb2.ModelInferRequest(model_name="digits")
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=IMAGES.shape)
    tensor.contents.uint_contents.extend(IMAGES.reshape(-1).tolist())
    assert stub.ModelInfer(request).raw_output_contents[0] == reference(server, "digits", list(IMAGES)).tobytes()
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[3])
    tensor.contents.bytes_contents.extend(PICTURES)
    response = stub.ModelInfer(service_pb2.ModelInferRequest(model_name="digits", inputs=[tensor]))
    assert response.raw_output_contents[0] == reference(server, "digits", PICTURES).tobytes()


def test_only_what_is_asked_for_is_answered(client: tritonclient.grpc.InferenceServerClient) -> None:
    everything = client.infer("digits", pixels(IMAGES)).get_response()
    assert [output.name for output in everything.outputs] == ["logits", "probabilities"]
    asked = [tritonclient.grpc.InferRequestedOutput(name) for name in ("probabilities", "logits")]
    turned = client.infer("digits", pixels(IMAGES), outputs=asked).get_response()
    assert [output.name for output in turned.outputs] == ["probabilities", "logits"]
    assert list(turned.raw_output_contents) == list(everything.raw_output_contents)[::-1]
    one = client.infer("digits", pixels(IMAGES), outputs=asked[:1])
    assert one.as_numpy("logits") is None


def test_the_most_probable_classes_by_name(server: ServerThread, client: tritonclient.grpc.InferenceServerClient) -> None:
    logits = reference(server, "digits", list(IMAGES))
    order = np.argsort(-logits, axis=1, kind="stable")
    asked = [
        tritonclient.grpc.InferRequestedOutput("logits", class_count=3),
        tritonclient.grpc.InferRequestedOutput("probabilities", class_count=1000),
    ]
    answer = client.infer("digits", pixels(IMAGES), outputs=asked)
    found = answer.as_numpy("logits")
    assert found.shape == (5, 3)
    for row, index in np.ndindex(5, 3):
        value, number, label = found[row, index].decode().split(":")
        assert (int(number), label) == (order[row, index], DIGITS.labels[order[row, index]])
        assert value == f"{logits[row, order[row, index]]:f}"
    assert answer.as_numpy("probabilities").shape == (5, 10)


def test_a_request_may_ask_for_the_generation_that_serves(client: tritonclient.grpc.InferenceServerClient) -> None:
    assert client.infer("digits", pixels(IMAGES), model_version="1").get_response().model_version == "1"
    for call in (
        lambda: client.infer("digits", pixels(IMAGES), model_version="2"),
        lambda: client.get_model_metadata("digits", "2"),
        lambda: client.get_model_config("digits", "2"),
        lambda: client.get_inference_statistics("digits", "2"),
    ):
        with pytest.raises(InferenceServerException, match="model_version: found '2', expected none or '1'") as caught:
            call()
        assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_statistics_count_what_every_front_door_was_asked(
    server: ServerThread, client: tritonclient.grpc.InferenceServerClient
) -> None:
    def counts() -> dict[str, tuple[int, int, int, int]]:
        return {
            model.name: (
                model.inference_count,
                model.inference_stats.success.count,
                model.inference_stats.fail.count,
                model.execution_count,
            )
            for model in client.get_inference_statistics().model_stats
        }

    def executions() -> dict[str, int]:
        generation = server.server.reloader.generation
        ran = {segment.name: segment.executions for segment in server.server.engine.statistics()}
        return {name: ran[generation.tasks[name].route[-1]] for name in TASKS}

    before, ran_before = counts(), executions()
    assert sorted(before) == sorted(TASKS)
    client.infer("short", pixels(IMAGES))
    with Client(server.address) as ours:
        ours.classify_tasks(IMAGES[0], ["short", "greek"])
    with pytest.raises(InferenceServerException):
        client.infer("short", files([b"no image"]))
    after, ran_after = counts(), executions()
    change = {name: tuple(np.subtract(after[name], before[name])) for name in TASKS}
    # Five images and one. How many batches they make, two or more, is up to what the engine has measured of its speed.
    num_batches = ran_after["short"] - ran_before["short"]
    assert 2 <= num_batches <= 6
    assert change["short"] == (6, 2, 1, num_batches)
    assert change["greek"] == (1, 1, 0, 1)
    assert change["large"] == (0, 0, 0, 0)
    (model,) = client.get_inference_statistics("short", "1").model_stats
    assert model.last_inference > 1.7e12
    assert 0 < model.inference_stats.success.ns < 600e9


def test_the_async_client_answers_alike(server: ServerThread) -> None:
    async def ask() -> set[bytes]:
        async with tritonclient.grpc.aio.InferenceServerClient(server.address) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("digits")
            assert (await client.get_model_metadata("digits")).versions == ["1"]
            answers = await asyncio.gather(*(client.infer("digits", pixels(IMAGES)) for _ in range(30)))
        return {answer.as_numpy("logits").tobytes() for answer in answers}

    assert asyncio.run(ask()) == {reference(server, "digits", list(IMAGES)).tobytes()}


# Streams


def test_a_stream_answers_in_order_and_failures_end_nothing(server: ServerThread) -> None:
    answered: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.address) as client:
        client.start_stream(lambda result, error: answered.put((result, error)))
        for index in range(100):
            # Files take longer than pixels: were answers not put in order, the first would come last.
            inputs = files(PICTURES * 10) if index % 7 == 0 else pixels(IMAGES)
            client.async_stream_infer("digits" if index % 10 else "digitz", inputs, request_id=str(index))
        found = [answered.get(timeout=30) for _ in range(100)]
        client.stop_stream()
    expected = {
        True: reference(server, "digits", PICTURES * 10).tobytes(),
        False: reference(server, "digits", list(IMAGES)).tobytes(),
    }
    for index, (result, error) in enumerate(found):
        if index % 10:
            assert error is None
            response = result.get_response()
            assert response.id == str(index)
            assert response.parameters["triton_final_response"].bool_param
            assert result.as_numpy("logits").tobytes() == expected[index % 7 == 0]
        else:
            assert result is None
            assert "found 'digitz'" in str(error)
            assert "did you mean 'digits'?" in str(error)


def test_the_async_client_streams(server: ServerThread) -> None:
    async def messages() -> AsyncIterator[dict[str, Any]]:
        for index in range(60):
            yield {"model_name": "digits", "inputs": pixels(IMAGES[index % 5 :]), "request_id": str(index)}

    async def ask() -> list[tuple[str, np.ndarray]]:
        async with tritonclient.grpc.aio.InferenceServerClient(server.address) as client:
            stream = client.stream_infer(messages())
            found = []
            async for result, error in stream:
                assert error is None
                found.append((result.get_response().id, result.as_numpy("logits")))
            return found

    expected = reference(server, "digits", list(IMAGES))
    found = asyncio.run(ask())
    assert [name for name, _ in found] == [str(index) for index in range(60)]
    assert all(np.array_equal(logits, expected[index % 5 :]) for index, (_, logits) in enumerate(found))


def test_a_failed_message_of_a_stream_is_told_by_its_id(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    requests = [service_pb2.ModelInferRequest(model_name="unknown", id="a"), service_pb2.ModelInferRequest(id="b")]
    answers = list(stub.ModelStreamInfer(iter(requests), timeout=10))
    assert [answer.infer_response.id for answer in answers] == ["a", "b"]
    assert all(answer.error_message.startswith("task: found ") for answer in answers)


def test_an_empty_stream_ends(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    assert list(stub.ModelStreamInfer(iter([]), timeout=10)) == []


def test_a_stream_goes_on_over_a_reload(tmp_path: pathlib.Path) -> None:
    builder = RepositoryBuilder(tmp_path)
    builder.publish({"digits": DIGITS})
    requests: queue.Queue[Any] = queue.Queue()
    with serving(builder.root) as server, grpc.insecure_channel(server.address) as channel:
        request = service_pb2.ModelInferRequest(model_name="digits", raw_input_contents=[IMAGES.tobytes()])
        request.inputs.add(name="image", datatype="UINT8", shape=IMAGES.shape)
        answers = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(requests.get, None), timeout=30)
        requests.put(request)
        first = next(answers).infer_response
        builder.publish({"digits": HEBREW})
        wait_until(lambda: server.server.reloader.generation.number == 2)
        requests.put(request)
        second = next(answers).infer_response
        assert (first.model_version, list(first.outputs[0].shape)) == ("1", [5, 10])
        assert (second.model_version, list(second.outputs[0].shape)) == ("2", [5, 5])
        requests.put(None)
        assert list(answers) == []


# Beside a real Triton


def _told(address: str) -> list[Any]:
    """Asks a server of the Open Inference Protocol this and that, and returns what must not depend on who it is."""
    told: list[Any] = []
    with tritonclient.grpc.InferenceServerClient(address) as client:
        metadata = client.get_model_metadata("alike")
        told += [metadata.versions, metadata.inputs, metadata.outputs[0], client.is_model_ready("unknown")]
        for classes in (0, 2, 20):
            asked = [tritonclient.grpc.InferRequestedOutput("logits", class_count=classes)]
            response = client.infer("alike", pixels(IMAGES), request_id="a", outputs=asked).get_response()
            told += [response.model_name, response.model_version, response.id, response.outputs, response.raw_output_contents]
        wrong = random_images(1, 9)
        for model, version, images, output in (
            ("alike", "", wrong, "logits"),
            ("alike", "", IMAGES, "unknown"),
            ("alike", "999999", IMAGES, "logits"),
        ):
            with pytest.raises(InferenceServerException) as caught:
                client.infer(model, pixels(images), version, [tritonclient.grpc.InferRequestedOutput(output)])
            told.append(caught.value.status())
    with grpc.insecure_channel(address) as channel:
        requests = []
        for images in (wrong, IMAGES):
            request = service_pb2.ModelInferRequest(model_name="alike", id="b", raw_input_contents=[images.tobytes()])
            request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
            request.outputs.add(name="logits")
            requests.append(request)
        for answer in service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(requests)):
            response = answer.infer_response
            final = response.parameters.get("triton_final_response")
            told += [bool(answer.error_message), response.id, response.model_name, response.raw_output_contents, final]
    return [[*value] if isinstance(value, Sequence) and not isinstance(value, str) else value for value in told]


def test_a_triton_answers_the_same_client_alike(triton: TritonProcess, triton_folder: pathlib.Path) -> None:
    builder = RepositoryBuilder(triton_folder)
    number = builder.publish({"alike": SHORT})
    segments = [segment.name for segment in builder.read_manifest(number).segments]
    with Caller(triton.addresses.grpc) as caller, serving(builder.root) as server:
        caller.load(*segments, "alike")
        theirs, ours = _told(triton.addresses.grpc), _told(server.address)
        caller.unload("alike", *segments)
    # A Triton calls every generation version 1.
    assert str(number) in ours[0]
    ours = [["1"] if value == [str(number)] else "1" if value == str(number) else value for value in ours]
    assert ours == theirs
