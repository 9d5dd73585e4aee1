"""What must hold between the parts of a generation: names, the shapes along every route, and Triton's configs.

Each function returns every fault it finds rather than stopping at the first.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterator

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

from munet import preprocessing
from munet.names import check_task_name
from munet.parity import tolerance_of
from munet.v1 import generation_pb2
from server.errors import Finding
from server.generation import Generation, Segment, Task, TensorSpec, shapes_agree

MAX_IMAGE_SIZE = 8192
"""Greatest height and width, in pixels, that a route may take."""

_SEGMENT_NAME = re.compile(r"seg-[0-9a-f]{12}")
_CONFIG_FIELDS = frozenset(
    {
        "name",
        "backend",
        "platform",
        "max_batch_size",
        "input",
        "output",
        "instance_group",
        "dynamic_batching",
        "ensemble_scheduling",
        "optimization",
        "response_cache",
    }
)
"""What a published config may say. Others name files and libraries that a Triton would read or run: custom operators, agents, warm-ups."""

_BACKENDS = (("onnxruntime", ""), ("onnxruntime", "onnxruntime_onnx"), ("", "onnxruntime_onnx"))
"""Backend and platform of a segment. Of the two, Triton heeds the backend."""

_TRITON_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}


class ConfigCache:
    """Configs already parsed, by path and checksum: files named by content are parsed once."""

    def __init__(self) -> None:
        self._configs: dict[tuple[str, str], ModelConfig] = {}

    def read(self, root: pathlib.Path, path: str, sha256: str) -> ModelConfig:
        """Returns the config at a path relative to the root.

        Raises:
            OSError, UnicodeDecodeError, text_format.ParseError: it cannot be read, or is no ModelConfig.
        """
        config = self._configs.get((path, sha256))
        if config is None:
            config = parse_config(root / path)
            self._configs[path, sha256] = config
        return config

    def keep(self, files: dict[str, str]) -> None:
        """Forgets the configs that a generation with these files (path -> sha256) does not have."""
        self._configs = {key: config for key, config in self._configs.items() if files.get(key[0]) == key[1]}


def parse_config(path: pathlib.Path) -> ModelConfig:
    """Returns a config.pbtxt as Triton's own message.

    Raises:
        OSError, UnicodeDecodeError, text_format.ParseError: it cannot be read, or is no ModelConfig.
    """
    config = ModelConfig()
    text_format.Parse(path.read_text(encoding="utf-8"), config)
    return config


def check_names(message: generation_pb2.Generation) -> list[Finding]:
    """Checks what can be said of tasks and segments without looking at other files."""
    findings: list[Finding] = []
    known = set()
    for segment in message.segments:
        where = f"segment {segment.name!r}"
        if not _SEGMENT_NAME.fullmatch(segment.name):
            findings.append(Finding(where, "this name", "`seg-` and 12 hex digits"))
        if segment.name in known:
            findings.append(Finding(where, "it twice", "each segment once"))
        if segment.max_batch_size < 1:
            findings.append(Finding(f"{where}: max_batch_size", repr(segment.max_batch_size), "at least 1"))
        known.add(segment.name)
    names = set()
    for task in message.tasks:
        if task.name in names:
            findings.append(Finding(f"task {task.name!r}", "it twice", "each task once"))
        names.add(task.name)
        findings += _check_task(task, known)
    return findings + _check_multi_task_ensembles(message)


def _check_multi_task_ensembles(message: generation_pb2.Generation) -> list[Finding]:
    findings = []
    sizes = {task.name: task.preprocessing.image_size for task in message.tasks}
    # Each size once, so that whoever asks several tasks knows whom.
    unanswered = set(sizes.values())
    for ensemble in message.multi_task_ensembles:
        where, size = f"multi-task ensemble {ensemble.name!r}", ensemble.image_size
        if not ensemble.name.startswith(f"all-{size}."):
            findings.append(Finding(where, "this name", f"'all-{size}.' and a hash"))
        if size not in unanswered:
            findings.append(Finding(where, f"image size {size}", "each image size of the tasks once"))
        unanswered.discard(size)
        findings += [Finding(where, f"task {name!r}", "tasks of this generation") for name in ensemble.tasks if name not in sizes]
        missing = sorted(name for name in sizes if sizes[name] == size and name not in ensemble.tasks)
        if missing:
            findings.append(Finding(where, f"no task {missing[0]!r}", f"all tasks of {size} pixels"))
    findings += [
        Finding(f"tasks of {size} pixels", "no multi-task ensemble", f"'all-{size}.' and a hash") for size in sorted(unanswered)
    ]
    return findings


def _check_task(task: generation_pb2.Task, segments: set[str]) -> Iterator[Finding]:
    where = f"task {task.name!r}"
    try:
        check_task_name(task.name)
    except ValueError as error:
        yield Finding(where, str(error), "an allowed name")
    if not task.route:
        yield Finding(f"{where}: route", "none", "the segments its images run through")
    for name in task.route:
        if name not in segments:
            yield Finding(f"{where}: route", repr(name), "one of the generation's segments")
    if not task.ensemble.startswith(f"{task.name}."):
        yield Finding(f"{where}: ensemble", repr(task.ensemble), f"'{task.name}.' and a hash")
    if not task.labels:
        yield Finding(f"{where}: labels", "none", "a name for each class")
    if len(set(task.labels)) != len(task.labels):
        yield Finding(f"{where}: labels", "a name twice", "distinct names")
    version = task.preprocessing.version
    if version != preprocessing.VERSION:
        advice = "update this server" if version > preprocessing.VERSION else "publish again"
        yield Finding(f"{where}: preprocessing.version", repr(version), str(preprocessing.VERSION), advice)
    if not 1 <= task.preprocessing.image_size <= MAX_IMAGE_SIZE:
        yield Finding(f"{where}: image_size", repr(task.preprocessing.image_size), f"1 to {MAX_IMAGE_SIZE} pixels")
    yield from _check_golden(where, task)


def _check_golden(where: str, task: generation_pb2.Task) -> Iterator[Finding]:
    golden = task.golden
    if not golden.images:
        yield Finding(f"{where}: golden.images", "none", "the path of its golden images")
    if not golden.logits or (task.labels and len(golden.logits) % len(task.labels)):
        expected = f"a multiple of its {len(task.labels)} classes"
        yield Finding(f"{where}: golden.logits", f"{len(golden.logits)} values", expected)
    if not (math.isfinite(golden.tolerance) and golden.tolerance > 0):
        yield Finding(f"{where}: golden.tolerance", repr(golden.tolerance), "a number above 0, such as 1e-4")


def check_routes(generation: Generation) -> list[Finding]:
    """Checks that shapes and types chain along every route, from the task's image to its logits."""
    findings: list[Finding] = []
    for task in generation.tasks.values():
        where = f"task {task.name!r}: route"
        given = TensorSpec("image", "uint8", (task.image_size, task.image_size, 3))
        giver = "the image"
        for name in task.route:
            segment = generation.segments[name]
            if not segment.input.accepts(given):
                findings.append(Finding(f"{where}: segment {name!r}", f"input {segment.input}", f"what {giver} gives, {given}"))
            given = segment.output
            giver = repr(name)
        logits = TensorSpec("logits", "float32", (len(task.labels),))
        if given.shape != logits.shape or given.data_type not in ("float32", "float16"):
            findings.append(Finding(f"{where}: segment {giver}", f"output {given}", f"logits of its labels, {logits}"))
        if task.golden.logits.shape[1] != len(task.labels):
            findings.append(Finding(f"{where}: golden.logits", f"{task.golden.logits.shape[1]} classes", f"{len(task.labels)}"))
        types = {
            tensor.data_type
            for name in task.route
            for tensor in (generation.segments[name].input, generation.segments[name].output)
        }
        precision = "float16" if "float16" in types else "float32"
        most = tolerance_of(precision, task.golden.logits)
        # The generation holds the tolerance as a float32, which may lie above.
        if task.golden.tolerance > most * (1 + 1e-6):
            found, expected = f"{task.golden.tolerance:.3g}", f"at most {most:.3g} on a {precision} route"
            findings.append(Finding(f"task {task.name!r}: golden.tolerance", found, expected, "publish again"))
    return findings


