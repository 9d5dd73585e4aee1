"""Between messages of the Open Inference Protocol and the domain, both ways.

The messages are those that tritonclient ships: a second copy of their definitions in one process would clash with them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import model_config_pb2, service_pb2

from server.classification import SentImages, TaskAnswer, check_count
from server.config import Limits
from server.engine import SegmentStatistics
from server.errors import InferenceRefusedError
from server.front_door.edge import Failure
from server.generation import Task
from server.preprocessing import EncodedImage
from server.task_counts import TaskCount

INPUT = "image"
LOGITS = "logits"
PROBABILITIES = "probabilities"
OUTPUTS = (LOGITS, PROBABILITIES)
"""What a task answers with, in this order if a request names none."""

PLATFORM = "munet"

_CLASSIFICATION = "classification"
_SHARED_MEMORY = "shared_memory_region"
_TIMEOUT = "timeout"
_CHUNK = 16384
_LENGTH = struct.Struct("<I")


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """An output that a request asks for.

    Attributes:
        name: one of `OUTPUTS`.
        num_classes: how many of the most probable classes to name instead of giving all values; 0 means all values.
    """

    name: str
    num_classes: int


# What a request says


def is_slow(request: Any) -> bool:
    """Whether `to_images` takes its time: numbers that come one by one, not as bytes."""
    return any(tensor.contents.uint_contents for tensor in request.inputs[:1])


def to_images(request: Any, task: Task, limits: Limits) -> SentImages:
    """Returns the images of a ModelInferRequest.

    Args:
        request: as sent.
        task: who is asked.
        limits: what is accepted.

    Returns:
        Pixels, [images, size, size, 3] uint8 at the task's own size; or encoded images.

    Raises:
        InferenceRefusedError: the input is not what the task takes.
        LimitError: no image, or too many.
    """
    if len(request.inputs) != 1:
        raise InferenceRefusedError("inputs", f"{len(request.inputs)} tensors", f"one, {INPUT!r}")
    (tensor,) = request.inputs
    where = f"inputs[0] {INPUT!r}"
    if tensor.name != INPUT:
        raise InferenceRefusedError("inputs[0]", f"a tensor of the name {_shown(tensor.name)}", repr(INPUT))
    _refuse_shared_memory(where, tensor)
    content = _raw_content(request, tensor, where)
    size = task.image_size
    pixels_shape = (size, size, 3)
    if tensor.datatype == "BYTES" and len(tensor.shape) == 1:
        num_images = _num_images(tensor, limits)
        return _encoded_images(tensor, content, num_images, where)
    if tensor.datatype == "UINT8" and len(tensor.shape) == 4 and tuple(tensor.shape[1:]) == pixels_shape:
        num_images = _num_images(tensor, limits)
        return _pixels(tensor, content, (num_images, *pixels_shape), where)
    raise InferenceRefusedError(
        where,
        f"{_shown(tensor.datatype)} {_shown_shape(tensor.shape)}",
        f"UINT8 [images, {size}, {size}, 3] or BYTES [images]",
        f"resize images to {size} x {size} pixels of RGB, or send whole JPEG, PNG, WebP or BMP files as BYTES",
    )


def to_outputs(request: Any) -> list[Output]:
    """Returns the outputs that a ModelInferRequest asks for; all of them if it names none.

    Raises:
        InferenceRefusedError: one is unknown, asked for twice, or asked for in a way that is not known.
    """
    if not request.outputs:
        return [Output(name, 0) for name in OUTPUTS]
    if len(request.outputs) > len(OUTPUTS):
        raise InferenceRefusedError("outputs", f"{len(request.outputs)} tensors", f"at most {_or(OUTPUTS)}, each once")
    outputs: list[Output] = []
    for index, tensor in enumerate(request.outputs):
        where = f"outputs[{index}]"
        if tensor.name not in OUTPUTS:
            raise InferenceRefusedError(where, _shown(tensor.name), _or(OUTPUTS))
        if any(output.name == tensor.name for output in outputs):
            raise InferenceRefusedError(where, f"{tensor.name!r} a second time", "each output once")
        _refuse_shared_memory(where, tensor)
        num_classes = 0
        if _CLASSIFICATION in tensor.parameters:
            num_classes = _whole_number(f"{where}: {_CLASSIFICATION}", tensor.parameters[_CLASSIFICATION])
        outputs.append(Output(tensor.name, num_classes))
    return outputs


def to_timeout_seconds(request: Any) -> float | None:
    """Returns how long the answer to a ModelInferRequest is of use; none if it does not say.

    Raises:
        InferenceRefusedError: it says it in a way that is not known.
    """
    if _TIMEOUT not in request.parameters:
        return None
    return _whole_number(f"parameters: {_TIMEOUT} (microseconds)", request.parameters[_TIMEOUT]) / 1e6


def _raw_content(request: Any, tensor: Any, where: str) -> bytes | None:
    """Returns the input's bytes; none if its content stands in the tensor itself."""
    if len(request.raw_input_contents) > 1:
        raise InferenceRefusedError("raw_input_contents", f"{len(request.raw_input_contents)} contents", "one for each input")
    if request.raw_input_contents and tensor.HasField("contents"):
        raise InferenceRefusedError(where, "its content in `contents` and in `raw_input_contents`", "it in one of them")
    return request.raw_input_contents[0] if request.raw_input_contents else None


