"""Between protos and the domain, both ways: the only place where the two meet."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf import duration_pb2, timestamp_pb2

from munet.v1 import admin_pb2, inference_pb2
from server.canary import Canary, Label
from server.classification import TaskAnswer, TaskAnswers, TaskChanges
from server.embedded.memory import MemoryStatistics
from server.engine import SegmentDistributions, SegmentStatistics
from server.errors import ImageRefusedError
from server.front_door.edge import Failure
from server.generation import Generation, Task
from server.histogram import Distribution
from server.preprocessing import EncodedImage, RawImage, SentImage
from server.reload import ReloadAttempt
from server.task_counts import TaskCount
from server.triton.fleet import EndpointReport, State

_LABELS: dict[int, Label] = {inference_pb2.LABEL_STABLE: Label.STABLE, inference_pb2.LABEL_CANARY: Label.CANARY}

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


def to_timeout_seconds(request: inference_pb2.ClassifyStreamRequest) -> float | None:
    """Returns how long the answer to a question of a stream is of use; none if it does not say."""
    return request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else None


def from_stream_failure(
    request: inference_pb2.ClassifyStreamRequest | None, failure: Failure
) -> inference_pb2.ClassifyStreamResponse:
    """Returns what answers a question of a stream that failed.

    Args:
        request: the question; none if the message was no such thing.
        failure: what is told of it.
    """
    seconds = failure.retry_after_seconds
    told = inference_pb2.Failure(
        code=failure.status.value[0], message=failure.words, retry_delay=None if seconds is None else duration(seconds)
    )
    return inference_pb2.ClassifyStreamResponse(id=request.id if request else "", failure=told)


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


def from_changes(changes: TaskChanges) -> inference_pb2.WatchTasksResponse:
    """Returns what is different when another generation serves."""
    return inference_pb2.WatchTasksResponse(
        generation=changes.generation,
        added=map(from_task, changes.added),
        changed=map(from_task, changes.changed),
        removed=changes.removed,
        num_unchanged=changes.num_unchanged,
    )


def to_label(label: int) -> Label:
    """Returns which generation a request wants to be answered by; any for what this server does not know."""
    return _LABELS.get(label, Label.ANY)


def from_canary(canary: Canary) -> admin_pb2.CanaryStatus:
    """Returns what is to be said of a canary."""
    return admin_pb2.CanaryStatus(
        generation=canary.pointer.number,
        percent=canary.pointer.percent,
        percent_of_task=canary.pointer.percent_of_task,
        refusal=canary.refusal,
        num_requests=canary.num_requests,
    )


def from_memory(held: MemoryStatistics) -> admin_pb2.SegmentMemory:
    """Returns what is to be said of the segments' memory."""
    return admin_pb2.SegmentMemory(
        limit_bytes=held.limit_bytes,
        resident_bytes=held.resident_bytes,
        num_segments=held.num_segments,
        num_resident=held.num_resident,
        loads=held.num_loads,
        failed_loads=held.num_failures,
        evictions=held.num_evictions,
    )


def from_segments(
    statistics: Iterable[SegmentStatistics], generation: Generation, with_distributions: bool = False
) -> list[admin_pb2.SegmentCounters]:
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
            distributions=_distributions(segment.distributions) if segment.distributions and with_distributions else None,
        )
        for segment in statistics
    ]


def from_task_counts(name: str, count: TaskCount) -> admin_pb2.TaskCounters:
    """Returns what a task was asked."""
    return admin_pb2.TaskCounters(
        name=name,
        answered=count.num_answered,
        images=count.num_images,
        failed=count.failed,
        latency=_distribution(count.latency.distribution()),
        queue=_distribution(count.queue.distribution()),
        compute=_distribution(count.compute.distribution()),
    )


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


def _distributions(of_segment: SegmentDistributions) -> admin_pb2.SegmentDistributions:
    return admin_pb2.SegmentDistributions(
        queue=_distribution(of_segment.queue_seconds),
        compute=_distribution(of_segment.compute_seconds),
        batch_rows=_distribution(of_segment.batch_rows),
        batch_requests=_distribution(of_segment.batch_questions),
        batch_tasks=_distribution(of_segment.batch_tasks),
    )


def _distribution(distribution: Distribution) -> admin_pb2.Distribution:
    return admin_pb2.Distribution(bounds=distribution.bounds, counts=distribution.counts, sum=distribution.sum)


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