def check_configs(
    message: generation_pb2.Generation, generation: Generation, root: pathlib.Path, cache: ConfigCache
) -> list[Finding]:
    """Checks every Triton config of a generation: it parses, and says of segments and routes what the generation says.

    Args:
        message: the generation as published.
        generation: the same, as it is to be served.
        root: the repository.
        cache: configs parsed before.
    """
    checksums = {file.path: file.sha256 for file in message.files}
    configs, findings = _read_configs(checksums, root, cache)
    segments = {name: configs[name] for name in generation.segments if name in configs}
    for name, config in segments.items():
        findings += check_segment_config(generation.segments[name], config)
    for task in message.tasks:
        if task.ensemble in configs:
            routes = {"logits": tuple(task.route)}
            findings += check_ensemble(task.ensemble, configs[task.ensemble], segments, routes)
            findings += _check_labels(task, configs[task.ensemble], root, set(checksums))
    for ensemble in message.multi_task_ensembles:
        if ensemble.name in configs:
            routes = {f"logits_{name}": generation.tasks[name].route for name in ensemble.tasks}
            findings += check_ensemble(ensemble.name, configs[ensemble.name], segments, routes)
    return findings


def _read_configs(
    checksums: dict[str, str], root: pathlib.Path, cache: ConfigCache
) -> tuple[dict[str, ModelConfig], list[Finding]]:
    """Returns the configs among these files by their models' names, and a finding for each that is none."""
    findings = []
    configs: dict[str, ModelConfig] = {}
    for path in sorted(checksums):
        if not path.endswith("/config.pbtxt"):
            continue
        name = path.removesuffix("/config.pbtxt")
        try:
            configs[name] = cache.read(root, path, checksums[path])
        except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
            findings.append(Finding(path, str(error)[:300], "a config.pbtxt of Triton (inference.ModelConfig)"))
            continue
        if configs[name].name not in ("", name):
            findings.append(Finding(f"{path}: name", repr(configs[name].name), f"{name!r} or none"))
        findings += check_fields(path, configs[name])
    cache.keep(checksums)
    return configs, findings


