"""A real Triton for tests: the environment that `make triton` makes, `munet-server triton run` in a process, plain calls."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype

from server.config import ServerSettings
from server.triton.engine import TritonEngine
from server.triton.environment import TritonEnvironment, find_environment
from server.triton.process import TritonProcess
from tests.support.processes import TOP, lives
from tests.support.processes import environment as variables
from tests.support.repository import RepositoryBuilder
from tests.support.serving import ENGINE, server_settings

FOLDER = TOP / ".triton"
TIMEOUT_SECONDS = 60


def environment() -> TritonEnvironment:
    return find_environment(FOLDER)


class TritonRun:
    """munet-server triton run on free ports; leaving the block stops it with SIGTERM.

    Args:
        repository: what it serves.
        output: the file of what it says.
        arguments: more of the command's own.
        wait: whether to wait until it says where it serves.

    Attributes:
        output: the file of what it says.
        status: exit status, after the block.
    """

    def __init__(self, repository: pathlib.Path, output: pathlib.Path, *arguments: str, wait: bool = True) -> None:
        command = [
            *(sys.executable, "-m", "server.cli", "triton", "run", "--repository", str(repository), "--environment", str(FOLDER)),
            *("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *arguments),
        ]
        self.output = output
        with output.open("wb") as stream:
            self.process = subprocess.Popen(command, env=variables(), stdout=stream, stderr=subprocess.STDOUT)
        self.status: int | None = None
        try:
            if wait:
                self.wait_until_serving()
        except BaseException:
            self.process.kill()
            raise

    def wait_until_serving(self) -> None:
        wait_until(lambda: "Triton serving" in self.said or self.process.poll() is not None)
        assert "Triton serving" in self.said, self.said

    @property
    def address(self) -> str:
        found = re.search(r"at (\S+), HTTP (\S+?),", self.said)
        assert found is not None, self.said
        return found[1]

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def log(self) -> pathlib.Path:
        return pathlib.Path(self.said.partition("log ")[2].split()[0])

    @property
    def triton_pid(self) -> int:
        (pid,) = children(self.process.pid)
        return pid

    def stub_pid(self, segment: str) -> int:
        """Of the process that runs a segment."""
        # One that was unloaded may take a moment to end.
        wait_until(lambda: len(self._stubs(segment)) == 1)
        return self._stubs(segment)[0]

    def _stubs(self, segment: str) -> list[int]:
        found = []
        for pid in children(self.triton_pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if segment in pathlib.Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.status = self.process.wait(timeout=TIMEOUT_SECONDS)
        return self.status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if self.process.poll() is None:
                self.stop()
        finally:
            self.process.kill()
            self.process.wait()


def triton_settings(repository: pathlib.Path, *tritons: TritonProcess, **overrides: Any) -> ServerSettings:
    """Returns settings of a server on these Tritons; overrides are of the table `triton`."""
    triton: dict[str, Any] = {
        "endpoints": [process.addresses.grpc for process in tritons],
        "probe_interval_seconds": 0.1,
        "start_seconds": 60.0,
    }
    return server_settings(repository, engine=ENGINE.model_copy(update={"kind": "triton"}), triton=triton | overrides)


@contextlib.contextmanager
def engine_on(builder: RepositoryBuilder, *tritons: TritonProcess, **settings: object) -> Iterator[TritonEngine]:
    """An engine on these Tritons, closed after the block."""
    engine = TritonEngine(triton_settings(builder.root, *tritons, **settings))
    try:
        yield engine
    finally:
        engine.close()


def segment_process(process: TritonProcess, segment: str) -> int:
    """Returns the id of the process that runs a segment within a Triton; 0 if there is none."""
    found = [pid for pid in children(process.pid) if f"/{segment}/" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()]
    return found[0] if found else 0


class Caller:
    """Plain calls of KServe v2 over gRPC."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, [("grpc.max_reconnect_backoff_ms", 100)])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def load(self, *models: str) -> None:
        for model in models:
            self.stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name=model), timeout=TIMEOUT_SECONDS)

    def unload(self, *models: str) -> None:
        for model in models:
            self.stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name=model), timeout=TIMEOUT_SECONDS)

    def ready(self) -> set[str]:
        """Returns the names of the models that answer, those without a folder too."""
        return set(self.counts())

    def counts(self) -> dict[str, tuple[int, int]]:
        """Returns rows and executions of each model, as Triton counts them."""
        while True:
            try:
                answer = self.stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=TIMEOUT_SECONDS)
                break
            except grpc.RpcError as error:
                # Triton lists its models first: one that is unloaded before it is asked fails the whole call.
                if "not at ready state" not in (error.details() or ""):
                    raise
        return {model.name: (model.inference_count, model.execution_count) for model in answer.model_stats}

    def executions(self, model: str) -> int:
        return int(self.stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=model)).model_stats[0].execution_count)

    def infer(self, model: str, tensor: np.ndarray, name: str = "image") -> dict[str, np.ndarray]:
        return read_response(self.stub.ModelInfer(make_request(model, tensor, name), timeout=TIMEOUT_SECONDS))


def make_request(model: str, tensor: np.ndarray, name: str = "image") -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[tensor.tobytes()])
    request.inputs.add(name=name, datatype=np_to_triton_dtype(tensor.dtype), shape=tensor.shape)
    return request


def read_response(response: service_pb2.ModelInferResponse) -> dict[str, np.ndarray]:
    types = {"FP32": np.float32, "FP16": np.float16}
    return {
        output.name: np.frombuffer(content, types[output.datatype]).reshape(list(output.shape))
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def children(pid: int) -> list[int]:
    """Returns the processes that a process started, those that ended aside."""
    found: list[int] = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        # Threads come and go meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, (task / "children").read_text().split())
    return [child for child in found if lives(child)]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not lives(pid))


def wait_until(condition: Callable[[], object], timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
