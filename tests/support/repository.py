"""Builds small real model repositories without torch: ONNX graphs by hand, golden logits by numpy, configs by Triton's message.

The default system, at 8 x 8 pixels unless said otherwise (segments in brackets are the tasks' own):

    digits   stem - trunk - top - [head]
    greek    stem - trunk - top - [head]
    hebrew   stem - [clone of trunk] - top - [head]     leaves the shared route and rejoins it
    short    stem - trunk - [head]                      fewer blocks
    large    [stem of 16 pixels] - trunk - top - [head] more tokens through the same segments
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from google.protobuf import json_format, text_format
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import model_config_pb2 as triton

from munet import preprocessing
from munet.v1 import generation_pb2

WIDTH = 8
PATCH = 4
MAX_BATCH_SIZE = 8
NUM_GOLDEN = 4
TOLERANCE = 1e-4

Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TaskPlan:
    """A task to publish: the names of its layers and of its classes. `stem:8:...` takes 8 pixels, `head:...` ends a route."""

    route: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def image_size(self) -> int:
        return int(self.route[0].split(":")[1])


def _labels(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name} {index}" for index in range(count))


DIGITS = TaskPlan(("stem:8:a", "block:trunk", "block:top", "head:digits:10"), _labels("digit", 10))
GREEK = TaskPlan(("stem:8:a", "block:trunk", "block:top", "head:greek:24"), _labels("letter", 24))
HEBREW = TaskPlan(("stem:8:a", "block:clone", "block:top", "head:hebrew:5"), _labels("sign", 5))
SHORT = TaskPlan(("stem:8:a", "block:trunk", "head:short:3"), _labels("kind", 3))
LARGE = TaskPlan(("stem:16:b", "block:trunk", "block:top", "head:large:4"), _labels("thing", 4))

TRAP = TaskPlan(("trap:8:a", "block:trunk", "head:trap:3"), _labels("snare", 3))
"""Its first segment fails in ONNX Runtime on images whose first byte is 200 or more."""

VOID = TaskPlan(("void:8:a", "block:trunk", "head:void:3"), _labels("hole", 3))
"""Its first segment gives what is no number for images whose first byte is 200 or more, and for no other image of the batch."""

STEMS = ("stem", "trap", "void")
"""Kinds of layers that take an image."""

TASKS: dict[str, TaskPlan] = {"digits": DIGITS, "greek": GREEK, "hebrew": HEBREW, "short": SHORT, "large": LARGE}


class Layer:
    """One segment: its weights, its ONNX graph, and the same computed by numpy in float64."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.kind, *self.arguments = key.split(":")
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        self.weights: Weights = {
            name: (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32) for name, shape in self._shapes().items()
        }

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self.kind in STEMS:
            return {"embed": (PATCH * PATCH * 3, WIDTH), "position": (self.num_tokens, WIDTH)}
        if self.kind == "block":
            return dict.fromkeys(("query", "key", "value"), (WIDTH, WIDTH)) | {"up": (WIDTH, 32), "down": (32, WIDTH)}
        return {"head": (WIDTH, int(self.arguments[1]))}

    @property
    def num_tokens(self) -> int:
        return (int(self.arguments[0]) // PATCH) ** 2

    @property
    def input(self) -> tuple[str, int, list[int]]:
        if self.kind in STEMS:
            size = int(self.arguments[0])
            return "image", generation_pb2.DATA_TYPE_UINT8, [size, size, 3]
        return "hidden", generation_pb2.DATA_TYPE_FLOAT32, [-1, WIDTH]

    @property
    def output(self) -> tuple[str, int, list[int]]:
        if self.kind == "head":
            return "logits", generation_pb2.DATA_TYPE_FLOAT32, [int(self.arguments[1])]
        return "hidden_out", generation_pb2.DATA_TYPE_FLOAT32, [self.num_tokens if self.kind in STEMS else -1, WIDTH]

    def compute(self, x: np.ndarray) -> np.ndarray:
        w = {name: value.astype(np.float64) for name, value in self.weights.items()}
        if self.kind in STEMS:
            side = int(self.arguments[0]) // PATCH
            scaled = x.astype(np.float64) / 127.5 - 1
            patches = scaled.reshape(-1, side, PATCH, side, PATCH * 3).transpose(0, 1, 3, 2, 4)
            return patches.reshape(-1, side * side, PATCH * PATCH * 3) @ w["embed"] + w["position"]
        if self.kind == "block":
            scores = (x @ w["query"]) @ (x @ w["key"]).transpose(0, 2, 1)
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            x = x + scores / scores.sum(axis=-1, keepdims=True) @ (x @ w["value"])
            return np.asarray(x + np.tanh(x @ w["up"]) @ w["down"])
        return np.asarray(x[:, 0] @ w["head"])

    def to_onnx(self) -> bytes:
        nodes = {"stem": self._stem, "trap": self._trap, "void": self._void, "block": self._block, "head": self._head}[
            self.kind
        ]()
        constants = [numpy_helper.from_array(value, name) for name, value in (self.weights | self._constants()).items()]
        graph = helper.make_graph(nodes, "segment", [_value_info(self.input)], [_value_info(self.output)], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_name="tests")
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))

    def _constants(self) -> dict[str, np.ndarray]:
        if self.kind in STEMS:
            side = int(self.arguments[0]) // PATCH
            return {
                "scale": np.array(127.5, np.float32),
                "one": np.array(1, np.float32),
                "cut": np.array([-1, side, PATCH, side, PATCH * 3], np.int64),
                "flat": np.array([-1, side * side, PATCH * PATCH * 3], np.int64),
                "one_axis": np.array([1], np.int64),
                "column_shape": np.array([-1, 1, 1], np.int64),
                "origin": np.array(0, np.int64),
                "table": np.zeros((200, 1), np.float32),
                "limit": np.array(199.5, np.float32),
                "nought": np.array(0, np.float32),
            }
        return {"zero": np.array(0, np.int64)} if self.kind == "head" else {}

    def _stem(self) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["float", "scale"], ["divided"]),
            helper.make_node("Sub", ["divided", "one"], ["scaled"]),
            helper.make_node("Reshape", ["scaled", "cut"], ["patches"]),
            helper.make_node("Transpose", ["patches"], ["ordered"], perm=[0, 1, 3, 2, 4]),
            helper.make_node("Reshape", ["ordered", "flat"], ["tokens"]),
            helper.make_node("MatMul", ["tokens", "embed"], ["embedded"]),
            helper.make_node("Add", ["embedded", "position"], ["hidden_out"]),
        ]

    def _void(self) -> list[onnx.NodeProto]:
        *stem, last = self._stem()
        last.output[0] = "placed"
        return [
            *stem,
            last,
            helper.make_node("Gather", ["image", "origin"], ["row"], axis=1),
            helper.make_node("Gather", ["row", "origin"], ["pixel"], axis=1),
            helper.make_node("Gather", ["pixel", "origin"], ["byte"], axis=1),
            helper.make_node("Cast", ["byte"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["limit", "number"], ["room"]),
            helper.make_node("Log", ["room"], ["log"]),
            helper.make_node("Mul", ["log", "nought"], ["nothing"]),
            helper.make_node("Reshape", ["nothing", "column_shape"], ["column"]),
            helper.make_node("Add", ["placed", "column"], ["hidden_out"]),
        ]

    def _trap(self) -> list[onnx.NodeProto]:
        *stem, last = self._stem()
        last.output[0] = "placed"
        return [
            *stem,
            last,
            helper.make_node("Gather", ["image", "origin"], ["row"], axis=1),
            helper.make_node("Gather", ["row", "origin"], ["pixel"], axis=1),
            helper.make_node("Gather", ["pixel", "origin"], ["byte"], axis=1),
            helper.make_node("Cast", ["byte"], ["index"], to=TensorProto.INT64),
            # Out of bounds from 200 on: nothing of the whole batch comes out then.
            helper.make_node("Gather", ["table", "index"], ["nothing"], axis=0),
            helper.make_node("Unsqueeze", ["nothing", "one_axis"], ["column"]),
            helper.make_node("Add", ["placed", "column"], ["hidden_out"]),
        ]

    def _block(self) -> list[onnx.NodeProto]:
        return [
            helper.make_node("MatMul", ["hidden", "query"], ["q"]),
            helper.make_node("MatMul", ["hidden", "key"], ["k"]),
            helper.make_node("MatMul", ["hidden", "value"], ["v"]),
            helper.make_node("Transpose", ["k"], ["k_turned"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["q", "k_turned"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["attention"], axis=-1),
            helper.make_node("MatMul", ["attention", "v"], ["mixed"]),
            helper.make_node("Add", ["hidden", "mixed"], ["attended"]),
            helper.make_node("MatMul", ["attended", "up"], ["wide"]),
            helper.make_node("Tanh", ["wide"], ["bent"]),
            helper.make_node("MatMul", ["bent", "down"], ["narrow"]),
            helper.make_node("Add", ["attended", "narrow"], ["hidden_out"]),
        ]

    def _head(self) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Gather", ["hidden", "zero"], ["first"], axis=1),
            helper.make_node("MatMul", ["first", "head"], ["logits"]),
        ]


def _value_info(spec: tuple[str, int, list[int]]) -> onnx.ValueInfoProto:
    name, data_type, shape = spec
    element = TensorProto.UINT8 if data_type == generation_pb2.DATA_TYPE_UINT8 else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, element, ["batch", *("tokens" if size < 0 else size for size in shape)])


def answer(plan: TaskPlan, images: np.ndarray) -> np.ndarray:
    """Returns what a task's route must answer, computed by numpy in float64: [images, classes]."""
    x = images
    for key in plan.route:
        x = Layer(key).compute(x)
    return x


def random_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Returns images whose first byte stays below 200, so that they are no trap."""
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images[:, 0, 0, 0] //= 2
    return images


class RepositoryBuilder:
    """Publishes generations into a folder as the exporter does."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.root.mkdir(parents=True, exist_ok=True)

    def publish(self, tasks: Mapping[str, TaskPlan] = TASKS, number: int | None = None, current: bool = True) -> int:
        """Publishes these tasks and makes them current; returns the generation's number."""
        number = number or self.newest() + 1
        message = generation_pb2.Generation(format=1, number=number, previous=self.newest(), system_id="tests", exporter="tests")
        segments = {key: self._publish_segment(key) for key in sorted({key for plan in tasks.values() for key in plan.route})}
        message.segments.extend(sorted(segments.values(), key=lambda segment: segment.name))
        files = {
            path for segment in segments.values() for path in (f"{segment.name}/1/model.onnx", f"{segment.name}/config.pbtxt")
        }
        for name, plan in sorted(tasks.items()):
            route = [segments[key] for key in plan.route]
            ensemble = self._publish_ensemble(f"{name}.", {"logits": (plan, route)})
            golden, path = self._publish_golden(plan)
            files |= {f"{ensemble}/config.pbtxt", f"{ensemble}/labels.txt", path}
            message.tasks.append(self._task(name, plan, route, ensemble, golden))
        for size in sorted({plan.image_size for plan in tasks.values()}):
            of_size = {name: plan for name, plan in sorted(tasks.items()) if plan.image_size == size}
            outputs = {f"logits_{name}": (plan, [segments[key] for key in plan.route]) for name, plan in of_size.items()}
            ensemble = self._publish_ensemble(f"all-{size}.", outputs)
            message.multi_task_ensembles.add(image_size=size, name=ensemble, tasks=sorted(of_size))
            files |= {path.relative_to(self.root).as_posix() for path in (self.root / ensemble).iterdir() if path.is_file()}
        for path in sorted(files):
            message.files.append(self._file(path))
        self.write_manifest(message)
        if current:
            self.set_current(number)
            for task in message.tasks:
                self._publish_alias(task)
        return number

    def newest(self) -> int:
        return max((int(path.stem.split("-")[1]) for path in self.root.glob("generation-*.json")), default=0)

    def set_current(self, number: int) -> None:
        temporary = self.root / ".CURRENT.tmp"
        temporary.write_text(f"{number}\n")
        temporary.replace(self.root / "CURRENT")

    def set_canary(self, number: int, percent: float, **percent_of_task: float) -> None:
        canary = generation_pb2.Canary(generation=number, percent=percent, percent_of_task=percent_of_task)
        temporary = self.root / ".CANARY.tmp"
        temporary.write_text(json_format.MessageToJson(canary))
        temporary.replace(self.root / "CANARY")

    def read_manifest(self, number: int) -> generation_pb2.Generation:
        text = (self.root / f"generation-{number}.json").read_text()
        return json_format.Parse(text, generation_pb2.Generation())

    def write_manifest(self, message: generation_pb2.Generation) -> None:
        path = self.root / f"generation-{message.number}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json_format.MessageToJson(message))
        temporary.replace(path)

    def edit(self, number: int, change: Callable[[generation_pb2.Generation], Any]) -> None:
        """Changes a generation's file."""
        message = self.read_manifest(number)
        change(message)
        self.write_manifest(message)

    def edit_json(self, number: int, values: dict[str, object]) -> None:
        path = self.root / f"generation-{number}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def replace_file(self, number: int, path: str, content: bytes) -> None:
        """Replaces a file's content and mends the checksum: the file is wrong, yet what was published."""
        (self.root / path).write_bytes(content)

        def change(message: generation_pb2.Generation) -> None:
            for file in message.files:
                if file.path == path:
                    file.CopyFrom(self._file(path))

        self.edit(number, change)

    def edit_config(self, number: int, model: str, change: Callable[[Any], Any]) -> None:
        """Changes a model's Triton config and mends the checksum."""
        path = f"{model}/config.pbtxt"
        config = text_format.Parse((self.root / path).read_text(), triton.ModelConfig())
        change(config)
        self.replace_file(number, path, text_format.MessageToString(config).encode())

    def alter(self, path: str) -> None:
        """Turns one bit of a file, leaving size and checksum as they were."""
        file = self.root / path
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def _file(self, path: str) -> generation_pb2.File:
        content = (self.root / path).read_bytes()
        return generation_pb2.File(path=path, sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))

    def _write(self, path: str, content: bytes) -> None:
        file = self.root / path
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
            temporary.write_bytes(content)
            temporary.replace(file)

    def _publish_segment(self, key: str) -> generation_pb2.Segment:
        layer = Layer(key)
        model = layer.to_onnx()
        segment = generation_pb2.Segment(
            name="seg-" + hashlib.sha256(model).hexdigest()[:12],
            units=[generation_pb2.Unit(layer_ids=[key])],
            input=_spec(layer.input),
            output=_spec(layer.output),
            max_batch_size=MAX_BATCH_SIZE,
            num_parameters=sum(value.size for value in layer.weights.values()),
        )
        config = triton.ModelConfig(name=segment.name, backend="onnxruntime", max_batch_size=MAX_BATCH_SIZE)
        config.input.add(name=layer.input[0], data_type=_triton_type(layer.input[1]), dims=layer.input[2])
        config.output.add(name=layer.output[0], data_type=_triton_type(layer.output[1]), dims=layer.output[2])
        config.instance_group.add(kind=triton.ModelInstanceGroup.KIND_CPU, count=1)
        config.dynamic_batching.SetInParent()
        self._write(f"{segment.name}/1/model.onnx", model)
        self._write(f"{segment.name}/config.pbtxt", text_format.MessageToString(config).encode())
        return segment

    def _publish_ensemble(self, prefix: str, outputs: Mapping[str, tuple[TaskPlan, Sequence[generation_pb2.Segment]]]) -> str:
        config = triton.ModelConfig(platform="ensemble", max_batch_size=MAX_BATCH_SIZE)
        size = next(iter(outputs.values()))[0].image_size
        config.input.add(name="image", data_type=triton.TYPE_UINT8, dims=[size, size, 3])
        known: dict[tuple[str, ...], str] = {}
        labels: dict[str, bytes] = {}
        for output, (plan, route) in outputs.items():
            label_file = output.replace("logits", "labels") + ".txt"
            labels[label_file] = "".join(f"{label}\n" for label in plan.labels).encode()
            config.output.add(name=output, data_type=triton.TYPE_FP32, dims=[len(plan.labels)], label_filename=label_file)
            tensor, names = "image", tuple(segment.name for segment in route)
            for index, segment in enumerate(route, start=1):
                given = output if index == len(route) else known.get(names[:index], "-".join(names[:index]))
                if index == len(route) or names[:index] not in known:
                    step = config.ensemble_scheduling.step.add(model_name=segment.name, model_version=-1)
                    step.input_map[segment.input.name] = tensor
                    step.output_map[segment.output.name] = given
                    known[names[:index]] = given
                tensor = given
        digest = hashlib.sha256(config.SerializeToString(deterministic=True) + b"".join(labels.values())).hexdigest()[:12]
        name = config.name = prefix + digest
        self._write(f"{name}/config.pbtxt", text_format.MessageToString(config).encode())
        (self.root / name / "1").mkdir(exist_ok=True)
        for file, content in labels.items():
            self._write(f"{name}/{file}", content)
        return name

    def _publish_golden(self, plan: TaskPlan) -> tuple[np.ndarray, str]:
        images = random_images(NUM_GOLDEN, plan.image_size, seed=plan.image_size)
        path = f"golden-{plan.image_size}.{hashlib.sha256(images.tobytes()).hexdigest()[:12]}.npy"
        if not (self.root / path).exists():
            np.save(self.root / path, images)
        return answer(plan, images), path

    def _task(
        self, name: str, plan: TaskPlan, route: Sequence[generation_pb2.Segment], ensemble: str, golden: np.ndarray
    ) -> generation_pb2.Task:
        task = generation_pb2.Task(
            name=name,
            path_id=hashlib.sha256("/".join(plan.route).encode()).hexdigest()[:16],
            route=[segment.name for segment in route],
            ensemble=ensemble,
            labels=plan.labels,
            preprocessing=generation_pb2.Preprocessing(version=preprocessing.VERSION, image_size=plan.image_size),
            quality=0.75,
            test_accuracy=0.5,
            num_parameters=sum(segment.num_parameters for segment in route),
        )
        images = random_images(NUM_GOLDEN, plan.image_size, seed=plan.image_size)
        task.golden.images = f"golden-{plan.image_size}.{hashlib.sha256(images.tobytes()).hexdigest()[:12]}.npy"
        task.golden.logits.extend(golden.astype(np.float32).reshape(-1).tolist())
        task.golden.tolerance = TOLERANCE
        return task

    def _publish_alias(self, task: generation_pb2.Task) -> None:
        config = text_format.Parse((self.root / task.ensemble / "config.pbtxt").read_text(), triton.ModelConfig())
        config.name = task.name
        self._write(f"{task.name}/config.pbtxt", text_format.MessageToString(config).encode())
        self._write(f"{task.name}/labels.txt", (self.root / task.ensemble / "labels.txt").read_bytes())
        (self.root / task.name / "1").mkdir(exist_ok=True)


def _spec(spec: tuple[str, int, list[int]]) -> generation_pb2.TensorSpec:
    name, data_type, shape = spec
    return generation_pb2.TensorSpec(name=name, data_type=data_type, shape=shape)  # type: ignore[arg-type]


def _triton_type(data_type: int) -> int:
    return triton.TYPE_UINT8 if data_type == generation_pb2.DATA_TYPE_UINT8 else triton.TYPE_FP32
