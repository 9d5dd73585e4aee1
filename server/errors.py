"""Every error of the online half, as one tree.

    ServerError                     something a person or a caller can understand; never a bug
    ├── SettingsError               a setting that cannot be
    ├── RepositoryError             a model repository that cannot be served
    │   ├── NoGenerationError       nothing was published there
    │   ├── NewerFormatError        written by a newer publisher than this server knows
    │   ├── RollbackError           no going back there
    │   └── GenerationRefusedError  a generation with faults; carries every finding
    ├── EngineError                 the engine cannot do what it was asked
    │   ├── DeviceError             the device cannot be used
    │   ├── SegmentLoadError        a segment cannot be loaded
    │   ├── SegmentRunError         a segment failed on some rows
    │   ├── NotLoadedError          the generation is not loaded
    │   ├── EngineClosedError       the engine is closing or closed
    │   └── EndpointError           a Triton elsewhere did not do what it was asked
    │       ├── EndpointGoneError       it does not answer
    │       │   └── EndpointSilentError     it took the call and says nothing
    │       ├── ModelMissingError       it does not hold a model
    │       ├── ModelDeadError          the process that runs a model there is dead
    │       ├── ModelSilentError        a model there says nothing, while others answer
    │       └── ModelFailedError        it says that a model cannot be loaded or failed
    ├── TritonError                 a Triton of ours that cannot run
    │   ├── TritonEnvironmentError  the environment that it runs in is missing or cannot be made
    │   ├── TritonProcessError      tritonserver did not start, or ended
    │   └── SharedMemoryError       too little shared memory
    ├── RequestError                a request that cannot be answered as it stands
    │   ├── UnknownTaskError        no such task is served
    │   ├── UnknownVersionError     a task is served, but not of that generation
    │   ├── NoCanaryError           the canary is to answer, and there is none
    │   ├── ImageRefusedError       an image that cannot be used
    │   ├── InferenceRefusedError   an inference that is not put as the Open Inference Protocol and the task want it
    │   ├── UnsupportedError        what a protocol has and this server has not
    │   ├── LimitError              more of something than this server accepts
    │   └── MalformedRequestError   bytes that are no request
    ├── AccessError                 a call that its caller may not make
    │   ├── UnauthenticatedError    no token that is known
    │   └── ForbiddenError          a token whose role is too small
    ├── DeadlineError               the caller's deadline passed before the answer was there, or would have
    ├── OverloadedError             too much waits
    ├── UnavailableError            the server cannot answer now
    │   ├── SegmentUnavailableError  a segment is not in memory and cannot be loaded now
    │   └── NoEndpointError         no Triton computes these tasks now
    └── CallError                   what a client learns when its call fails
        ├── CallRefusedError        the server refused the request (its fault lies in the request)
        │   ├── TaskNotFoundError   no such task is served
        │   └── CallDeniedError     the caller may not make it
        ├── CallTimeoutError        the call's deadline passed
        ├── ClientClosedError       the client was closed before the call was answered
        ├── ServerBusyError         too much waits there; try again later
        ├── ServerUnreachableError  no server answers there, or it cannot answer now
        └── ServerFailedError       the server failed; its message carries an id that its log has too

Messages say what was found, what was expected and what to do. Nothing here knows of gRPC: `server.front_door.status` holds the one
table from these classes to gRPC's statuses, `server.client` the one back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence


class ServerError(Exception):
    """Something a person or a caller can understand. The message says what was found, what was expected and what to do."""


def reason_of(error: BaseException) -> str:
    """Returns a word for an error as metrics and logs have it: its class's name in small letters, such as `image_refused`.

    `cancelled` if the caller left, `bug` for whatever is not in the tree.
    """
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return _word(type(error).__name__) if isinstance(error, ServerError) else "bug"


@functools.cache
def _word(class_name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", class_name.removesuffix("Error")).lower()


class SettingsError(ServerError):
    """A setting that cannot be.

    Attributes:
        setting: its name.
        found: what was given.
        expected: what may be given.
    """

    def __init__(self, setting: str, found: object, expected: str) -> None:
        self.setting = setting
        self.found = found
        self.expected = expected
        super().__init__(f"{setting}: found {found!r}, expected {expected}")


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One fault of a model repository.

    Attributes:
        where: the file, and what in it.
        found: what is there.
        expected: what should be there.
        advice: what to do; empty if publishing again is all there is to do.
    """

    where: str
    found: str
    expected: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}, expected {self.expected}" + (f"; {self.advice}" if self.advice else "")


