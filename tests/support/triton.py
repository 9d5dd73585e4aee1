"""A real Triton for tests: the environment that `make triton` makes, and calls without the code under test."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from server.config import ServerSettings
from server.triton.environment import TritonEnvironment, find_environment
from server.triton.process import TritonProcess
from tests.support.processes import TOP
from tests.support.serving import ENGINE, server_settings

_TYPES = {"uint8": "UINT8", "float32": "FP32", "float16": "FP16"}


def environment() -> TritonEnvironment:
    return find_environment(TOP / ".triton")


def triton_settings(repository: pathlib.Path, *tritons: TritonProcess, **overrides: Any) -> ServerSettings:
    """Returns settings of a server on these Tritons; overrides are of the table `triton`."""
    triton: dict[str, Any] = {
        "endpoints": [process.addresses.grpc for process in tritons],
        "probe_interval_seconds": 0.1,
        "start_seconds": 10.0,
    }
    return server_settings(repository, engine=ENGINE.model_copy(update={"kind": "triton"}), triton=triton | overrides)


def segment_process(process: TritonProcess, segment: str) -> int:
    """Returns the id of the process that runs a segment within a Triton."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            # The processes of a Triton are of its session: several may have the segment.
            if f"/{segment}/".encode() in (entry / "cmdline").read_bytes() and os.getsid(int(entry.name)) == process.pid:
                found.append(int(entry.name))
    (pid,) = found
    return pid


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} does not hold after {seconds:g} s")
        time.sleep(0.02)


class Caller:
    """Plain calls of KServe v2 over gRPC."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def load(self, *models: str) -> None:
        for model in models:
            self.stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name=model), timeout=60)

    def ready(self) -> set[str]:
        """Returns the names of the models that answer."""
        return {
            model.name for model in self.stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True), timeout=20).models
        }

    def counts(self) -> dict[str, tuple[int, int]]:
        """Returns rows and executions of each model, as Triton counts them."""
        answer = self.stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=20)
        return {model.name: (model.inference_count, model.execution_count) for model in answer.model_stats}

    def infer(self, model: str, tensor: np.ndarray, name: str = "image", timeout: float = 20) -> dict[str, np.ndarray]:
        return read_response(self.stub.ModelInfer(make_request(model, tensor, name), timeout=timeout))


def make_request(model: str, tensor: np.ndarray, name: str = "image") -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[tensor.tobytes()])
    request.inputs.add(name=name, datatype=_TYPES[tensor.dtype.name], shape=tensor.shape)
    return request


def read_response(response: service_pb2.ModelInferResponse) -> dict[str, np.ndarray]:
    return {
        output.name: np.frombuffer(content, np.float32).reshape(list(output.shape))
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }
