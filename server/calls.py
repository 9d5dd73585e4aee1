"""Every call a client can make, written once: its request, and how its answer is read. `server.client` sends them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf import message

from munet.preprocessing import to_rgb
from munet.v1 import admin_pb2, inference_pb2
from server.engine import SegmentDistributions
from server.histogram import Distribution
from server.results import (
    CanaryStatus,
    Classification,
    ClassifyResult,
    ClassifyTasksResult,
    EndpointStatus,
    LabelProbability,
    ReloadReport,
    ReloadResult,
    RollbackResult,
    SegmentCounters,
    SegmentMemory,
    ServerStatus,
    TaskChanges,
    TaskClassification,
    TaskCounters,
    TaskInfo,
    TaskList,
)

Image = bytes | pathlib.Path | npt.NDArray[np.uint8]
"""A whole image file's bytes, the path of one, or pixels: uint8 [height, width, 3] (RGB), [height, width, 1] or [height, width] (grey)."""

DEFAULT_TIMEOUT_SECONDS = 30.0

LabelName = Literal["", "stable", "canary"]
"""Which generation is to answer; empty leaves it to the server."""

_LABELS: dict[LabelName, inference_pb2.Label] = {
    "": inference_pb2.LABEL_UNSPECIFIED,
    "stable": inference_pb2.LABEL_STABLE,
    "canary": inference_pb2.LABEL_CANARY,
}

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class Call(Generic[_T]):
    """A call, ready to be sent by any transport.

    Attributes:
        method: its full gRPC name.
        request: what is sent.
        response: the message that is answered.
        read: turns the answer into what the caller gets.
        timeout_seconds: deadline.
        is_repeatable: whether sending it twice does no harm, so that it is sent again where that may help.
    """

    method: str
    request: message.Message
    response: type[message.Message]
    read: Callable[[Any], _T]
    timeout_seconds: float | None
    is_repeatable: bool = False


def classify(
    task: str,
    images: Image | Sequence[Image],
    *,
    top_k: int = 1,
    include_logits: bool = False,
    label: LabelName = "",
    timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
) -> Call[ClassifyResult]:
    """Asks one task about one or more images.

    Args:
        task: its name.
        images: one, or a sequence of them.
        top_k: how many labels to answer with; more than there are means all.
        include_logits: whether to answer with all logits too.
        label: which generation is to answer, `stable` or `canary`; empty leaves it to the server.
        timeout_seconds: deadline; none means to wait for ever.

    Raises:
        TaskNotFoundError: no such task is served; the message names similar ones.
        CallRefusedError: an image cannot be used, or there are too many.
        CallError: anything else, see `server.errors`.
        OSError: a path cannot be read.
        ValueError: pixels of another type or shape.
    """
    several: Sequence[Image] = [images] if isinstance(images, bytes | pathlib.Path | np.ndarray) else images
    request = inference_pb2.ClassifyRequest(
        task=task,
        images=[_to_image(image) for image in several],
        top_k=top_k,
        include_logits=include_logits,
        label=_LABELS[label],
    )
    response = inference_pb2.ClassifyResponse
    return Call("/munet.v1.InferenceService/Classify", request, response, _to_classify_result, timeout_seconds, True)


def classify_tasks(
    image: Image,
    tasks: Sequence[str] = (),
    *,
    top_k: int = 1,
    include_logits: bool = False,
    label: LabelName = "",
    timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
) -> Call[ClassifyTasksResult]:
    """Asks several tasks about one image; what their routes share is computed once.

    Args:
        image: which.
        tasks: their names; none means every task that is served.
        top_k: how many labels to answer with; more than there are means all.
        include_logits: whether to answer with all logits too.
        label: which generation is to answer, `stable` or `canary`; empty leaves it to the server.
        timeout_seconds: deadline; none means to wait for ever.

    Raises:
        TaskNotFoundError: no such task is served; the message names similar ones.
        CallRefusedError: the image cannot be used.
        CallError: anything else, see `server.errors`.
        OSError: a path cannot be read.
        ValueError: pixels of another type or shape.
    """
    if isinstance(tasks, str):
        raise TypeError(f"found tasks {tasks!r}, expected a sequence of names; write [{tasks!r}]")
    request = inference_pb2.ClassifyTasksRequest(
        image=_to_image(image), tasks=tasks, top_k=top_k, include_logits=include_logits, label=_LABELS[label]
    )
    response = inference_pb2.ClassifyTasksResponse
    return Call("/munet.v1.InferenceService/ClassifyTasks", request, response, _to_classify_tasks_result, timeout_seconds, True)


