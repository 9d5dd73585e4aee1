"""The Open Inference Protocol heeds tokens as the server's own calls do."""

from __future__ import annotations

import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from server.config import TokenSettings
from server.tokens import add_line, line_of, new_token
from tests.support.repository import TASKS, RepositoryBuilder, random_images
from tests.support.serving import ServerThread, serving

FEW, READ = new_token(), new_token()


@pytest.fixture
def token_file(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "tokens.toml"
    add_line(file, line_of("few", "infer", FEW, ("digits", "h*")))
    add_line(file, line_of("read", "read", READ))
    return file


@pytest.fixture
def server(tmp_path: pathlib.Path, token_file: pathlib.Path) -> Iterator[ServerThread]:
    RepositoryBuilder(tmp_path / "repository").publish()
    with serving(tmp_path / "repository", tokens=TokenSettings(file=token_file)) as server:
        yield server


def bearing(token: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {token}"),), "timeout": 20}


def infer(task: str) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=task, id="1")
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 8, 8, 3])
    request.raw_input_contents.append(random_images(1, 8).tobytes())
    return request


def status(call: Any, request: Any, **options: Any) -> str:
    try:
        call(request, **options)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def test_roles_and_tasks(server: ServerThread) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(service_pb2.ServerLiveRequest()).live
        assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
        assert status(stub.ModelInfer, infer("digits")) == "UNAUTHENTICATED"
        assert status(stub.ServerMetadata, service_pb2.ServerMetadataRequest()) == "UNAUTHENTICATED"
        assert status(stub.ModelInfer, infer("digits"), **bearing(READ)) == "PERMISSION_DENIED"
        assert status(stub.RepositoryModelLoad, service_pb2.RepositoryModelLoadRequest(), **bearing(FEW)) == "PERMISSION_DENIED"
        assert status(stub.ModelInfer, infer("digits"), **bearing(FEW)) == "OK"
        assert status(stub.ModelInfer, infer("greek"), **bearing(FEW)) == "NOT_FOUND"
        for token, names in ((FEW, ["digits", "hebrew"]), (READ, sorted(TASKS))):
            index = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), **bearing(token))
            assert [model.name for model in index.models] == names
            statistics = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), **bearing(token))
            assert [model.name for model in statistics.model_stats] == names
        for name, ready in (("digits", True), ("greek", False), ("nobody", False)):
            assert stub.ModelReady(service_pb2.ModelReadyRequest(name=name), **bearing(FEW)).ready is ready
        assert status(stub.ModelMetadata, service_pb2.ModelMetadataRequest(name="greek"), **bearing(FEW)) == "NOT_FOUND"
        assert status(stub.ModelConfig, service_pb2.ModelConfigRequest(name="greek"), **bearing(FEW)) == "NOT_FOUND"


def test_a_stream_ends_when_its_token_does(server: ServerThread, token_file: pathlib.Path) -> None:
    def requests() -> Iterator[service_pb2.ModelInferRequest]:
        while True:
            yield infer("digits")
            time.sleep(0.01)

    with grpc.insecure_channel(server.address) as channel:
        stream = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests(), **bearing(FEW))
        assert not next(stream).error_message
        threading.Timer(0.1, lambda: token_file.write_text("[tokens]\n")).start()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
