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
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("generation", "num_tasks", "started", "uptime", "last_reload", "segments", "engine", "version", "endpoints")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NUM_TASKS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    LAST_RELOAD_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    num_tasks: int
    started: _timestamp_pb2.Timestamp
    uptime: _duration_pb2.Duration
    last_reload: ReloadAttempt
    segments: _containers.RepeatedCompositeFieldContainer[SegmentCounters]
    engine: str
    version: str
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    def __init__(self, generation: _Optional[int] = ..., num_tasks: _Optional[int] = ..., started: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_reload: _Optional[_Union[ReloadAttempt, _Mapping]] = ..., segments: _Optional[_Iterable[_Union[SegmentCounters, _Mapping]]] = ..., engine: _Optional[str] = ..., version: _Optional[str] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ...) -> None: ...

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
    __slots__ = ("name", "rows_requested", "rows_computed", "rows_saved", "executions", "tasks", "num_parameters")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_REQUESTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_SAVED_FIELD_NUMBER: _ClassVar[int]
    EXECUTIONS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows_requested: int
    rows_computed: int
    rows_saved: int
    executions: int
    tasks: _containers.RepeatedScalarFieldContainer[str]
    num_parameters: int
    def __init__(self, name: _Optional[str] = ..., rows_requested: _Optional[int] = ..., rows_computed: _Optional[int] = ..., rows_saved: _Optional[int] = ..., executions: _Optional[int] = ..., tasks: _Optional[_Iterable[str]] = ..., num_parameters: _Optional[int] = ...) -> None: ...

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