def list_tasks(*, timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS) -> Call[TaskList]:
    """Asks for every task that is served.

    Args:
        timeout_seconds: deadline; none means to wait for ever.

    Raises:
        CallError: see `server.errors`.
    """
    request, response = inference_pb2.ListTasksRequest(), inference_pb2.ListTasksResponse
    return Call("/munet.v1.InferenceService/ListTasks", request, response, _to_task_list, timeout_seconds, True)


def get_task(task: str, *, timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS) -> Call[TaskInfo]:
    """Asks for what is told of one task.

    Args:
        task: its name.
        timeout_seconds: deadline; none means to wait for ever.

    Raises:
        TaskNotFoundError: no such task is served; the message names similar ones.
        CallError: anything else, see `server.errors`.
    """
    request, response = inference_pb2.GetTaskRequest(task=task), inference_pb2.GetTaskResponse
    read = _read_task
    return Call("/munet.v1.InferenceService/GetTask", request, response, read, timeout_seconds, True)


def watch_tasks(*, timeout_seconds: float | None = None) -> Call[TaskChanges]:
    """Asks for every task that is served, and what changes whenever another generation serves; see `server.bulk.watch_tasks`.

    Args:
        timeout_seconds: when to end; none means never.
    """
    request, response = inference_pb2.WatchTasksRequest(), inference_pb2.WatchTasksResponse
    return Call("/munet.v1.InferenceService/WatchTasks", request, response, _to_task_changes, timeout_seconds)


def status(*, details: bool = False, timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS) -> Call[ServerStatus]:
    """Asks what is served, how the last reload went and what the engine counted.

    Args:
        details: whether to ask too what tasks were asked, and for distributions.
        timeout_seconds: deadline; none means to wait for ever.

    Raises:
        CallError: see `server.errors`.
    """
    request, response = admin_pb2.StatusRequest(details=details), admin_pb2.StatusResponse
    return Call("/munet.v1.AdminService/Status", request, response, _to_status, timeout_seconds)


def reload(*, timeout_seconds: float | None = 600.0) -> Call[ReloadResult]:
    """Has the server serve its repository's current generation.

    Args:
        timeout_seconds: deadline; none means to wait for ever.

    Raises:
        CallRefusedError: the generation was refused; the message says why. The one before goes on serving.
        CallError: anything else, see `server.errors`.
    """
    request, response = admin_pb2.ReloadRequest(), admin_pb2.ReloadResponse
    read = _to_reload_result
    return Call("/munet.v1.AdminService/Reload", request, response, read, timeout_seconds)


def rollback(generation: int = 0, *, timeout_seconds: float | None = 600.0) -> Call[RollbackResult]:
    """Has the server answer from a generation that is still kept, until its repository's CURRENT changes or somebody reloads.

    Args:
        generation: its number; 0 means the one that the serving generation was published on top of.
        timeout_seconds: deadline; none means to wait for ever.

    Raises:
        CallRefusedError: it is not kept or was refused; the message says why. The one that serves goes on.
        CallError: anything else, see `server.errors`.
    """
    request, response = admin_pb2.RollbackRequest(generation=generation), admin_pb2.RollbackResponse
    return Call("/munet.v1.AdminService/Rollback", request, response, _to_rollback_result, timeout_seconds)