class RepositoryError(ServerError):
    """A model repository that cannot be served."""


class NoGenerationError(RepositoryError):
    """Nothing was published in the repository.

    Attributes:
        repository: its folder.
    """

    def __init__(self, repository: pathlib.Path) -> None:
        self.repository = repository
        found = "a folder without the file CURRENT" if repository.is_dir() else "no folder"
        super().__init__(
            f"model repository {str(repository)!r}: found {found}, expected a published generation; "
            f"publish one with `munet-evolve export --system DIR --repository {repository}`"
        )


class NewerFormatError(RepositoryError):
    """A generation in a format newer than this server knows.

    Attributes:
        path: the generation's file.
        found: its format.
        known: the newest format this server reads.
    """

    def __init__(self, path: str, found: int, known: int) -> None:
        self.path = path
        self.found = found
        self.known = known
        super().__init__(f"{path}: found format {found!r}, expected at most {known}; update this server before publishing for it")


class GenerationRefusedError(RepositoryError):
    """A generation that is not served because of its faults.

    Attributes:
        number: the generation's number; 0 if not even that could be read.
        findings: every fault, in the order it was found; at least one.
    """

    NUM_SHOWN = 5
    NUM_CHARACTERS = 500

    def __init__(self, number: int, findings: Sequence[Finding]) -> None:
        self.number = number
        self.findings = tuple(findings)
        shown = "; ".join(str(finding)[: self.NUM_CHARACTERS] for finding in self.findings[: self.NUM_SHOWN])
        rest = len(self.findings) - self.NUM_SHOWN
        more = f"; and {rest} more, see `munet-server check`" if rest > 0 else ""
        super().__init__(f"generation {number} is refused: {shown}{more}")


class RollbackError(RepositoryError):
    """There is no going back there.

    Attributes:
        number: of the generation that was to serve; 0 if none was named.
        kept: numbers of the generations that are kept.
        found: what there is instead; empty if the generation is not kept.
    """

    def __init__(self, number: int, kept: Sequence[int], found: str = "") -> None:
        self.number = number
        self.kept = tuple(kept)
        self.found = found or (f"{number!r}, which is not kept" if number else "nothing before the generation that serves")
        numbers = ", ".join(map(str, self.kept)) or "none"
        super().__init__(f"generation: found {self.found}, expected one of those that are kept: {numbers}; name one of them")


class EngineError(ServerError):
    """The engine cannot do what it was asked."""


class DeviceError(EngineError):
    """The engine cannot use the device it was told to compute on.

    Attributes:
        device: its name.
        found: what there is instead.
        provider: what ONNX Runtime calls the device.
    """

    def __init__(self, device: str, found: str, provider: str) -> None:
        self.device = device
        self.found = found
        self.provider = provider
        super().__init__(
            f"device {device!r}: found {found}, expected {provider}; install 'munet[server,cuda]' on a machine whose driver "
            "`nvidia-smi` shows to be working, or serve with --device cpu"
        )


class SegmentLoadError(EngineError):
    """A segment cannot be loaded.

    Attributes:
        segment: its name.
        reason: what the engine found.
        expected: what it needs.
    """

    def __init__(self, segment: str, reason: str, expected: str = "an ONNX model that ONNX Runtime loads") -> None:
        self.segment = segment
        self.reason = reason
        self.expected = expected
        super().__init__(f"segment {segment!r} cannot be loaded: found {reason}, expected {expected}; export it again")

    @property
    def finding(self) -> Finding:
        """The same as a fault of a generation."""
        return Finding(f"segment {self.segment!r}", self.reason, self.expected, "export it again")


