"""One Triton elsewhere: its calls over KServe v2 gRPC, and what its errors mean."""

from __future__ import annotations

import dataclasses
import pathlib
import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

# The stubs that tritonclient ships: a second copy of its messages in one process fails.
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from server.config import TritonSettings
from server.errors import (
    EndpointError,
    EndpointGoneError,
    EndpointSilentError,
    ModelDeadError,
    ModelFailedError,
    ModelMissingError,
    SettingsError,
)

CALL_SECONDS = 10.0
"""What a call may take that neither computes nor loads."""

_SILENCE = "no answer to {what} within {seconds:g} s"
_HEADER_OF_KEY = "triton-grpc-protocol-{name}"
_TRITON_TYPES = {"uint8": "UINT8", "float32": "FP32", "float16": "FP16"}
_LOGIT_TYPES = {"FP32": np.float32, "FP16": np.float16}
_OPTIONS = (
    # The front door bounds what it takes; what it took must get through.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # An endpoint that comes back is wanted at once, not when two minutes of growing pauses are over.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # In spite of its name, how long an attempt to connect may take. One that is refused ends at once all the same.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # A new channel is a new connection.
    ("grpc.use_local_subchannel_pool", 1),
)

# What Triton's errors mean: the first line that fits. A status of none is any, and words are looked for in what Triton says.
_ERRORS: tuple[tuple[grpc.StatusCode | None, str, type[EndpointError]], ...] = (
    (grpc.StatusCode.NOT_FOUND, "unknown model", ModelMissingError),
    (grpc.StatusCode.UNAVAILABLE, "unknown model", ModelMissingError),
    (grpc.StatusCode.UNAVAILABLE, "is not ready", ModelMissingError),
    (grpc.StatusCode.INTERNAL, "failed to poll from model repository", ModelMissingError),
    (None, "is not healthy", ModelDeadError),
    (grpc.StatusCode.UNAVAILABLE, "", EndpointGoneError),
    (grpc.StatusCode.DEADLINE_EXCEEDED, "", EndpointSilentError),
    (grpc.StatusCode.CANCELLED, "", EndpointGoneError),
    (grpc.StatusCode.UNAUTHENTICATED, "", EndpointGoneError),
    (grpc.StatusCode.PERMISSION_DENIED, "", EndpointGoneError),
    (grpc.StatusCode.UNIMPLEMENTED, "", EndpointGoneError),
    (None, "", ModelFailedError),
)

Images = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """What it takes to be let in by Triton.

    Attributes:
        credentials: of TLS; none means plain text.
        options: of the channel.
        metadata: goes with every call.
    """

    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]
    metadata: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, settings: TritonSettings) -> Access:
        """Reads the files that the settings name.

        Raises:
            SettingsError: a file cannot be read or does not say what it should.
        """
        certificate, key = settings.certificate_file, settings.key_file
        if (certificate is None) != (key is None):
            raise SettingsError("triton.certificate_file and triton.key_file", "one of them", "both or neither")
        if certificate is not None and settings.ca_file is None:
            raise SettingsError("triton.ca_file", None, "the authority that signed Triton's certificate, beside one of our own")
        credentials = None
        options: tuple[tuple[str, Any], ...] = _OPTIONS
        if settings.ca_file is not None:
            credentials = grpc.ssl_channel_credentials(
                root_certificates=_read(settings.ca_file, "ca_file"),
                private_key=_read(key, "key_file") if key is not None else None,
                certificate_chain=_read(certificate, "certificate_file") if certificate is not None else None,
            )
        if settings.server_name is not None:
            options = (*options, ("grpc.ssl_target_name_override", settings.server_name))
        return cls(credentials, options, _read_keys(settings.keys_file) if settings.keys_file is not None else ())


@dataclasses.dataclass(frozen=True, slots=True)
class ModelCounts:
    """What Triton counted of a model since it was loaded.

    Attributes:
        rows: rows that ran. What it answered from its cache did not run.
        executions: batches that ran.
        requests: requests that it answered, from its cache too.
    """

    rows: int
    executions: int
    requests: int


def _channel(address: str, access: Access) -> grpc.Channel:
    if access.credentials is None:
        return grpc.insecure_channel(address, access.options)
    return grpc.secure_channel(address, access.credentials, access.options)


