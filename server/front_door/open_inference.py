"""The calls of the Open Inference Protocol (KServe v2, `inference.GRPCInferenceService`), in which a model is a task."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from tritonclient.grpc import service_pb2, service_pb2_grpc

import munet
from server.classification import Classifier
from server.config import Limits
from server.engine import Engine
from server.errors import UnsupportedError
from server.front_door import tensors
from server.front_door.edge import Context, deadline_of
from server.front_door.health import Health
from server.preprocessing import Preprocessor

# gRPC prescribes the methods' names.
# ruff: noqa: N802

OPEN_INFERENCE_SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

STREAM_FAILURES = {"GRPCInferenceService/ModelStreamInfer": tensors.from_stream_failure}
"""What answers a message of a stream that failed, as `server.front_door.edge.Edge` takes it."""

_EXTENSIONS = ("classification", "model_configuration", "parameters", "statistics")
_NO_SHARED_MEMORY = "what strangers may read and write is not this server's memory"


def _refusing(what: str, reason: str, advice: str) -> Callable[..., Awaitable[Any]]:
    """Makes a method that says why it is not here."""

    async def method(*_: Any) -> Any:
        raise UnsupportedError(what, reason, advice)

    return method


class OpenInferenceServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Questions by task name, as clients of Triton and KServe put them.

    Args:
        classifier: who answers.
        engine: whose counters are told.
        preprocessor: whose threads read tensors that come number by number.
        health: says what serves.
        limits: what is accepted.
    """

    def __init__(
        self, classifier: Classifier, engine: Engine, preprocessor: Preprocessor, health: Health, limits: Limits
    ) -> None:
        self._classifier = classifier
        self._preprocessor = preprocessor
        self._engine = engine
        self._health = health
        self._limits = limits

    async def ServerLive(self, request: Any, context: Context) -> Any:
        """Whether anybody answers."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> Any:
        """Whether questions are answered now, as health says."""
        return service_pb2.ServerReadyResponse(ready=self._health.is_serving)

    async def ModelReady(self, request: Any, context: Context) -> Any:
        """Whether a task is answered for now; one that is not known is not ready."""
        ready = self._health.is_serving and self._classifier.answers(request.name, request.version)
        return service_pb2.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        """What this server is."""
        return service_pb2.ServerMetadataResponse(name="munet", version=munet.__version__, extensions=_EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Context) -> Any:
        """What a task takes and gives."""
        return tensors.from_task(*self._classifier.task(request.name, request.version))

    async def ModelConfig(self, request: Any, context: Context) -> Any:
        """The same as Triton's own message, with the task's labels."""
        return tensors.to_config(*self._classifier.task(request.name, request.version), self._limits.max_images)

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        """One task, one or more images."""
        deadline_seconds = deadline_of(context, tensors.to_timeout_seconds(request))
        outputs = tensors.to_outputs(request)
        top_k = max(output.num_classes for output in outputs)
        label = self._classifier.label_for_pixels(request.model_name)
        with self._classifier.choose(request.model_name, label, request.model_version) as choice:
            to_images = functools.partial(tensors.to_images, request, choice.task, self._limits)
            images = await self._preprocessor.run(to_images, choice.task.name) if tensors.is_slow(request) else to_images()
            answer = await self._classifier.ask(choice, images, top_k, deadline_seconds)
        return tensors.from_answer(answer, outputs, request.id)

    async def ModelStreamInfer(self, request: Any, context: Context) -> Any:
        """The same for one message of a stream; `server.front_door.edge` makes the stream of it."""
        return tensors.to_streamed(await self.ModelInfer(request, context))

    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        """How often a task, or every task, was asked since the server started, and how that went."""
        number, tasks = self._classifier.tasks()
        if request.name:
            number, task = self._classifier.task(request.name, request.version)
            tasks = [task]
        # In a thread: a Triton may have to be asked.
        segments = {segment.name: segment for segment in await asyncio.to_thread(self._engine.statistics)}
        response = service_pb2.ModelStatisticsResponse()
        for task in tasks:
            tensors.add_statistics(response, number, task, self._classifier.counts.of(task.name), segments.get(task.route[-1]))
        return response

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        """Every task that is served; all of them are ready or none is."""
        if request.repository_name:
            raise UnsupportedError("repository_name", "it serves one repository, which has no name", "leave it out")
        number, tasks = self._classifier.tasks()
        response = service_pb2.RepositoryIndexResponse()
        for task in tasks:
            is_ready = self._health.is_ready(task.name)
            if is_ready or not request.ready:
                state, reason = ("READY", "") if is_ready else ("UNAVAILABLE", "the server answers nothing now")
                response.models.add(name=task.name, version=str(number), state=state, reason=reason)
        return response

    RepositoryModelLoad = _refusing(
        "loading a model",
        "it serves all tasks of the generation that was published last, and nobody else may change that here",
        "publish the task with `munet-evolve export`, or ask for Reload on the admin address",
    )
    RepositoryModelUnload = _refusing(
        "unloading a model",
        "it serves all tasks of the generation that was published last, and nobody else may change that here",
        "take the task out with `munet-evolve remove` and publish again with `munet-evolve export`",
    )
    SystemSharedMemoryStatus = _refusing("shared memory", _NO_SHARED_MEMORY, "send tensors in the message")
    SystemSharedMemoryRegister = SystemSharedMemoryStatus
    SystemSharedMemoryUnregister = SystemSharedMemoryStatus
    CudaSharedMemoryStatus = SystemSharedMemoryStatus
    CudaSharedMemoryRegister = SystemSharedMemoryStatus
    CudaSharedMemoryUnregister = SystemSharedMemoryStatus
    TraceSetting = _refusing("setting of traces", "callers do not decide what is recorded", "see the server's own settings")
    LogSettings = _refusing("setting of logs", "callers do not decide what is recorded", "see `munet-server serve --log-level`")