def drain(*, cancel: bool = False, timeout_seconds: float | None = 600.0) -> Call[bool]:
    """Takes the server out of service, and is answered when nothing is in flight any more. It stays so if the call ends before.

    Args:
        cancel: whether to put it back into service instead.
        timeout_seconds: deadline; none means to wait for ever.

    Returns:
        Whether nothing is in flight; False if the drain was cancelled.

    Raises:
        CallTimeoutError: something still is; the server stays out of service.
        CallError: anything else, see `server.errors`.
    """
    request, response = admin_pb2.DrainRequest(cancel=cancel), admin_pb2.DrainResponse
    return Call("/munet.v1.AdminService/Drain", request, response, _to_drained, timeout_seconds)


def _to_image(image: Image) -> inference_pb2.Image:
    if isinstance(image, bytes):
        return inference_pb2.Image(encoded=image)
    if isinstance(image, pathlib.Path):
        return inference_pb2.Image(encoded=image.read_bytes())
    if not isinstance(image, np.ndarray):
        raise TypeError(f"found an image of type {type(image).__name__}, expected bytes, pathlib.Path or a numpy array")
    # Refuses other types and shapes in the words that the server would use.
    height, width, _ = to_rgb(image).shape
    channels = image.shape[2] if image.ndim == 3 else 1
    raw = inference_pb2.RawImage(height=height, width=width, channels=channels, data=np.ascontiguousarray(image).tobytes())
    return inference_pb2.Image(raw=raw)


def _to_classification(answer: inference_pb2.Classification) -> Classification:
    labels = tuple(LabelProbability(label.index, label.label, label.probability) for label in answer.labels)
    return Classification(labels, np.array(answer.logits, dtype=np.float32) if answer.logits else None)


def _to_classify_result(answer: inference_pb2.ClassifyResponse) -> ClassifyResult:
    classifications = tuple(map(_to_classification, answer.classifications))
    return ClassifyResult(answer.task, answer.path_id, answer.generation, classifications)


def _to_classify_tasks_result(answer: inference_pb2.ClassifyTasksResponse) -> ClassifyTasksResult:
    tasks = (TaskClassification(task.task, task.path_id, _to_classification(task.classification)) for task in answer.tasks)
    return ClassifyTasksResult(answer.generation, tuple(tasks))


def _to_task(task: inference_pb2.TaskInfo) -> TaskInfo:
    return TaskInfo(
        name=task.name,
        path_id=task.path_id,
        labels=tuple(task.labels),
        image_size=task.image_size,
        quality=task.quality,
        test_accuracy=task.test_accuracy if task.HasField("test_accuracy") else None,
        route=tuple(task.route),
    )


def _read_task(answer: inference_pb2.GetTaskResponse) -> TaskInfo:
    return _to_task(answer.task)


def _to_task_list(answer: inference_pb2.ListTasksResponse) -> TaskList:
    return TaskList(answer.generation, tuple(map(_to_task, answer.tasks)))


def _to_task_changes(answer: inference_pb2.WatchTasksResponse) -> TaskChanges:
    return TaskChanges(
        generation=answer.generation,
        added=tuple(map(_to_task, answer.added)),
        changed=tuple(map(_to_task, answer.changed)),
        removed=tuple(answer.removed),
        num_unchanged=answer.num_unchanged,
    )


def _to_status(answer: admin_pb2.StatusResponse) -> ServerStatus:
    return ServerStatus(
        generation=answer.generation,
        num_tasks=answer.num_tasks,
        started=answer.started.ToDatetime(dt.UTC),
        uptime_seconds=answer.uptime.ToNanoseconds() / 1e9,
        last_reload=_to_reload_report(answer.last_reload) if answer.HasField("last_reload") else None,
        segments=tuple(map(_to_counters, answer.segments)),
        engine=answer.engine,
        version=answer.version,
        endpoints=tuple(map(_to_endpoint, answer.endpoints)),
        rolled_back_from=answer.rolled_back_from if answer.HasField("rolled_back_from") else None,
        draining=answer.draining,
        num_in_flight=answer.num_in_flight,
        kept_generations=tuple(answer.kept_generations),
        canary=_to_canary(answer.canary) if answer.HasField("canary") else None,
        tasks=tuple(map(_to_task_counters, answer.tasks)),
        memory=_to_memory(answer.memory) if answer.HasField("memory") else None,
    )


