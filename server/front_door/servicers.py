"""The calls of proto/munet/v1. What they do is done elsewhere; here it is only asked for and converted."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator, Callable, Iterable

import munet
from munet.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from server.classification import Classifier
from server.embedded.memory import MemoryStatistics
from server.engine import Engine
from server.errors import LimitError
from server.front_door import converters
from server.front_door.draining import Draining
from server.front_door.edge import Context, deadline_of
from server.generation import Generation
from server.reload import Reloader
from server.task_counts import TaskCounts
from server.triton.fleet import EndpointReport

# gRPC prescribes the methods' names.
# ruff: noqa: N802


STREAM_FAILURES = {"InferenceService/ClassifyStream": converters.from_stream_failure}
"""What answers a message of a stream that failed, as `server.front_door.edge.Edge` takes it."""


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Questions by task name.

    Args:
        classifier: who answers.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    async def Classify(self, request: inference_pb2.ClassifyRequest, context: Context) -> inference_pb2.ClassifyResponse:
        """One task, one or more images."""
        return await self._classify(request, deadline_of(context))

    async def ClassifyTasks(
        self, request: inference_pb2.ClassifyTasksRequest, context: Context
    ) -> inference_pb2.ClassifyTasksResponse:
        """One image, several tasks or all of them."""
        return await self._classify_tasks(request, deadline_of(context))

    async def ClassifyStream(
        self, request: inference_pb2.ClassifyStreamRequest, context: Context
    ) -> inference_pb2.ClassifyStreamResponse:
        """Either of them for one message of a stream; `server.front_door.edge` makes the stream of it."""
        deadline_seconds = deadline_of(context, converters.to_timeout_seconds(request))
        match request.WhichOneof("question"):
            case "classify":
                answer = await self._classify(request.classify, deadline_seconds)
                return inference_pb2.ClassifyStreamResponse(id=request.id, classify=answer)
            case "classify_tasks":
                answers = await self._classify_tasks(request.classify_tasks, deadline_seconds)
                return inference_pb2.ClassifyStreamResponse(id=request.id, classify_tasks=answers)
            case _:
                raise LimitError("question", 0, "one", "fill `classify` or `classify_tasks`")

    async def _classify(
        self, request: inference_pb2.ClassifyRequest, deadline_seconds: float | None
    ) -> inference_pb2.ClassifyResponse:
        images = converters.to_images(request.images)
        label = converters.to_label(request.label)
        answer = await self._classifier.classify(request.task, images, request.top_k, deadline_seconds, label)
        return converters.from_task_answer(answer, request.include_logits)

    async def _classify_tasks(
        self, request: inference_pb2.ClassifyTasksRequest, deadline_seconds: float | None
    ) -> inference_pb2.ClassifyTasksResponse:
        image = converters.to_image(request.image, "image")
        label = converters.to_label(request.label)
        answers = await self._classifier.classify_tasks(image, request.tasks, request.top_k, deadline_seconds, label)
        return converters.from_task_answers(answers, request.include_logits)

    async def ListTasks(self, request: inference_pb2.ListTasksRequest, context: Context) -> inference_pb2.ListTasksResponse:
        """Every task that is served."""
        generation, tasks = self._classifier.tasks()
        return inference_pb2.ListTasksResponse(generation=generation, tasks=map(converters.from_task, tasks))

    async def GetTask(self, request: inference_pb2.GetTaskRequest, context: Context) -> inference_pb2.GetTaskResponse:
        """One task."""
        generation, task = self._classifier.task(request.task)
        return inference_pb2.GetTaskResponse(generation=generation, task=converters.from_task(task))

    async def WatchTasks(
        self, request: inference_pb2.WatchTasksRequest, context: Context
    ) -> AsyncIterator[inference_pb2.WatchTasksResponse]:
        """Every task that is served, and what changes from generation to generation."""
        async for changes in self._classifier.watch_tasks():
            yield converters.from_changes(changes)


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Questions and orders of whoever operates the server.

    Args:
        reloader: what serves.
        engine: what computes.
        counts: what tasks were asked.
        draining: takes the server out of service.
        endpoints: says what the Tritons are like that compute; nothing where none do.
        memory: says what the segments take of memory; nothing where a Triton computes.
    """

    def __init__(
        self,
        reloader: Reloader,
        engine: Engine,
        counts: TaskCounts,
        draining: Draining,
        endpoints: Callable[[], Iterable[EndpointReport]] = tuple,
        memory: Callable[[], MemoryStatistics | None] = lambda: None,
    ) -> None:
        self._reloader = reloader
        self._engine = engine
        self._draining = draining
        self._counts = counts
        self._endpoints = endpoints
        self._memory = memory
        self._started = dt.datetime.now(dt.UTC)
        self._started_seconds = time.monotonic()

    async def Status(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.StatusResponse:
        """What is served, how the last reload went, and the engine's counters."""
        with self._reloader.lease() as generation:
            attempt, canary, held = self._reloader.last_attempt, self._reloader.canary, self._memory()
            # In a thread: a Triton may have to be asked, and ten thousand tasks take their time.
            segments, tasks = await asyncio.to_thread(self._counters, generation, request.details)
            return admin_pb2.StatusResponse(
                generation=generation.number,
                num_tasks=len(generation.tasks),
                started=converters.timestamp(self._started),
                uptime=converters.duration(time.monotonic() - self._started_seconds),
                last_reload=converters.from_attempt(attempt) if attempt else None,
                segments=segments,
                engine=self._engine.name,
                version=munet.__version__,
                endpoints=map(converters.from_endpoint, self._endpoints()),
                rolled_back_from=self._reloader.rolled_back_from,
                draining=self._draining.is_draining,
                num_in_flight=self._draining.num_in_flight,
                kept_generations=await self._reloader.kept_numbers(),
                canary=converters.from_canary(canary) if canary else None,
                tasks=tasks,
                memory=converters.from_memory(held) if held else None,
            )

    def _counters(
        self, generation: Generation, with_details: bool
    ) -> tuple[list[admin_pb2.SegmentCounters], list[admin_pb2.TaskCounters]]:
        segments = converters.from_segments(self._engine.statistics(), generation, with_details)
        return segments, [converters.from_task_counts(*item) for item in self._counts.items()] if with_details else []

    async def Reload(self, request: admin_pb2.ReloadRequest, context: Context) -> admin_pb2.ReloadResponse:
        """Serves the repository's current generation, if it does not do so already."""
        changed = await self._reloader.reload()
        with self._reloader.lease() as generation:
            return admin_pb2.ReloadResponse(generation=generation.number, changed=changed)

    async def Rollback(self, request: admin_pb2.RollbackRequest, context: Context) -> admin_pb2.RollbackResponse:
        """Serves a generation that is still kept, until CURRENT changes."""
        generation, previous = await self._reloader.roll_back(request.generation)
        return admin_pb2.RollbackResponse(generation=generation, previous=previous)

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        """Takes the server out of service and answers when nothing is in flight; or puts it back."""
        if request.cancel:
            self._draining.resume()
            return admin_pb2.DrainResponse(drained=False)
        return admin_pb2.DrainResponse(drained=await self._draining.drain())
