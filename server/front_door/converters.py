"""Between protos and the domain, both ways: the only place where the two meet."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf import duration_pb2, timestamp_pb2

from munet.v1 import admin_pb2, inference_pb2
from server.classification import TaskAnswer, TaskAnswers
from server.engine import SegmentStatistics
from server.errors import ImageRefusedError
from server.generation import Generation, Task
from server.preprocessing import EncodedImage, RawImage, SentImage
from server.reload import ReloadAttempt
from server.triton.fleet import EndpointReport, State

_ENDPOINT_STATES = {
    State.JOINING: admin_pb2.ENDPOINT_STATE_JOINING,
    State.SERVING: admin_pb2.ENDPOINT_STATE_SERVING,
    State.DOWN: admin_pb2.ENDPOINT_STATE_DOWN,
}


def to_images(images: Sequence[inference_pb2.Image]) -> list[SentImage]:
    """Returns a request's images.

    Raises:
        ImageRefusedError: one has no content.
    """
    return [to_image(image, f"images[{index}]") for index, image in enumerate(images)]


def to_image(image: inference_pb2.Image, where: str) -> SentImage:
    """Returns an image.

    Args:
        image: as sent.
        where: what the request calls it.

    Raises:
        ImageRefusedError: it has no content.
    """
    match image.WhichOneof("content"):
        case "encoded":
            return EncodedImage(image.encoded)
        case "raw":
            return RawImage(image.raw.height, image.raw.width, image.raw.channels, image.raw.data)
        case _:
            raise ImageRefusedError(where, "found no content, expected `encoded` or `raw`")


def from_task_answer(answer: TaskAnswer, include_logits: bool) -> inference_pb2.ClassifyResponse:
    """Returns the answer of one task about its images."""
    return inference_pb2.ClassifyResponse(
        task=answer.task.name,
        path_id=answer.task.path_id,
        generation=answer.generation,
        classifications=[_classification(answer, row, include_logits) for row in range(len(answer.logits))],
    )


def from_task_answers(answers: TaskAnswers, include_logits: bool) -> inference_pb2.ClassifyTasksResponse:
    """Returns the answers of several tasks about one image."""
    return inference_pb2.ClassifyTasksResponse(
        generation=answers.generation,
        tasks=[
            inference_pb2.TaskClassification(
                task=answer.task.name, path_id=answer.task.path_id, classification=_classification(answer, 0, include_logits)
            )
            for answer in answers.answers
        ],
    )


def from_task(task: Task) -> inference_pb2.TaskInfo:
    """Returns what is told of a task."""
    return inference_pb2.TaskInfo(
        name=task.name,
        path_id=task.path_id,
        labels=task.labels,
        image_size=task.image_size,
        quality=task.quality,
        test_accuracy=task.test_accuracy,
        route=task.route,
    )


def from_segments(statistics: Iterable[SegmentStatistics], generation: Generation) -> list[admin_pb2.SegmentCounters]:
    """Returns the engine's counters, with what the serving generation knows of each segment."""
    tasks = _tasks_by_segment(generation)
    return [
        admin_pb2.SegmentCounters(
            name=segment.name,
            rows_requested=segment.rows_requested,
            rows_computed=segment.rows_computed,
            rows_saved=segment.rows_saved,
            executions=segment.executions,
            tasks=tasks.get(segment.name, ()),
            num_parameters=generation.segments[segment.name].num_parameters if segment.name in generation.segments else 0,
        )
        for segment in statistics
    ]


def from_attempt(attempt: ReloadAttempt) -> admin_pb2.ReloadAttempt:
    """Returns how a reload went."""
    return admin_pb2.ReloadAttempt(
        generation=attempt.number,
        finished=timestamp(attempt.finished),
        duration=duration(attempt.duration_seconds),
        error=attempt.error,
    )


def from_endpoint(report: EndpointReport) -> admin_pb2.Endpoint:
    """Returns what is to be said of a Triton."""
    return admin_pb2.Endpoint(
        address=report.address,
        state=_ENDPOINT_STATES[report.state],
        since=timestamp(report.since),
        reason=report.reason,
        generations=report.generations,
        rows_in_flight=report.rows_in_flight,
        version=report.version,
    )


def timestamp(moment: dt.datetime) -> timestamp_pb2.Timestamp:
    """Returns a moment, which must know its time zone."""
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(moment)
    return message


def duration(seconds: float) -> duration_pb2.Duration:
    """Returns a length of time."""
    message = duration_pb2.Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def _classification(answer: TaskAnswer, row: int, include_logits: bool) -> inference_pb2.Classification:
    labels = [
        inference_pb2.LabelProbability(index=index, label=answer.task.labels[index], probability=answer.probabilities[row, index])
        for index in answer.order[row].tolist()
    ]
    return inference_pb2.Classification(labels=labels, logits=answer.logits[row].tolist() if include_logits else ())


def _tasks_by_segment(generation: Generation) -> Mapping[str, list[str]]:
    tasks: dict[str, list[str]] = {}
    for task in generation.tasks.values():
        for segment in dict.fromkeys(task.route):
            tasks.setdefault(segment, []).append(task.name)
    return tasks