class _Connections:
    """One for inferences, which must not be cancelled, and one for all else."""

    def __init__(self, address: str, access: Access) -> None:
        self.inference, self.control = (_channel(address, access) for _ in range(2))
        self.num_inferences = 0
        self.infer = service_pb2_grpc.GRPCInferenceServiceStub(self.inference).ModelInfer
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.control)


class Endpoint:
    """Calls of one Triton. All methods may be called from any thread.

    Args:
        address: HOST:PORT.
        access: what it takes to be let in.
    """

    def __init__(self, address: str, access: Access) -> None:
        self.address = address
        self._access = access
        self._lock = threading.Lock()
        self._landed = threading.Condition(self._lock)
        self._closed = False
        self._connections = _Connections(self.address, self._access)

    def reconnect(self) -> None:
        """Makes new connections. Calls on the old ones fail, but for inferences, which nobody awaits any more."""
        with self._lock:
            if self._closed:
                return
            old = self._connections
            self._connections = _Connections(self.address, self._access)
        # That of inferences is let go and closes itself when its last call is done: see `infer`.
        old.control.close()

    def close(self, patience_seconds: float = CALL_SECONDS) -> None:
        """Gives up the connections and the calls on them. Calls fail from now on.

        Args:
            patience_seconds: how long inferences under way may take to end, because they are not to be cancelled: see `infer`.
        """
        with self._lock:
            self._closed = True
            connections = self._connections
            connections.control.close()
            self._landed.wait_for(lambda: not connections.num_inferences, patience_seconds)
        connections.inference.close()

    def infer(self, request: service_pb2.ModelInferRequest, done: Callable[[Any], None]) -> None:
        """Starts an inference, which is neither cancelled nor has a deadline.

        Clients that leave take Triton 2.51 (of the wheel) down with them: an ensemble with steps side by side within some thousand calls,
        anything else now and then. See decision 14.

        Args:
            request: what to infer.
            done: called once with the finished call, in a thread of gRPC; `read_answer` makes logits or an error of it.

        Raises:
            EndpointGoneError: closed.
        """
        with self._lock:
            if self._closed:
                raise EndpointGoneError(self.address, "the connection is closed")
            connections = self._connections
            connections.num_inferences += 1

        def land(call: Any) -> None:
            with self._lock:
                connections.num_inferences -= 1
                self._landed.notify_all()
            done(call)

        connections.infer.future(request, metadata=self._access.metadata).add_done_callback(land)

    def ask(self, request: service_pb2.ModelInferRequest, timeout_seconds: float) -> dict[str, npt.NDArray[np.float32]]:
        """Infers and waits.

        Raises:
            EndpointError: it did not work.
        """
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.infer(request, finished.put)
        try:
            call = finished.get(timeout=timeout_seconds)
        except queue.Empty:
            raise EndpointSilentError(self.address, _SILENCE.format(what="inference", seconds=timeout_seconds)) from None
        return self.read_answer(call)

    def version(self) -> str:
        """Returns Triton's version.

        Raises:
            EndpointError: it did not work.
        """
        return str(self._call("ServerMetadata", service_pb2.ServerMetadataRequest(), CALL_SECONDS).version)

    def is_live(self, timeout_seconds: float) -> bool:
        """Returns whether Triton says that it lives.

        Raises:
            EndpointError: it did not say anything.
        """
        return bool(self._call("ServerLive", service_pb2.ServerLiveRequest(), timeout_seconds).live)

    def models(self) -> frozenset[str]:
        """Returns the names of the models in its repository.

        Raises:
            EndpointError: it did not work.
        """
        answer = self._call("RepositoryIndex", service_pb2.RepositoryIndexRequest(), CALL_SECONDS)
        return frozenset(model.name for model in answer.models)

    def loaded(self) -> frozenset[str]:
        """Returns the names of the models that it says are ready.

        Raises:
            EndpointError: it did not work.
        """
        # Of what it counts: its index leaves out what is loaded and has no folder any more.
        return frozenset(self.counts())

    def config(self, model: str) -> model_config_pb2.ModelConfig:
        """Returns the configuration that a loaded model runs with.

        Raises:
            EndpointError: it did not work.
        """
        return self._call("ModelConfig", service_pb2.ModelConfigRequest(name=model), CALL_SECONDS).config

    def load(self, model: str, timeout_seconds: float) -> None:
        """Loads a model, or its newest files; a model that is loaded already, unchanged, stays as it is.

        Raises:
            EndpointError: it did not work.
        """
        self._call("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name=model), timeout_seconds)

    def unload(self, model: str) -> None:
        """Unloads a model. What runs on it is finished first.

        Raises:
            EndpointError: it did not work.
        """
        self._call("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name=model), CALL_SECONDS)

    def counts(self, timeout_seconds: float = CALL_SECONDS) -> Mapping[str, ModelCounts]:
        """Returns what it counted, by model.

        Raises:
            EndpointError: it did not work.
        """
        answer = self._call("ModelStatistics", service_pb2.ModelStatisticsRequest(), timeout_seconds)
        return {
            model.name: ModelCounts(model.inference_count, model.execution_count, model.inference_stats.success.count)
            for model in answer.model_stats
        }

    def read_answer(self, call: Any) -> dict[str, npt.NDArray[np.float32]]:
        """Returns the logits of a finished inference, by output.

        Raises:
            EndpointError: it did not work.
        """
        try:
            return to_logits(call.result())
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise self._error(error, "no answer to inference") from error

    def _call(self, method: str, request: Any, timeout_seconds: float) -> Any:
        try:
            return getattr(self._connections.stub, method)(request, timeout=timeout_seconds, metadata=self._access.metadata)
        except (grpc.RpcError, grpc.FutureCancelledError, ValueError) as error:
            raise self._error(error, _SILENCE.format(what=method, seconds=timeout_seconds)) from error

    def _error(self, error: Exception, silence: str) -> EndpointError:
        if not isinstance(error, grpc.Call):
            return EndpointGoneError(self.address, str(error) or "the call was cancelled")
        status, words = error.code(), _legible(error.details() or "")
        for code, fragment, kind in _ERRORS:
            if code in (None, status) and fragment in words:
                return kind(self.address, silence if kind is EndpointSilentError else f"{words} ({status.name})")
        raise AssertionError("the last line of the table fits everything")


def to_request(
    model: str, rows: npt.NDArray[Any], outputs: Iterable[str], input_name: str = "image"
) -> service_pb2.ModelInferRequest:
    """Returns what asks a model.

    Args:
        model: an ensemble, or a segment.
        rows: what goes in, [rows, ...] uint8, float32 or float16.
        outputs: names of what is wanted. Triton does not run what leads to others only.
        input_name: name of what goes in.
    """
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[rows.tobytes()])
    request.inputs.add(name=input_name, datatype=_TRITON_TYPES[rows.dtype.name], shape=rows.shape)
    for output in outputs:
        request.outputs.add(name=output)
    return request


def to_logits(response: service_pb2.ModelInferResponse) -> dict[str, npt.NDArray[np.float32]]:
    """Returns the logits in an answer, [images, classes], by output."""
    return {
        output.name: np.frombuffer(content, _LOGIT_TYPES[output.datatype])
        .reshape(tuple(output.shape))
        .astype(np.float32, copy=False)
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def segments_in(words: str) -> frozenset[str]:
    """Returns the names of segments that occur in what Triton says."""
    return frozenset(re.findall(r"\bseg-[0-9a-f]{12}", words))


def _legible(words: str) -> str:
    """Returns words without what is no text: some of Triton's errors hold stray bytes, or where in its Python files they were raised."""
    words = words.partition("\n\nAt:")[0].rstrip(";\n ")
    return " ".join("".join(character if character.isprintable() else " " for character in words).split())[:1000]


def _read(file: pathlib.Path, setting: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SettingsError(f"triton.{setting}", str(file), f"a readable file ({error.strerror})") from error


def _read_keys(file: pathlib.Path) -> tuple[tuple[str, str], ...]:
    metadata = []
    for line in _read(file, "keys_file").decode(errors="replace").splitlines():
        name, separator, value = line.strip().partition("=")
        if not line.strip():
            continue
        if not separator or not re.fullmatch(r"[a-z0-9_.-]+", name) or not value.isprintable():
            # Not what was found: it may be a secret.
            raise SettingsError("triton.keys_file", str(file), "lines NAME=VALUE, the name of small letters, digits and - _ .")
        metadata.append((_HEADER_OF_KEY.format(name=name), value))
    return tuple(metadata)
