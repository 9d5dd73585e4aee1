"""What a client gets: plain immutable values, free of protos."""

from __future__ import annotations

import dataclasses
import datetime as dt
import pathlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from server.engine import SegmentDistributions
from server.errors import CallError
from server.histogram import Distribution


@dataclasses.dataclass(frozen=True, slots=True)
class LabelProbability:
    """A class and how probable it is.

    Attributes:
        index: among the task's labels.
        label: its name.
        probability: 0 to 1, softmax over all of the task's labels.
    """

    index: int
    label: str
    probability: float


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """What a task says of an image.

    Attributes:
        labels: the most probable classes, most probable first.
        logits: [classes] float32 in the order of the task's labels, if asked for.
    """

    labels: tuple[LabelProbability, ...]
    logits: npt.NDArray[np.float32] | None

    @property
    def top(self) -> LabelProbability:
        """The most probable class."""
        return self.labels[0]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ClassifyResult:
    """What one task says of some images.

    Attributes:
        task: who answered.
        path_id: the path that answered for it.
        generation: number of the generation that it belongs to.
        classifications: one for each image, in their order.
    """

    task: str
    path_id: str
    generation: int
    classifications: tuple[Classification, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TaskClassification:
    """What one of several tasks says of an image.

    Attributes:
        task: who answered.
        path_id: the path that answered for it.
        classification: the answer.
    """

    task: str
    path_id: str
    classification: Classification


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ClassifyTasksResult:
    """What several tasks say of one image.

    Attributes:
        generation: number of the generation that all of them belong to.
        tasks: in the order asked for; in ascending order of name if none were named.
    """

    generation: int
    tasks: tuple[TaskClassification, ...]

    def __getitem__(self, task: str) -> Classification:
        for answer in self.tasks:
            if answer.task == task:
                return answer.classification
        raise KeyError(task)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StreamAnswer:
    """What came of a question of a stream.

    Attributes:
        id: the question's.
        result: a `ClassifyResult` if the question named one task, a `ClassifyTasksResult` otherwise; none if there is an error.
        error: why there is no answer; none if there is one.
    """

    id: str
    result: ClassifyResult | ClassifyTasksResult | None
    error: CallError | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FileAnswer:
    """What came of one of many files.

    Attributes:
        file: which.
        result: what the tasks say of it; none if there is an error.
        error: why there is no answer, an `OSError` if the file could not be read; none if there is one.
    """

    file: pathlib.Path
    result: ClassifyTasksResult | None
    error: CallError | OSError | None


@dataclasses.dataclass(frozen=True, slots=True)
class TaskInfo:
    """What a server tells of a task.

    Attributes:
        name: its name.
        path_id: the path that answers for it.
        labels: class names in the order of the logits.
        image_size: height and width that images are resized to, in pixels.
        quality: validation accuracy, 0 to 1.
        test_accuracy: test accuracy, 0 to 1; none if the task has no test split.
        route: names of the segments that its images run through.
    """

    name: str
    path_id: str
    labels: tuple[str, ...]
    image_size: int
    quality: float
    test_accuracy: float | None
    route: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class TaskList:
    """Every task that is served.

    Attributes:
        generation: number of the generation that they belong to.
        tasks: in ascending order of name.
    """

    generation: int
    tasks: tuple[TaskInfo, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class TaskChanges:
    """What is served otherwise than a watcher was told last; at first everything.

    Attributes:
        generation: number of the generation that serves.
        added: tasks that were not there, in ascending order of name, as are the others.
        changed: tasks of which something is told otherwise.
        removed: names of tasks that are there no longer.
        num_unchanged: all others.
    """

    generation: int
    added: tuple[TaskInfo, ...]
    changed: tuple[TaskInfo, ...]
    removed: tuple[str, ...]
    num_unchanged: int


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentCounters:
    """What a segment ran since it was loaded.

    Attributes:
        name: the segment's.
        rows_requested: rows that tasks asked for: what would have run without sharing.
        rows_computed: rows that ran.
        rows_saved: the difference: computed once for several tasks of one request.
        executions: batches that ran.
        tasks: tasks whose route uses it now.
        num_parameters: weights in it.
        distributions: what its batches were like, if asked for and known.
    """

    name: str
    rows_requested: int
    rows_computed: int
    rows_saved: int
    executions: int
    tasks: tuple[str, ...]
    num_parameters: int
    distributions: SegmentDistributions | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TaskCounters:
    """What a task was asked since the server started, or since the task was last served anew.

    Attributes:
        name: the task's.
        answered: requests answered.
        images: images in them.
        failed: requests that failed after the task was found, by reason.
        latency: seconds that each answered request took.
        queue: seconds that it waited on its route of segments; empty where a Triton computes.
        compute: seconds that it was computed there.
    """

    name: str
    answered: int
    images: int
    failed: Mapping[str, int]
    latency: Distribution
    queue: Distribution
    compute: Distribution


@dataclasses.dataclass(frozen=True, slots=True)
class ReloadReport:
    """How the last reload went.

    Attributes:
        generation: the number it tried.
        finished: when, in UTC.
        duration_seconds: how long it took.
        error: why it was refused; empty if it serves.
    """

    generation: int
    finished: dt.datetime
    duration_seconds: float
    error: str


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointStatus:
    """What a server says of a Triton.

    Attributes:
        address: HOST:PORT of its gRPC.
        state: `joining`, `serving` or `down`.
        since: since when, in UTC.
        reason: what is wrong with it, or with some of its models; empty if nothing is.
        generations: numbers of the generations that it answers, ascending.
        rows_in_flight: images that it was asked about and has not answered.
        version: Triton's own; empty if it never answered.
    """

    address: str
    state: str
    since: dt.datetime
    reason: str
    generations: tuple[int, ...]
    rows_in_flight: int
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class CanaryStatus:
    """What a server says of the generation that it tries beside the one that serves.

    Attributes:
        generation: its number; 0 if not even that could be read.
        percent: so many of a hundred requests about a task go to it.
        percent_of_task: where it is another part, by the task's name.
        refusal: why none goes to it; empty if it answers.
        num_requests: requests that it was given since it was loaded or its part was changed.
    """

    generation: int
    percent: float
    percent_of_task: Mapping[str, float]
    refusal: str
    num_requests: int


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentMemory:
    """What segments take of a server's memory, and what came and went there since it started.

    Attributes:
        limit_bytes: what they may take; none without a limit.
        resident_bytes: what those are counted to take that are in memory or on their way there.
        num_segments: how many are answered with, in memory or not.
        num_resident: how many are in memory.
        loads: of segments that a question needed.
        failed_loads: loads that failed, beside those.
        evictions: segments that went to make room.
    """

    limit_bytes: int | None
    resident_bytes: int
    num_segments: int
    num_resident: int
    loads: int
    failed_loads: int
    evictions: int


@dataclasses.dataclass(frozen=True, slots=True)
class ServerStatus:
    """What a server says of itself.

    Attributes:
        generation: number of the generation that answers.
        num_tasks: how many tasks it has.
        started: when the server started, in UTC.
        uptime_seconds: since then.
        last_reload: none before the first.
        segments: in ascending order of name.
        engine: what computes.
        version: of the server.
        endpoints: the Tritons that compute; none if the server itself does.
        rolled_back_from: number that CURRENT had when somebody went back; none if it is followed.
        draining: whether the server is out of service, or about to be.
        num_in_flight: questions and streams that are open.
        kept_generations: numbers of those that the repository holds, ascending.
        canary: what is tried beside what serves; none if nothing.
        tasks: those that were asked, in ascending order of name, if asked for.
        memory: the segments'; none where a Triton computes.
    """

    generation: int
    num_tasks: int
    started: dt.datetime
    uptime_seconds: float
    last_reload: ReloadReport | None
    segments: tuple[SegmentCounters, ...]
    engine: str
    version: str
    endpoints: tuple[EndpointStatus, ...] = ()
    rolled_back_from: int | None = None
    draining: bool = False
    num_in_flight: int = 0
    kept_generations: tuple[int, ...] = ()
    canary: CanaryStatus | None = None
    tasks: tuple[TaskCounters, ...] = ()
    memory: SegmentMemory | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ReloadResult:
    """What a reload came to.

    Attributes:
        generation: number of the generation that answers now.
        changed: whether it is another one than before.
    """

    generation: int
    changed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class RollbackResult:
    """What a rollback came to.

    Attributes:
        generation: number of the generation that answers now.
        previous: of the one that answered before.
    """

    generation: int
    previous: int
