import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType

class Generation(_message.Message):
    __slots__ = ("format", "number", "previous", "created", "system_id", "exporter", "segments", "tasks", "multi_task_ensembles", "files")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_ID_FIELD_NUMBER: _ClassVar[int]
    EXPORTER_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    MULTI_TASK_ENSEMBLES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    format: int
    number: int
    previous: int
    created: _timestamp_pb2.Timestamp
    system_id: str
    exporter: str
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    multi_task_ensembles: _containers.RepeatedCompositeFieldContainer[MultiTaskEnsemble]
    files: _containers.RepeatedCompositeFieldContainer[File]
    def __init__(self, format: _Optional[int] = ..., number: _Optional[int] = ..., previous: _Optional[int] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., system_id: _Optional[str] = ..., exporter: _Optional[str] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., multi_task_ensembles: _Optional[_Iterable[_Union[MultiTaskEnsemble, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[File, _Mapping]]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("name", "units", "input", "output", "max_batch_size", "num_parameters")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    units: _containers.RepeatedCompositeFieldContainer[Unit]
    input: TensorSpec
    output: TensorSpec
    max_batch_size: int
    num_parameters: int
    def __init__(self, name: _Optional[str] = ..., units: _Optional[_Iterable[_Union[Unit, _Mapping]]] = ..., input: _Optional[_Union[TensorSpec, _Mapping]] = ..., output: _Optional[_Union[TensorSpec, _Mapping]] = ..., max_batch_size: _Optional[int] = ..., num_parameters: _Optional[int] = ...) -> None: ...

class Unit(_message.Message):
    __slots__ = ("layer_ids",)
    LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    layer_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, layer_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "data_type", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    data_type: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., data_type: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("name", "path_id", "route", "ensemble", "labels", "preprocessing", "quality", "test_accuracy", "accounted_parameters", "num_parameters", "golden")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    ENSEMBLE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESSING_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    TEST_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    ACCOUNTED_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    path_id: str
    route: _containers.RepeatedScalarFieldContainer[str]
    ensemble: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    preprocessing: Preprocessing
    quality: float
    test_accuracy: float
    accounted_parameters: float
    num_parameters: int
    golden: GoldenLogits
    def __init__(self, name: _Optional[str] = ..., path_id: _Optional[str] = ..., route: _Optional[_Iterable[str]] = ..., ensemble: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., preprocessing: _Optional[_Union[Preprocessing, _Mapping]] = ..., quality: _Optional[float] = ..., test_accuracy: _Optional[float] = ..., accounted_parameters: _Optional[float] = ..., num_parameters: _Optional[int] = ..., golden: _Optional[_Union[GoldenLogits, _Mapping]] = ...) -> None: ...

class Preprocessing(_message.Message):
    __slots__ = ("version", "image_size")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    version: int
    image_size: int
    def __init__(self, version: _Optional[int] = ..., image_size: _Optional[int] = ...) -> None: ...

class GoldenLogits(_message.Message):
    __slots__ = ("images", "logits", "tolerance")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    images: str
    logits: _containers.RepeatedScalarFieldContainer[float]
    tolerance: float
    def __init__(self, images: _Optional[str] = ..., logits: _Optional[_Iterable[float]] = ..., tolerance: _Optional[float] = ...) -> None: ...

class MultiTaskEnsemble(_message.Message):
    __slots__ = ("image_size", "name", "tasks")
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    image_size: int
    name: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, image_size: _Optional[int] = ..., name: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("path", "sha256", "num_bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    sha256: str
    num_bytes: int
    def __init__(self, path: _Optional[str] = ..., sha256: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Canary(_message.Message):
    __slots__ = ("generation", "percent", "percent_of_task")
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
    generation: int
    percent: float
    percent_of_task: _containers.ScalarMap[str, float]
    def __init__(self, generation: _Optional[int] = ..., percent: _Optional[float] = ..., percent_of_task: _Optional[_Mapping[str, float]] = ...) -> None: ...