class SegmentRunError(EngineError):
    """A segment failed on some rows.

    Attributes:
        segment: its name.
        reason: what the engine reported.
    """

    def __init__(self, segment: str, reason: str) -> None:
        self.segment = segment
        self.reason = reason
        super().__init__(f"segment {segment!r} failed: {reason}")


class NotLoadedError(EngineError):
    """The engine was asked about a generation that it does not hold.

    Attributes:
        number: the generation's number.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"generation {number!r} is not loaded; load it first")


class EngineClosedError(EngineError):
    """The engine is closing or closed."""

    def __init__(self) -> None:
        super().__init__("the engine is closed and answers no more; ask another server")


class EndpointError(EngineError):
    """A Triton elsewhere did not do what it was asked.

    Attributes:
        endpoint: its address.
        reason: what it said, or what was found.
    """

    def __init__(self, endpoint: str, reason: str) -> None:
        self.endpoint = endpoint
        self.reason = reason
        super().__init__(f"Triton at {endpoint}: {reason}")


class EndpointGoneError(EndpointError):
    """It does not answer."""


class EndpointSilentError(EndpointGoneError):
    """It took the call and says nothing."""


class ModelMissingError(EndpointError):
    """It does not hold a model."""


class ModelDeadError(EndpointError):
    """The process that runs a model there is dead."""


class ModelSilentError(EndpointError):
    """A model there says nothing, while others answer."""


class ModelFailedError(EndpointError):
    """It says that a model cannot be loaded or failed."""


class TritonError(ServerError):
    """A Triton of ours that cannot run."""


class TritonEnvironmentError(TritonError):
    """The environment that Triton runs in is missing or cannot be made.

    Attributes:
        folder: where it should be.
        found: what is there.
        expected: what should be there.
        advice: what to do.
    """

    def __init__(self, folder: pathlib.Path, found: str, expected: str, advice: str) -> None:
        self.folder = folder
        self.found = found
        self.expected = expected
        self.advice = advice
        super().__init__(f"Triton's environment {str(folder)!r}: found {found}, expected {expected}; {advice}")


class TritonProcessError(TritonError):
    """tritonserver did not start, or ended.

    Attributes:
        found: what happened.
        expected: what should have happened.
        log: its log; kept.
        lines: the end of the log, or what of it says why.
    """

    def __init__(self, found: str, expected: str, log: pathlib.Path, lines: Sequence[str]) -> None:
        self.found = found
        self.expected = expected
        self.log = log
        self.lines = tuple(lines)
        shown = "".join(f"\n  {line}" for line in self.lines)
        super().__init__(f"tritonserver: found {found}, expected {expected}; its log is {log} and says:{shown}")


class SharedMemoryError(TritonError):
    """There is too little shared memory for Triton's Python backend.

    Attributes:
        folder: where it is.
        free: bytes free.
        least: bytes without which the segments do not even load.
        num_segments: how many there are.
    """

    def __init__(self, folder: pathlib.Path, free: int, least: int, num_segments: int) -> None:
        self.folder = folder
        self.free = free
        self.least = least
        self.num_segments = num_segments
        super().__init__(
            f"shared memory {str(folder)!r}: found {free / 2**20:.1f} MiB free, expected at least {least / 2**20:.1f} MiB for "
            f"{num_segments} segments; give it more (docker run --shm-size, or a larger tmpfs) or remove what else is there"
        )


class RequestError(ServerError):
    """A request that cannot be answered as it stands."""


class UnknownTaskError(RequestError):
    """No such task is served.

    Attributes:
        task: what was asked for.
        similar: names that are served and resemble it, most alike first.
        num_tasks: how many are served.
    """

    def __init__(self, task: str, similar: Sequence[str], num_tasks: int) -> None:
        self.task = task
        self.similar = tuple(similar)
        self.num_tasks = num_tasks
        did_you_mean = " or ".join(repr(name) for name in self.similar)
        advice = f"did you mean {did_you_mean}?" if self.similar else "ListTasks and RepositoryIndex name them"
        # A name may be megabytes of anything: show its beginning only.
        shown = task if len(task) <= 80 else task[:77] + "..."
        super().__init__(f"task: found {shown!r}, expected one of the {num_tasks} tasks that are served; {advice}")


class UnknownVersionError(RequestError):
    """A task is served, but not of the generation that was asked for.

    Attributes:
        version: what was asked for.
        served: number of the generation that serves.
    """

    def __init__(self, version: str, served: int) -> None:
        self.version = version
        self.served = served
        super().__init__(
            f"model_version: found {version[:80]!r}, expected none or {str(served)!r}, the number of the generation that serves; "
            "leave it out to be answered by whichever serves"
        )


class NoCanaryError(RequestError):
    """The canary is to answer, and there is none.

    Attributes:
        served: number of the generation that serves.
        refusal: why the canary that the repository names answers nothing; empty if it names none. For the log and Status, not for callers.
    """

    def __init__(self, served: int, refusal: str = "") -> None:
        self.served = served
        self.refusal = refusal
        super().__init__(
            f"label: found the canary's, expected the stable generation's or none, because generation {served} serves alone; "
            "leave it out"
        )


class ImageRefusedError(RequestError):
    """An image that cannot be used.

    Attributes:
        where: which of the request's images, such as `images[3]`.
        reason: what was found and what was expected.
    """

    def __init__(self, where: str, reason: str) -> None:
        self.where = where
        self.reason = reason
        super().__init__(f"{where}: {reason}")


class InferenceRefusedError(RequestError):
    """An inference that is not put as the Open Inference Protocol and the task want it.

    Attributes:
        where: which part of the request, such as `inputs[0]`.
        found: what is there.
        expected: what should be there.
        advice: what to do; empty if sending what is expected is all there is to do.
    """

    def __init__(self, where: str, found: str, expected: str, advice: str = "") -> None:
        self.where = where
        self.found = found
        self.expected = expected
        self.advice = advice
        super().__init__(f"{where}: found {found}, expected {expected}" + (f"; {advice}" if advice else ""))


class UnsupportedError(RequestError):
    """What a protocol has and this server has not.

    Attributes:
        what: what was asked for.
        reason: why it is not here.
        advice: what to do instead.
    """

    def __init__(self, what: str, reason: str, advice: str) -> None:
        self.what = what
        self.reason = reason
        self.advice = advice
        super().__init__(f"{what}: this server has none, because {reason}; {advice}")


class LimitError(RequestError):
    """More, or fewer, of something than this server accepts.

    Attributes:
        what: what was counted.
        found: how many.
        expected: how many are accepted, in words.
        advice: what to do.
    """

    def __init__(self, what: str, found: int, expected: str, advice: str) -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.advice = advice
        super().__init__(f"{what}: found {found!r}, expected {expected}; {advice}")


class MalformedRequestError(RequestError):
    """Bytes that are no request.

    Attributes:
        expected: the message's name.
        source: where its definition is.
    """

    def __init__(self, expected: str, source: str = "proto/munet/v1") -> None:
        self.expected = expected
        self.source = source
        super().__init__(f"request: found bytes that do not parse, expected a {expected}; build it from {source}")


class AccessError(ServerError):
    """A call that its caller may not make. The words are always the same: they tell a stranger nothing."""


class UnauthenticatedError(AccessError):
    """The caller has no token that is known here. A missing one, a wrong one and one that is no longer valid look alike."""

    def __init__(self) -> None:
        super().__init__(
            "authorization: found no token that is valid here, expected metadata `authorization: Bearer TOKEN`; "
            "ask whoever operates this server for one"
        )


class ForbiddenError(AccessError):
    """The caller's token is known, and its role is too small for the call."""

    def __init__(self) -> None:
        super().__init__(
            "authorization: found a token whose role does not allow this call, expected one that does; "
            "ask whoever operates this server for one"
        )