def check_fields(path: str, config: ModelConfig) -> Iterator[Finding]:
    """Checks that a config names nothing that a Triton would read or run beside its model.

    Args:
        path: where it stands.
        config: what it says.
    """
    for field, _ in config.ListFields():
        if field.name not in _CONFIG_FIELDS:
            yield Finding(f"{path}: {field.name}", "it there", f"only {', '.join(sorted(_CONFIG_FIELDS))}")
    accelerators = config.optimization.execution_accelerators
    for accelerator in (*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator):
        if accelerator.name != "cuda":
            yield Finding(f"{path}: optimization", f"the accelerator {accelerator.name[:80]!r}", "'cuda' or none")


def check_segment_config(segment: Segment, config: ModelConfig) -> Iterator[Finding]:
    """Checks a segment's config against what the generation says of it."""
    where = f"{segment.name}/config.pbtxt"
    if (config.backend, config.platform) not in _BACKENDS:
        yield Finding(f"{where}: backend", repr(config.backend or config.platform), "'onnxruntime'")
    if config.max_batch_size != segment.max_batch_size:
        yield Finding(f"{where}: max_batch_size", repr(config.max_batch_size), str(segment.max_batch_size))
    for kind, tensors, spec in (("input", config.input, segment.input), ("output", config.output, segment.output)):
        found = [(tensor.name, model_config_pb2.DataType.Name(tensor.data_type), tuple(tensor.dims)) for tensor in tensors]
        expected = [(spec.name, _TRITON_TYPES.get(spec.data_type, spec.data_type), spec.shape)]
        if found != expected:
            yield Finding(f"{where}: {kind}", repr(found), repr(expected))


