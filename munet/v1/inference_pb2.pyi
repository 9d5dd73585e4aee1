import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Label(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LABEL_UNSPECIFIED: _ClassVar[Label]
    LABEL_STABLE: _ClassVar[Label]
    LABEL_CANARY: _ClassVar[Label]
LABEL_UNSPECIFIED: Label
LABEL_STABLE: Label
LABEL_CANARY: Label

class Image(_message.Message):
    __slots__ = ("encoded", "raw")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    raw: RawImage
    def __init__(self, encoded: _Optional[bytes] = ..., raw: _Optional[_Union[RawImage, _Mapping]] = ...) -> None: ...

class RawImage(_message.Message):
    __slots__ = ("height", "width", "channels", "data")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    channels: int
    data: bytes
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., channels: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("labels", "logits")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedCompositeFieldContainer[LabelProbability]
    logits: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, labels: _Optional[_Iterable[_Union[LabelProbability, _Mapping]]] = ..., logits: _Optional[_Iterable[float]] = ...) -> None: ...

class LabelProbability(_message.Message):
    __slots__ = ("index", "label", "probability")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    index: int
    label: str
    probability: float
    def __init__(self, index: _Optional[int] = ..., label: _Optional[str] = ..., probability: _Optional[float] = ...) -> None: ...

class ClassifyRequest(_message.Message):
    __slots__ = ("task", "images", "top_k", "include_logits", "label")
    TASK_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_LOGITS_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    task: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    top_k: int
    include_logits: bool
    label: Label
    def __init__(self, task: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., top_k: _Optional[int] = ..., include_logits: _Optional[bool] = ..., label: _Optional[_Union[Label, str]] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("task", "path_id", "generation", "classifications")
    TASK_FIELD_NUMBER: _ClassVar[int]
    PATH_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CLASSIFICATIONS_FIELD_NUMBER: _ClassVar[int]
    task: str
    path_id: str
    generation: int
    classifications: _containers.RepeatedCompositeFieldContainer[Classification]
    def __init__(self, task: _Optional[str] = ..., path_id: _Optional[str] = ..., generation: _Optional[int] = ..., classifications: _Optional[_Iterable[_Union[Classification, _Mapping]]] = ...) -> None: ...

class ClassifyTasksRequest(_message.Message):
    __slots__ = ("image", "tasks", "top_k", "include_logits", "label")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_LOGITS_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    image: Image
    tasks: _containers.RepeatedScalarFieldContainer[str]
    top_k: int
    include_logits: bool
    label: Label
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., tasks: _Optional[_Iterable[str]] = ..., top_k: _Optional[int] = ..., include_logits: _Optional[bool] = ..., label: _Optional[_Union[Label, str]] = ...) -> None: ...

class ClassifyTasksResponse(_message.Message):
    __slots__ = ("generation", "tasks")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    tasks: _containers.RepeatedCompositeFieldContainer[TaskClassification]
    def __init__(self, generation: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[TaskClassification, _Mapping]]] = ...) -> None: ...

class TaskClassification(_message.Message):
    __slots__ = ("task", "path_id", "classification")
    TASK_FIELD_NUMBER: _ClassVar[int]
    PATH_ID_FIELD_NUMBER: _ClassVar[int]
    CLASSIFICATION_FIELD_NUMBER: _ClassVar[int]
    task: str
    path_id: str
    classification: Classification
    def __init__(self, task: _Optional[str] = ..., path_id: _Optional[str] = ..., classification: _Optional[_Union[Classification, _Mapping]] = ...) -> None: ...

class ClassifyStreamRequest(_message.Message):
    __slots__ = ("id", "classify", "classify_tasks", "timeout")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLASSIFY_FIELD_NUMBER: _ClassVar[int]
    CLASSIFY_TASKS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    id: str
    classify: ClassifyRequest
    classify_tasks: ClassifyTasksRequest
    timeout: _duration_pb2.Duration
    def __init__(self, id: _Optional[str] = ..., classify: _Optional[_Union[ClassifyRequest, _Mapping]] = ..., classify_tasks: _Optional[_Union[ClassifyTasksRequest, _Mapping]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ClassifyStreamResponse(_message.Message):
    __slots__ = ("id", "classify", "classify_tasks", "failure")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLASSIFY_FIELD_NUMBER: _ClassVar[int]
    CLASSIFY_TASKS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    id: str
    classify: ClassifyResponse
    classify_tasks: ClassifyTasksResponse
    failure: Failure
    def __init__(self, id: _Optional[str] = ..., classify: _Optional[_Union[ClassifyResponse, _Mapping]] = ..., classify_tasks: _Optional[_Union[ClassifyTasksResponse, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "retry_delay")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retry_delay: _duration_pb2.Duration
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retry_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ListTasksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTasksResponse(_message.Message):
    __slots__ = ("generation", "tasks")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    tasks: _containers.RepeatedCompositeFieldContainer[TaskInfo]
    def __init__(self, generation: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[TaskInfo, _Mapping]]] = ...) -> None: ...

class GetTaskRequest(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: str
    def __init__(self, task: _Optional[str] = ...) -> None: ...

class GetTaskResponse(_message.Message):
    __slots__ = ("generation", "task")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    generation: int
    task: TaskInfo
    def __init__(self, generation: _Optional[int] = ..., task: _Optional[_Union[TaskInfo, _Mapping]] = ...) -> None: ...

class WatchTasksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchTasksResponse(_message.Message):
    __slots__ = ("generation", "added", "changed", "removed", "num_unchanged")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    NUM_UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    generation: int
    added: _containers.RepeatedCompositeFieldContainer[TaskInfo]
    changed: _containers.RepeatedCompositeFieldContainer[TaskInfo]
    removed: _containers.RepeatedScalarFieldContainer[str]
    num_unchanged: int
    def __init__(self, generation: _Optional[int] = ..., added: _Optional[_Iterable[_Union[TaskInfo, _Mapping]]] = ..., changed: _Optional[_Iterable[_Union[TaskInfo, _Mapping]]] = ..., removed: _Optional[_Iterable[str]] = ..., num_unchanged: _Optional[int] = ...) -> None: ...

class TaskInfo(_message.Message):
    __slots__ = ("name", "path_id", "labels", "image_size", "quality", "test_accuracy", "route")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_ID_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    TEST_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    name: str
    path_id: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    image_size: int
    quality: float
    test_accuracy: float
    route: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., path_id: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., image_size: _Optional[int] = ..., quality: _Optional[float] = ..., test_accuracy: _Optional[float] = ..., route: _Optional[_Iterable[str]] = ...) -> None: ...