def _to_memory(memory: admin_pb2.SegmentMemory) -> SegmentMemory:
    return SegmentMemory(
        limit_bytes=memory.limit_bytes if memory.HasField("limit_bytes") else None,
        resident_bytes=memory.resident_bytes,
        num_segments=memory.num_segments,
        num_resident=memory.num_resident,
        loads=memory.loads,
        failed_loads=memory.failed_loads,
        evictions=memory.evictions,
    )


def _to_task_counters(task: admin_pb2.TaskCounters) -> TaskCounters:
    return TaskCounters(
        name=task.name,
        answered=task.answered,
        images=task.images,
        failed=dict(sorted(task.failed.items())),
        latency=_to_distribution(task.latency),
        queue=_to_distribution(task.queue),
        compute=_to_distribution(task.compute),
    )


def _to_distribution(distribution: admin_pb2.Distribution) -> Distribution:
    return Distribution(tuple(distribution.bounds), tuple(distribution.counts), distribution.sum)


def _to_canary(canary: admin_pb2.CanaryStatus) -> CanaryStatus:
    return CanaryStatus(canary.generation, canary.percent, dict(canary.percent_of_task), canary.refusal, canary.num_requests)


def _to_endpoint(endpoint: admin_pb2.Endpoint) -> EndpointStatus:
    return EndpointStatus(
        address=endpoint.address,
        state=admin_pb2.EndpointState.Name(endpoint.state).removeprefix("ENDPOINT_STATE_").lower(),
        since=endpoint.since.ToDatetime(dt.UTC),
        reason=endpoint.reason,
        generations=tuple(endpoint.generations),
        rows_in_flight=endpoint.rows_in_flight,
        version=endpoint.version,
    )


def _to_reload_report(attempt: admin_pb2.ReloadAttempt) -> ReloadReport:
    return ReloadReport(
        generation=attempt.generation,
        finished=attempt.finished.ToDatetime(dt.UTC),
        duration_seconds=attempt.duration.ToNanoseconds() / 1e9,
        error=attempt.error,
    )


def _to_counters(segment: admin_pb2.SegmentCounters) -> SegmentCounters:
    return SegmentCounters(
        name=segment.name,
        rows_requested=segment.rows_requested,
        rows_computed=segment.rows_computed,
        rows_saved=segment.rows_saved,
        executions=segment.executions,
        tasks=tuple(segment.tasks),
        num_parameters=segment.num_parameters,
        distributions=_to_distributions(segment.distributions) if segment.HasField("distributions") else None,
    )


def _to_distributions(of_segment: admin_pb2.SegmentDistributions) -> SegmentDistributions:
    return SegmentDistributions(
        queue_seconds=_to_distribution(of_segment.queue),
        compute_seconds=_to_distribution(of_segment.compute),
        batch_rows=_to_distribution(of_segment.batch_rows),
        batch_questions=_to_distribution(of_segment.batch_requests),
        batch_tasks=_to_distribution(of_segment.batch_tasks),
    )


def _to_reload_result(answer: admin_pb2.ReloadResponse) -> ReloadResult:
    return ReloadResult(answer.generation, answer.changed)


def _to_rollback_result(answer: admin_pb2.RollbackResponse) -> RollbackResult:
    return RollbackResult(answer.generation, answer.previous)


def _to_drained(answer: admin_pb2.DrainResponse) -> bool:
    return answer.drained