def _check_labels(task: generation_pb2.Task, config: ModelConfig, root: pathlib.Path, listed: set[str]) -> Iterator[Finding]:
    where = f"{task.ensemble}/config.pbtxt"
    for output in config.output:
        path = f"{task.ensemble}/{output.label_filename}"
        if not output.label_filename or path not in listed:
            yield Finding(f"{where}: label_filename", repr(output.label_filename), "a file of the generation in the same folder")
            continue
        try:
            labels = (root / path).read_bytes().decode().removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            yield Finding(path, str(error), "a label on each line")
            continue
        # A label file holds one label a line, so a line break within a label is a space there.
        if labels != [re.sub(r"[\r\n]+", " ", label) for label in task.labels]:
            yield Finding(
                path, f"{len(labels)} labels, {labels[:3]!r} ...", f"the task's {len(task.labels)} labels in their order"
            )


def check_ensemble(
    name: str, config: ModelConfig, segments: dict[str, ModelConfig], routes: dict[str, tuple[str, ...]]
) -> Iterator[Finding]:
    """Checks an ensemble: each step's maps, the tensors' types and shapes, and which segments lead to each output.

    Args:
        name: the ensemble's.
        config: its config.
        segments: the segments' configs by name.
        routes: for each output it must have, the segments that lead to it from the image.
    """
    where = f"{name}/config.pbtxt"
    if config.backend or (config.platform != "ensemble" and not config.HasField("ensemble_scheduling")):
        yield Finding(f"{where}: platform", repr(config.backend or config.platform), "'ensemble', without a backend")
        return
    smallest = min((config_.max_batch_size for config_ in _used(config, segments)), default=1)
    if config.max_batch_size != smallest:
        yield Finding(f"{where}: max_batch_size", repr(config.max_batch_size), f"{smallest}, the least of its segments")
    if config.response_cache.enable:
        # Its name is kept by aliases, or its segments' answers may differ: Triton would go on answering what it kept.
        yield Finding(f"{where}: response_cache", "enabled", "a cache on segments only, whose names are of content")
    if [tensor.name for tensor in config.input] != ["image"]:
        yield Finding(f"{where}: input", repr([tensor.name for tensor in config.input]), "['image']")
        return
    flow = _Flow(where, config, segments)
    yield from flow.run()
    outputs = {tensor.name: tensor for tensor in config.output}
    if set(outputs) != set(routes):
        yield Finding(f"{where}: output", repr(sorted(outputs)), repr(sorted(routes)))
    for output in sorted(outputs.keys() & routes.keys()):
        if output not in flow.tensors:
            yield Finding(f"{where}: output {output!r}", "no step that gives it", "a step that maps an output to it")
            continue
        data_type, dims, history = flow.tensors[output]
        if history != routes[output]:
            yield Finding(f"{where}: output {output!r}", f"the route {list(history)}", repr(list(routes[output])))
        if outputs[output].data_type != data_type or not shapes_agree(tuple(outputs[output].dims), dims):
            yield Finding(
                f"{where}: output {output!r}", f"dims {list(outputs[output].dims)}", f"what its step gives, {list(dims)}"
            )


def check_alias(root: pathlib.Path, task: Task) -> list[Finding]:
    """Checks that a task's alias, `<task>`, is its ensemble under the task's name.

    Args:
        root: the repository.
        task: whose.
    """
    path = f"{task.name}/config.pbtxt"
    advice = "publish again"
    try:
        alias = parse_config(root / path)
        ensemble = parse_config(root / task.ensemble / "config.pbtxt")
        labels = {
            output.label_filename: (root / task.ensemble / output.label_filename).read_bytes() for output in ensemble.output
        }
        altered = [name for name, content in labels.items() if (root / task.name / name).read_bytes() != content]
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        return [Finding(path, str(error)[:300], f"{task.ensemble} under the task's name", advice)]
    findings = [Finding(f"{task.name}/{name}", "other labels", f"those of {task.ensemble}", advice) for name in altered]
    name = alias.name
    alias.name = ensemble.name = ""
    if name not in ("", task.name) or alias != ensemble:
        findings.append(Finding(path, "another config", f"{task.ensemble} under the task's name", advice))
    return findings