class DeadlineError(ServerError):
    """The caller's deadline passed before the answer was there, or would have.

    Attributes:
        left_seconds: what was left of it; 0 if it had passed.
        needs_seconds: what the answer takes at least, if that is known.
    """

    def __init__(self, left_seconds: float = 0.0, needs_seconds: float = 0.0) -> None:
        self.left_seconds = left_seconds
        self.needs_seconds = needs_seconds
        what = (
            f"the deadline cannot be met: found {left_seconds:.3f} seconds left, expected at least {needs_seconds:.3f}"
            if needs_seconds
            else "the deadline passed before the answer was there"
        )
        super().__init__(f"{what}; allow more time or send fewer images")


class OverloadedError(ServerError):
    """Too much waits.

    Attributes:
        what: what there is too much of.
        waiting: how much of it waits.
        limit: how much may wait.
        retry_after_seconds: when another try makes sense.
    """

    def __init__(self, what: str, waiting: float, limit: float, retry_after_seconds: float = 0.1) -> None:
        self.what = what
        self.waiting = waiting
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds
        super().__init__(
            f"{what}: found {waiting!r} waiting, expected at most {limit}; try again in {round(retry_after_seconds, 3)} seconds"
        )


class UnavailableError(ServerError):
    """The server cannot answer now: anything, or what is asked.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"this server cannot answer this now: found it {reason}, expected it serving; ask again later, or another one"
        )


class SegmentUnavailableError(UnavailableError):
    """A segment was to be loaded on demand and could not; the log says why.

    Attributes:
        segment: its name.
    """

    def __init__(self, segment: str) -> None:
        self.segment = segment
        super().__init__(f"without segment {segment!r}, which it could not load again as it was published")


class NoEndpointError(UnavailableError):
    """No Triton computes these tasks now.

    Attributes:
        tasks: what was asked.
        reasons: for each endpoint, what is wrong with it.
    """

    NUM_SHOWN = 5

    def __init__(self, tasks: Sequence[str], reasons: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.reasons = tuple(reasons)
        shown = "; ".join(reason[:300] for reason in self.reasons[: self.NUM_SHOWN])
        rest = len(self.reasons) - self.NUM_SHOWN
        super().__init__(
            f"without a Triton that computes {', '.join(self.tasks[: self.NUM_SHOWN])} "
            f"({shown}{f'; and {rest} more' if rest > 0 else ''})"
        )


class CallError(ServerError):
    """What a client learns when its call fails.

    Attributes:
        server: the address that was called.
        method: the name of the call.
        status: name of the gRPC status, such as `NOT_FOUND`.
        details: the server's words.
        retry_after_seconds: when another try makes sense; none if the server did not say.
    """

    def __init__(self, server: str, method: str, status: str, details: str, retry_after_seconds: float | None = None) -> None:
        self.server = server
        self.method = method
        self.status = status
        self.details = details
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"{method} at {server}: {details} ({status}){self._advice}")

    @property
    def _advice(self) -> str:
        return ""


class CallRefusedError(CallError):
    """The server refused the request; its fault lies in the request."""


class TaskNotFoundError(CallRefusedError):
    """No such task is served."""


class CallDeniedError(CallRefusedError):
    """The caller may not make this call."""


class CallTimeoutError(CallError):
    """The call's deadline passed."""


class ClientClosedError(CallError):
    """The client was closed before the call was answered."""

    def __init__(self, server: str, method: str) -> None:
        super().__init__(server, method, "CANCELLED", "found a client that is closed, expected an open one; make another")


class ServerBusyError(CallError):
    """Too much waits at the server; try again later."""


class ServerUnreachableError(CallError):
    """No server answers there, or it cannot answer now, and says why."""

    @property
    def _advice(self) -> str:
        # A server's own words say what it expected; a connection's do not.
        return "" if "expected" in self.details else "; is `munet-server serve` running there?"


class ServerFailedError(CallError):
    """The server failed; the message carries an id that its log has too."""
