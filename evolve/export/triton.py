"""Triton configurations of segments and ensembles, built through Triton's own ModelConfig message, and the files beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from evolve.export.settings import Target
from munet.v1 import generation_pb2

VERSION_FOLDER = "1"
"""The one version that every model has; empty for an ensemble."""

CONFIG_FILE = "config.pbtxt"

_DATA_TYPES = {
    generation_pb2.DATA_TYPE_UINT8: model_config_pb2.TYPE_UINT8,
    generation_pb2.DATA_TYPE_FLOAT32: model_config_pb2.TYPE_FP32,
    generation_pb2.DATA_TYPE_FLOAT16: model_config_pb2.TYPE_FP16,
}


@dataclasses.dataclass(frozen=True)
class RoutedTask:
    """A task as ensembles see it.

    Attributes:
        name: of the task.
        route: its segments in the order they run.
        labels: class names in the order of the logits.
    """

    name: str
    route: tuple[generation_pb2.Segment, ...]
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """A Triton model that consists of steps through segments.

    Attributes:
        name: of its folder.
        files: content by name within the folder; the empty version folder comes with it.
    """

    name: str
    files: Mapping[str, bytes]

    def renamed(self, name: str) -> Ensemble:
        """Returns the same ensemble under another name."""
        config = text_format.Parse(self.files[CONFIG_FILE].decode(), model_config_pb2.ModelConfig())
        config.name = name
        return Ensemble(name, {**self.files, CONFIG_FILE: _to_text(config)})


def segment_config(segment: generation_pb2.Segment, target: Target, response_cache: bool = False) -> bytes:
    """Returns the config.pbtxt of a segment.

    Args:
        segment: which.
        target: where Triton is to run it.
        response_cache: whether Triton may keep its answers, if it takes the image.
    """
    kind = model_config_pb2.ModelInstanceGroup.KIND_GPU if target == "gpu" else model_config_pb2.ModelInstanceGroup.KIND_CPU
    config = model_config_pb2.ModelConfig(
        name=segment.name,
        backend="onnxruntime",
        max_batch_size=segment.max_batch_size,
        input=[model_config_pb2.ModelInput(**_tensor(segment.input))],
        output=[model_config_pb2.ModelOutput(**_tensor(segment.output))],
        instance_group=[model_config_pb2.ModelInstanceGroup(kind=kind, count=1)],
        # Without a queue delay: it would be paid again at every step of a route.
        dynamic_batching=model_config_pb2.ModelDynamicBatching(),
    )
    if response_cache and segment.input.data_type == generation_pb2.DATA_TYPE_UINT8:
        config.response_cache.enable = True
    if target == "gpu":
        # ONNX Runtime multiplies float32 matrices in TF32 unless told otherwise: too coarse for the golden logits.
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        accelerator.parameters["use_tf32"] = "0"
        if generation_pb2.DATA_TYPE_FLOAT16 in (segment.input.data_type, segment.output.data_type):
            # Its fused norm added up squares in float16 before version 1.28.
            accelerator.parameters["enable_skip_layer_norm_strict_mode"] = "1"
    return _to_text(config)


def task_ensemble(task: RoutedTask) -> Ensemble:
    """Returns `<task>.<hash>`: input `image`, output `logits`; the hash covers route and labels."""
    return _ensemble(task.name + ".", [task], {task.name: ("logits", "labels.txt")})


def multi_task_ensemble(image_size: int, tasks: Sequence[RoutedTask]) -> Ensemble:
    """Returns `all-<size>.<hash>`: input `image`, an output `logits_<task>` for each task.

    What several routes share from the image on is one step, and Triton skips steps that no requested output needs.

    Args:
        image_size: height and width that all these tasks take, in pixels.
        tasks: one or more, in ascending order of name.
    """
    return _ensemble(
        f"all-{image_size}.", tasks, {task.name: (f"logits_{task.name}", f"labels_{task.name}.txt") for task in tasks}
    )


def _ensemble(prefix: str, tasks: Sequence[RoutedTask], outputs: Mapping[str, tuple[str, str]]) -> Ensemble:
    """Builds an ensemble; `outputs` gives each task's output tensor and label file."""
    first = tasks[0].route[0]
    config = model_config_pb2.ModelConfig(
        platform="ensemble",
        max_batch_size=first.max_batch_size,
        input=[model_config_pb2.ModelInput(**_tensor(first.input))],
    )
    for task in tasks:
        output, label_file = outputs[task.name]
        tensor = {**_tensor(task.route[-1].output), "name": output}
        config.output.append(model_config_pb2.ModelOutput(**tensor, label_filename=label_file))
    _add_steps(config, tasks, {task: output for task, (output, _) in outputs.items()})
    files = {outputs[task.name][1]: _label_file(task.labels) for task in tasks}
    files[CONFIG_FILE] = _to_text(config)
    content = json.dumps([[name, files[name].decode()] for name in sorted(files)])
    unnamed = Ensemble("", files)
    return unnamed.renamed(prefix + hashlib.sha256(content.encode()).hexdigest()[:12])


def _add_steps(config: Any, tasks: Sequence[RoutedTask], outputs: Mapping[str, str]) -> None:
    hidden: dict[tuple[str, ...], str] = {}
    for task in tasks:
        tensor = config.input[0].name
        names = tuple(segment.name for segment in task.route)
        for length, segment in enumerate(task.route, start=1):
            prefix = names[:length]
            known = hidden.get(prefix)
            if known is None:
                # Two tasks may end in the same head; an output can be named only once, so each task has a last step of its own.
                produced = outputs[task.name] if length == len(names) else hidden.setdefault(prefix, f"hidden_{len(hidden)}")
                config.ensemble_scheduling.step.append(
                    model_config_pb2.ModelEnsembling.Step(
                        model_name=segment.name,
                        model_version=-1,
                        input_map={segment.input.name: tensor},
                        output_map={segment.output.name: produced},
                    )
                )
                tensor = produced
            else:
                tensor = known


def _tensor(spec: generation_pb2.TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": _DATA_TYPES[spec.data_type], "dims": list(spec.shape)}


def _label_file(labels: Sequence[str]) -> bytes:
    # One line each: a line break within a label would shift all that follow.
    return "".join(re.sub(r"[\r\n]+", " ", label) + "\n" for label in labels).encode()


def _to_text(config: Any) -> bytes:
    return text_format.MessageToString(config).encode()