def _num_images(tensor: Any, limits: Limits) -> int:
    num_images = int(tensor.shape[0])
    check_count("images", num_images, limits.max_images, "send the rest in further requests")
    return num_images


def _pixels(tensor: Any, content: bytes | None, shape: tuple[int, ...], where: str) -> npt.NDArray[np.uint8]:
    num_bytes = math.prod(shape)
    if content is None:
        numbers = tensor.contents.uint_contents
        if len(numbers) != num_bytes:
            raise InferenceRefusedError(where, f"{len(numbers)} numbers in `uint_contents`", _filling(shape))
        content = _to_bytes(numbers, where)
    if len(content) != num_bytes:
        raise InferenceRefusedError(where, f"{len(content)} bytes", _filling(shape))
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _to_bytes(numbers: Sequence[int], where: str) -> bytes:
    try:
        # In pieces, so that other threads get their turn.
        return b"".join(bytes(numbers[start : start + _CHUNK]) for start in range(0, len(numbers), _CHUNK))
    except ValueError:
        raise InferenceRefusedError(where, "a number above 255 in `uint_contents`", "UINT8, 0 to 255") from None


def _encoded_images(tensor: Any, content: bytes | None, num_images: int, where: str) -> list[EncodedImage]:
    if content is not None:
        return [EncodedImage(element) for element in _split(content, num_images, where)]
    elements = tensor.contents.bytes_contents
    if len(elements) != num_images:
        raise InferenceRefusedError(where, f"{len(elements)} elements in `bytes_contents`", f"{num_images}, as its shape says")
    return [EncodedImage(element) for element in elements]


def _split(content: bytes, num_elements: int, where: str) -> list[bytes]:
    """Returns the elements of BYTES, each of which follows its length: four bytes, the lowest first."""
    elements = []
    offset = 0
    for index in range(num_elements):
        start = offset + _LENGTH.size
        if start > len(content):
            raise InferenceRefusedError(where, f"{index} elements in {len(content)} bytes", f"{num_elements}, as its shape says")
        (length,) = _LENGTH.unpack_from(content, offset)
        offset = start + length
        if offset > len(content):
            raise InferenceRefusedError(
                where,
                f"{len(content) - start} bytes after the length of element {index}",
                f"{length}, as that length says",
                "each element follows its length in four bytes, the lowest first",
            )
        elements.append(content[start:offset])
    if offset != len(content):
        raise InferenceRefusedError(
            where, f"{len(content) - offset} bytes after the last element", f"{num_elements} elements, as its shape says"
        )
    return elements


def _refuse_shared_memory(where: str, tensor: Any) -> None:
    if _SHARED_MEMORY in tensor.parameters:
        raise InferenceRefusedError(where, "shared memory", "its content in the message", "this server shares none with anybody")


def _whole_number(where: str, parameter: Any) -> int:
    kind = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, kind) if kind in ("int64_param", "uint64_param") else None
    if value is None or value < 1:
        found = "nothing" if kind is None else f"{kind} {_shown(getattr(parameter, kind))}"
        raise InferenceRefusedError(where, found, "int64_param of 1 or more")
    return int(value)


def _shown(value: object) -> str:
    # A name may be megabytes of anything: show its beginning only.
    return repr(value if not isinstance(value, str) or len(value) <= 80 else value[:77] + "...")


