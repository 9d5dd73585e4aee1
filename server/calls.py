"""Every call a client can make, written once: its request, and how its answer is read. `server.client` sends them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf import message

from munet.preprocessing import to_rgb
from munet.v1 import admin_pb2, inference_pb2
from server.results import (
    Classification,
    ClassifyResult,
    ClassifyTasksResult,
    EndpointStatus,
    LabelProbability,
    ReloadReport,
    ReloadResult,
    SegmentCounters,
    ServerStatus,
    TaskClassification,
    TaskInfo,
    TaskList,
)

Image = bytes | pathlib.Path | npt.NDArray[np.uint8]
"""A whole image file's bytes, the path of one, or pixels: uint8 [height, width, 3] (RGB), [height, width, 1] or [height, width] (grey)."""

DEFAULT_TIMEOUT_SECONDS = 30.0

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
    """

    method: str
    request: message.Message
    response: type[message.Message]
    read: Callable[[Any], _T]
    timeout_seconds: float | None


def classify(
    task: str,
    images: Image | Sequence[Image],
    *,
    top_k: int = 1,
    include_logits: bool = False,
    timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
) -> Call[ClassifyResult]:
    """Asks one task about one or more images.

    Args:
        task: its name.
        images: one, or a sequence of them.
        top_k: how many labels to answer with; more than there are means all.
        include_logits: whether to answer with all logits too.
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
        task=task, images=[_to_image(image) for image in several], top_k=top_k, include_logits=include_logits
    )
    return Call(
        "/munet.v1.InferenceService/Classify", request, inference_pb2.ClassifyResponse, _to_classify_result, timeout_seconds
    )


def classify_tasks(
    image: Image,
    tasks: Sequence[str] = (),
    *,
    top_k: int = 1,
    include_logits: bool = False,
    timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
) -> Call[ClassifyTasksResult]:
    """Asks several tasks about one image; what their routes share is computed once.

    Args:
        image: which.
        tasks: their names; none means every task that is served.
        top_k: how many labels to answer with; more than there are means all.
        include_logits: whether to answer with all logits too.
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
    request = inference_pb2.ClassifyTasksRequest(image=_to_image(image), tasks=tasks, top_k=top_k, include_logits=include_logits)
    response = inference_pb2.ClassifyTasksResponse
    return Call("/munet.v1.InferenceService/ClassifyTasks", request, response, _to_classify_tasks_result, timeout_seconds)


def list_tasks(*, timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS) -> Call[TaskList]:
    """Asks for every task that is served.

    Args:
        timeout_seconds: deadline; none means to wait for ever.

    Raises:
        CallError: see `server.errors`.
    """
    request, response = inference_pb2.ListTasksRequest(), inference_pb2.ListTasksResponse
    return Call("/munet.v1.InferenceService/ListTasks", request, response, _to_task_list, timeout_seconds)


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
    return Call("/munet.v1.InferenceService/GetTask", request, response, lambda answer: _to_task(answer.task), timeout_seconds)


def status(*, timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS) -> Call[ServerStatus]:
    """Asks what is served, how the last reload went and what the engine counted.

    Args:
        timeout_seconds: deadline; none means to wait for ever.

    Raises:
        CallError: see `server.errors`.
    """
    request, response = admin_pb2.StatusRequest(), admin_pb2.StatusResponse
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


def _to_task_list(answer: inference_pb2.ListTasksResponse) -> TaskList:
    return TaskList(answer.generation, tuple(map(_to_task, answer.tasks)))


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
    )


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
    )


def _to_reload_result(answer: admin_pb2.ReloadResponse) -> ReloadResult:
    return ReloadResult(answer.generation, answer.changed)