def _used(config: ModelConfig, segments: dict[str, ModelConfig]) -> list[ModelConfig]:
    return [segments[step.model_name] for step in config.ensemble_scheduling.step if step.model_name in segments]


class _Flow:
    """Follows an ensemble's tensors from its inputs through its steps, whatever order they stand in."""

    def __init__(self, where: str, config: ModelConfig, segments: dict[str, ModelConfig]) -> None:
        self._where = where
        self._config = config
        self._segments = segments
        self.tensors: dict[str, tuple[int, tuple[int, ...], tuple[str, ...]]] = {
            tensor.name: (tensor.data_type, tuple(tensor.dims), ()) for tensor in config.input
        }

    def run(self) -> Iterator[Finding]:
        waiting: list[tuple[int, model_config_pb2.ModelEnsembling.Step]] = []
        for index, step in enumerate(self._config.ensemble_scheduling.step):
            findings = list(self._check_maps(f"{self._where}: step[{index}]", step))
            yield from findings
            if not findings:
                waiting.append((index, step))
        progress = True
        while waiting and progress:
            later = []
            for index, step in waiting:
                if all(tensor in self.tensors for tensor in step.input_map.values()):
                    yield from self._follow(f"{self._where}: step[{index}]", step)
                else:
                    later.append((index, step))
            progress = len(later) < len(waiting)
            waiting = later
        for index, step in waiting:
            missing = sorted(set(step.input_map.values()) - self.tensors.keys())
            yield Finding(
                f"{self._where}: step[{index}]: input_map", repr(missing), "tensors that an input or another step gives"
            )

    def _check_maps(self, where: str, step: model_config_pb2.ModelEnsembling.Step) -> Iterator[Finding]:
        segment = self._segments.get(step.model_name)
        if segment is None:
            yield Finding(f"{where}: model_name", repr(step.model_name), "one of the generation's segments")
            return
        inputs = [tensor.name for tensor in segment.input]
        outputs = [tensor.name for tensor in segment.output]
        if len(inputs) != 1 or len(outputs) != 1:
            yield Finding(
                f"{where}: model_name", f"{step.model_name} with {len(inputs)} inputs, {len(outputs)} outputs", "one of each"
            )
        if sorted(step.input_map) != inputs:
            yield Finding(f"{where}: input_map", repr(sorted(step.input_map)), f"the inputs of {step.model_name}, {inputs}")
        if sorted(step.output_map) != outputs:
            yield Finding(f"{where}: output_map", repr(sorted(step.output_map)), f"the outputs of {step.model_name}, {outputs}")

    def _follow(self, where: str, step: model_config_pb2.ModelEnsembling.Step) -> Iterator[Finding]:
        segment = self._segments[step.model_name]
        taken, given = segment.input[0], segment.output[0]
        data_type, dims, history = self.tensors[step.input_map[taken.name]]
        if taken.data_type != data_type or not shapes_agree(dims, tuple(taken.dims)):
            found = f"{model_config_pb2.DataType.Name(data_type)} {list(dims)}"
            expected = f"{model_config_pb2.DataType.Name(taken.data_type)} {list(taken.dims)} for {step.model_name}"
            yield Finding(f"{where}: input_map", found, expected)
        name = step.output_map[given.name]
        if name in self.tensors:
            yield Finding(f"{where}: output_map", f"{name!r}, which is there already", "a name of its own for each tensor")
        self.tensors[name] = (given.data_type, tuple(given.dims), (*history, step.model_name))
