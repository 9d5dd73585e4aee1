import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EndpointState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENDPOINT_STATE_UNSPECIFIED: _ClassVar[EndpointState]
    ENDPOINT_STATE_JOINING: _ClassVar[EndpointState]
    ENDPOINT_STATE_SERVING: _ClassVar[EndpointState]
    ENDPOINT_STATE_DOWN: _ClassVar[EndpointState]
ENDPOINT_STATE_UNSPECIFIED: EndpointState
ENDPOINT_STATE_JOINING: EndpointState
ENDPOINT_STATE_SERVING: EndpointState
ENDPOINT_STATE_DOWN: EndpointState

class StatusRequest(_message.Message):
    __slots__ = ("details",)
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    details: bool
    def __init__(self, details: _Optional[bool] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("generation", "num_tasks", "started", "uptime", "last_reload", "segments", "engine", "version", "endpoints", "rolled_back_from", "draining", "num_in_flight", "kept_generations", "canary", "tasks", "memory")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NUM_TASKS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    LAST_RELOAD_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    ROLLED_BACK_FROM_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    KEPT_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    generation: int
    num_tasks: int
    started: _timestamp_pb2.Timestamp
    uptime: _duration_pb2.Duration
    last_reload: ReloadAttempt
    segments: _containers.RepeatedCompositeFieldContainer[SegmentCounters]
    engine: str
    version: str
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    rolled_back_from: int
    draining: bool
    num_in_flight: int
    kept_generations: _containers.RepeatedScalarFieldContainer[int]
    canary: CanaryStatus
    tasks: _containers.RepeatedCompositeFieldContainer[TaskCounters]
    memory: SegmentMemory
    def __init__(self, generation: _Optional[int] = ..., num_tasks: _Optional[int] = ..., started: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_reload: _Optional[_Union[ReloadAttempt, _Mapping]] = ..., segments: _Optional[_Iterable[_Union[SegmentCounters, _Mapping]]] = ..., engine: _Optional[str] = ..., version: _Optional[str] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., rolled_back_from: _Optional[int] = ..., draining: _Optional[bool] = ..., num_in_flight: _Optional[int] = ..., kept_generations: _Optional[_Iterable[int]] = ..., canary: _Optional[_Union[CanaryStatus, _Mapping]] = ..., tasks: _Optional[_Iterable[_Union[TaskCounters, _Mapping]]] = ..., memory: _Optional[_Union[SegmentMemory, _Mapping]] = ...) -> None: ...

class SegmentMemory(_message.Message):
    __slots__ = ("limit_bytes", "resident_bytes", "num_segments", "num_resident", "loads", "failed_loads", "evictions")
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    FAILED_LOADS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    limit_bytes: int
    resident_bytes: int
    num_segments: int
    num_resident: int
    loads: int
    failed_loads: int
    evictions: int
    def __init__(self, limit_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., num_segments: _Optional[int] = ..., num_resident: _Optional[int] = ..., loads: _Optional[int] = ..., failed_loads: _Optional[int] = ..., evictions: _Optional[int] = ...) -> None: ...

class CanaryStatus(_message.Message):
    __slots__ = ("generation", "percent", "percent_of_task", "refusal", "num_requests")
    class PercentOfTaskEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    PERCENT_OF_TASK_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    percent: float
    percent_of_task: _containers.ScalarMap[str, float]
    refusal: str
    num_requests: int
    def __init__(self, generation: _Optional[int] = ..., percent: _Optional[float] = ..., percent_of_task: _Optional[_Mapping[str, float]] = ..., refusal: _Optional[str] = ..., num_requests: _Optional[int] = ...) -> None: ...

class TaskCounters(_message.Message):
    __slots__ = ("name", "answered", "images", "failed", "latency", "queue", "compute")
    class FailedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    name: str
    answered: int
    images: int
    failed: _containers.ScalarMap[str, int]
    latency: Distribution
    queue: Distribution
    compute: Distribution
    def __init__(self, name: _Optional[str] = ..., answered: _Optional[int] = ..., images: _Optional[int] = ..., failed: _Optional[_Mapping[str, int]] = ..., latency: _Optional[_Union[Distribution, _Mapping]] = ..., queue: _Optional[_Union[Distribution, _Mapping]] = ..., compute: _Optional[_Union[Distribution, _Mapping]] = ...) -> None: ...

class Distribution(_message.Message):
    __slots__ = ("bounds", "counts", "sum")
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    bounds: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum: float
    def __init__(self, bounds: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., sum: _Optional[float] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("address", "state", "since", "reason", "generations", "rows_in_flight", "version")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    ROWS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    address: str
    state: EndpointState
    since: _timestamp_pb2.Timestamp
    reason: str
    generations: _containers.RepeatedScalarFieldContainer[int]
    rows_in_flight: int
    version: str
    def __init__(self, address: _Optional[str] = ..., state: _Optional[_Union[EndpointState, str]] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., reason: _Optional[str] = ..., generations: _Optional[_Iterable[int]] = ..., rows_in_flight: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class ReloadAttempt(_message.Message):
    __slots__ = ("generation", "finished", "duration", "error")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    generation: int
    finished: _timestamp_pb2.Timestamp
    duration: _duration_pb2.Duration
    error: str
    def __init__(self, generation: _Optional[int] = ..., finished: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., error: _Optional[str] = ...) -> None: ...

class SegmentCounters(_message.Message):
    __slots__ = ("name", "rows_requested", "rows_computed", "rows_saved", "executions", "tasks", "num_parameters", "distributions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_REQUESTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_SAVED_FIELD_NUMBER: _ClassVar[int]
    EXECUTIONS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    DISTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows_requested: int
    rows_computed: int
    rows_saved: int
    executions: int
    tasks: _containers.RepeatedScalarFieldContainer[str]
    num_parameters: int
    distributions: SegmentDistributions
    def __init__(self, name: _Optional[str] = ..., rows_requested: _Optional[int] = ..., rows_computed: _Optional[int] = ..., rows_saved: _Optional[int] = ..., executions: _Optional[int] = ..., tasks: _Optional[_Iterable[str]] = ..., num_parameters: _Optional[int] = ..., distributions: _Optional[_Union[SegmentDistributions, _Mapping]] = ...) -> None: ...

class SegmentDistributions(_message.Message):
    __slots__ = ("queue", "compute", "batch_rows", "batch_requests", "batch_tasks")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_TASKS_FIELD_NUMBER: _ClassVar[int]
    queue: Distribution
    compute: Distribution
    batch_rows: Distribution
    batch_requests: Distribution
    batch_tasks: Distribution
    def __init__(self, queue: _Optional[_Union[Distribution, _Mapping]] = ..., compute: _Optional[_Union[Distribution, _Mapping]] = ..., batch_rows: _Optional[_Union[Distribution, _Mapping]] = ..., batch_requests: _Optional[_Union[Distribution, _Mapping]] = ..., batch_tasks: _Optional[_Union[Distribution, _Mapping]] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("generation", "changed")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    generation: int
    changed: bool
    def __init__(self, generation: _Optional[int] = ..., changed: _Optional[bool] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("generation", "previous")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    previous: int
    def __init__(self, generation: _Optional[int] = ..., previous: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("cancel",)
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    cancel: bool
    def __init__(self, cancel: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("drained",)
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    def __init__(self, drained: _Optional[bool] = ...) -> None: ...