def _shown_shape(shape: Sequence[int]) -> str:
    return str(list(shape)) if len(shape) <= 8 else f"{str(list(shape[:8]))[:-1]}, ...] ({len(shape)} dimensions)"


def _filling(shape: tuple[int, ...]) -> str:
    return f"{math.prod(shape)}, which fill {list(shape)}"


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


# What is answered


def from_answer(answer: TaskAnswer, outputs: Sequence[Output], request_id: str) -> Any:
    """Returns a task's answer as a ModelInferResponse, its contents as bytes."""
    response = service_pb2.ModelInferResponse(model_name=answer.task.name, model_version=str(answer.generation), id=request_id)
    response.parameters["path_id"].string_param = answer.task.path_id
    for output in outputs:
        values = answer.logits if output.name == LOGITS else answer.probabilities.astype(np.float32)
        if output.num_classes:
            order = answer.order[:, : output.num_classes]
            response.outputs.add(name=output.name, datatype="BYTES", shape=order.shape)
            response.raw_output_contents.append(_named_classes(values, order, answer.task.labels))
        else:
            response.outputs.add(name=output.name, datatype="FP32", shape=values.shape)
            response.raw_output_contents.append(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return response


def _named_classes(values: npt.NDArray[np.float32], order: npt.NDArray[np.intp], labels: Sequence[str]) -> bytes:
    """Returns classes as VALUE:INDEX:LABEL, as Triton writes them."""
    elements = [
        f"{values[row, index]:f}:{index}:{labels[index]}".encode() for row in range(len(order)) for index in order[row].tolist()
    ]
    return b"".join(_LENGTH.pack(len(element)) + element for element in elements)


def to_streamed(response: Any) -> Any:
    """Returns a ModelInferResponse as the one answer to a message of a stream."""
    response.parameters["triton_final_response"].bool_param = True
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def from_stream_failure(request: Any, failure: Failure) -> Any:
    """Returns what answers a message of a stream that failed.

    Args:
        request: the ModelInferRequest; none if the message was no such thing.
        failure: what is told of it; of which the protocol has room for the words.
    """
    response = service_pb2.ModelStreamInferResponse(error_message=failure.words)
    response.infer_response.id = "" if request is None else request.id
    return response


def from_task(number: int, task: Task) -> Any:
    """Returns what is told of a task of the generation with this number, as a ModelMetadataResponse."""
    size = task.image_size
    response = service_pb2.ModelMetadataResponse(name=task.name, versions=[str(number)], platform=PLATFORM)
    response.inputs.add(name=INPUT, datatype="UINT8", shape=[-1, size, size, 3])
    for name in OUTPUTS:
        response.outputs.add(name=name, datatype="FP32", shape=[-1, len(task.labels)])
    return response


def to_config(number: int, task: Task, max_images: int) -> Any:
    """Returns a task of the generation with this number as a ModelConfigResponse."""
    size = task.image_size
    config = model_config_pb2.ModelConfig(name=task.name, platform=PLATFORM, max_batch_size=max_images)
    config.version_policy.specific.versions.append(number)
    config.input.add(name=INPUT, data_type=model_config_pb2.TYPE_UINT8, dims=[size, size, 3])
    for name in OUTPUTS:
        config.output.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=[len(task.labels)], label_filename="labels.txt")
    told = {"labels": json.dumps(task.labels, ensure_ascii=False), "path_id": task.path_id, "generation": str(number)}
    for key, value in told.items():
        config.parameters[key].string_value = value
    return service_pb2.ModelConfigResponse(config=config)


def add_statistics(response: Any, number: int, task: Task, count: TaskCount, head: SegmentStatistics | None) -> None:
    """Adds what was counted of a task to a ModelStatisticsResponse.

    Args:
        response: to be added to.
        number: of the generation that serves.
        task: whose counts they are.
        count: how its questions went.
        head: what the last segment of its route ran; none if the engine holds none of that name.
    """
    statistics = response.model_stats.add(name=task.name, version=str(number), last_inference=count.last_ms)
    statistics.inference_count = count.num_images
    statistics.execution_count = head.executions if head is not None else 0
    statistics.inference_stats.success.count = count.num_answered
    statistics.inference_stats.success.ns = count.answered_ns
    statistics.inference_stats.fail.count = count.num_failed
    statistics.inference_stats.fail.ns = count.failed_ns
