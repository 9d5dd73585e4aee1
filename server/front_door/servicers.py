"""The calls of proto/munet/v1. What they do is done elsewhere; here it is only asked for and converted."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Callable, Iterable

import munet
from munet.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from server.classification import Classifier
from server.engine import Engine
from server.front_door import converters
from server.front_door.edge import Context, deadline_of
from server.reload import Reloader
from server.triton.fleet import EndpointReport

# gRPC prescribes the methods' names.
# ruff: noqa: N802


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Questions by task name.

    Args:
        classifier: who answers.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    async def Classify(self, request: inference_pb2.ClassifyRequest, context: Context) -> inference_pb2.ClassifyResponse:
        """One task, one or more images."""
        deadline_seconds = deadline_of(context)
        images = converters.to_images(request.images)
        answer = await self._classifier.classify(request.task, images, request.top_k, deadline_seconds)
        return converters.from_task_answer(answer, request.include_logits)

    async def ClassifyTasks(
        self, request: inference_pb2.ClassifyTasksRequest, context: Context
    ) -> inference_pb2.ClassifyTasksResponse:
        """One image, several tasks or all of them."""
        deadline_seconds = deadline_of(context)
        image = converters.to_image(request.image, "image")
        answers = await self._classifier.classify_tasks(image, request.tasks, request.top_k, deadline_seconds)
        return converters.from_task_answers(answers, request.include_logits)

    async def ListTasks(self, request: inference_pb2.ListTasksRequest, context: Context) -> inference_pb2.ListTasksResponse:
        """Every task that is served."""
        generation, tasks = self._classifier.tasks()
        return inference_pb2.ListTasksResponse(generation=generation, tasks=map(converters.from_task, tasks))

    async def GetTask(self, request: inference_pb2.GetTaskRequest, context: Context) -> inference_pb2.GetTaskResponse:
        """One task."""
        generation, task = self._classifier.task(request.task)
        return inference_pb2.GetTaskResponse(generation=generation, task=converters.from_task(task))


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Questions and orders of whoever operates the server.

    Args:
        reloader: what serves.
        engine: what computes.
        endpoints: says what the Tritons are like that compute; nothing where none do.
    """

    def __init__(self, reloader: Reloader, engine: Engine, endpoints: Callable[[], Iterable[EndpointReport]] = tuple) -> None:
        self._reloader = reloader
        self._engine = engine
        self._endpoints = endpoints
        self._started = dt.datetime.now(dt.UTC)
        self._started_seconds = time.monotonic()

    async def Status(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.StatusResponse:
        """What is served, how the last reload went, and the engine's counters."""
        with self._reloader.lease() as generation:
            attempt = self._reloader.last_attempt
            # In a thread: a Triton may have to be asked.
            statistics = await asyncio.to_thread(self._engine.statistics)
            return admin_pb2.StatusResponse(
                generation=generation.number,
                num_tasks=len(generation.tasks),
                started=converters.timestamp(self._started),
                uptime=converters.duration(time.monotonic() - self._started_seconds),
                last_reload=converters.from_attempt(attempt) if attempt else None,
                segments=converters.from_segments(statistics, generation),
                engine=self._engine.name,
                version=munet.__version__,
                endpoints=map(converters.from_endpoint, self._endpoints()),
            )

    async def Reload(self, request: admin_pb2.ReloadRequest, context: Context) -> admin_pb2.ReloadResponse:
        """Serves the repository's current generation, if it does not do so already."""
        changed = await self._reloader.reload()
        with self._reloader.lease() as generation:
            return admin_pb2.ReloadResponse(generation=generation.number, changed=changed)
