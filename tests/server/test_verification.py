"""Segments' and ensembles' Triton configs and routes' shapes: each contradiction is found, though every checksum is right."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2 as triton

from server.repository import Repository
from tests.support.repository import RepositoryBuilder


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish()
    return builder


def findings(builder: RepositoryBuilder) -> str:
    _, found = Repository(builder.root).inspect()
    return "\n".join(map(str, found))


def segment_of(builder: RepositoryBuilder, task: str, index: int) -> str:
    return next(t for t in builder.read_manifest(1).tasks if t.name == task).route[index]


def ensemble_of(builder: RepositoryBuilder, task: str) -> str:
    return next(t for t in builder.read_manifest(1).tasks if t.name == task).ensemble


def test_a_config_that_does_not_parse(builder: RepositoryBuilder) -> None:
    segment, ensemble = segment_of(builder, "digits", 0), ensemble_of(builder, "digits")
    builder.replace_file(1, f"{segment}/config.pbtxt", b'name: "x" nonsense {')
    builder.replace_file(1, f"{ensemble}/config.pbtxt", b"\xff\xfe")
    found = findings(builder)
    assert f"{segment}/config.pbtxt" in found
    assert f"{ensemble}/config.pbtxt" in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: setattr(c, "name", "other"), "name: found 'other'"),
        (lambda c: setattr(c, "backend", "python"), "backend"),
        (lambda c: setattr(c, "backend", "python") or setattr(c, "platform", "onnxruntime_onnx"), "backend: found 'python'"),
        (
            lambda c: setattr(c, "default_model_filename", "../../other.onnx"),
            "default_model_filename: found it there, expected only",
        ),
        (lambda c: setattr(c, "runtime", "libmine.so"), "runtime: found it there"),
        (lambda c: c.model_operations.op_library_filename.append("mine.so"), "model_operations: found it there"),
        (lambda c: c.model_repository_agents.agents.add(name="checksum"), "model_repository_agents: found it there"),
        (
            lambda c: c.model_warmup.add(name="a").inputs["x"].CopyFrom(triton.ModelWarmup.Input(input_data_file="/etc/passwd")),
            "model_warmup",
        ),
        (lambda c: c.parameters["x"].CopyFrom(triton.ModelParameter(string_value="y")), "parameters: found it there"),
        (
            lambda c: c.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt"),
            "optimization: found the accelerator 'tensorrt'",
        ),
        (lambda c: setattr(c, "max_batch_size", 4), "max_batch_size"),
        (lambda c: setattr(c.input[0], "name", "x"), "input"),
        (lambda c: setattr(c.input[0], "data_type", triton.TYPE_FP16), "input"),
        (lambda c: c.output[0].dims.append(3), "output"),
        (lambda c: c.ClearField("input"), "input"),
        (lambda c: c.output.add(name="more", data_type=triton.TYPE_FP32, dims=[1]), "output"),
    ],
)
def test_a_segments_config_that_is_not_what_the_generation_says(
    builder: RepositoryBuilder, change: Callable[[Any], Any], words: str
) -> None:
    segment = segment_of(builder, "digits", 1)
    builder.edit_config(1, segment, change)
    assert f"{segment}/config.pbtxt: {words}" in findings(builder)


def steps(config: Any) -> Any:
    return config.ensemble_scheduling.step


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: setattr(c, "platform", "") or c.ClearField("ensemble_scheduling"), "platform"),
        (lambda c: setattr(c, "backend", "python"), "platform: found 'python'"),
        (lambda c: c.model_operations.op_library_filename.append("mine.so"), "model_operations: found it there"),
        (lambda c: setattr(c, "max_batch_size", 99), "max_batch_size"),
        (lambda c: setattr(c, "max_batch_size", 4), "max_batch_size"),
        (lambda c: setattr(c.response_cache, "enable", True), "response_cache"),
        (lambda c: setattr(c.input[0], "name", "picture"), "input"),
        (lambda c: setattr(c.input[0], "data_type", triton.TYPE_FP32), "step[0]: input_map"),
        (lambda c: c.input[0].dims.__setitem__(0, 9), "step[0]: input_map"),
        (lambda c: setattr(steps(c)[0], "model_name", "seg-unknown"), "step[0]: model_name"),
        (lambda c: steps(c)[1].input_map.clear(), "step[1]: input_map"),
        (lambda c: steps(c)[1].input_map.__setitem__("more", "image"), "step[1]: input_map"),
        (lambda c: steps(c)[1].output_map.clear(), "step[1]: output_map"),
        (lambda c: steps(c)[1].input_map.__setitem__("hidden", "nowhere"), "['nowhere']"),
        (lambda c: steps(c)[1].output_map.__setitem__("hidden_out", "image"), "there already"),
        (lambda c: steps(c).pop(1), "input_map"),
        (lambda c: setattr(c.output[0], "name", "answers"), "output"),
        (lambda c: c.output[0].dims.__setitem__(0, 3), "output 'logits'"),
        (lambda c: setattr(c.output[0], "data_type", triton.TYPE_FP16), "output 'logits'"),
        (lambda c: setattr(c.output[0], "label_filename", ""), "label_filename"),
        (lambda c: setattr(c.output[0], "label_filename", "../x"), "label_filename"),
    ],
)
def test_an_ensemble_that_contradicts_its_segments(builder: RepositoryBuilder, change: Callable[[Any], Any], words: str) -> None:
    ensemble = ensemble_of(builder, "digits")
    builder.edit_config(1, ensemble, change)
    found = findings(builder)
    assert f"{ensemble}/config.pbtxt: " in found
    assert words in found


def test_an_ensemble_that_takes_another_route(builder: RepositoryBuilder) -> None:
    trunk, clone = segment_of(builder, "hebrew", 1), segment_of(builder, "digits", 1)
    ensemble = ensemble_of(builder, "hebrew")
    builder.edit_config(1, ensemble, lambda config: setattr(steps(config)[1], "model_name", clone))
    assert f"output 'logits': found the route ['{segment_of(builder, 'hebrew', 0)}', '{clone}'" in findings(builder)
    assert trunk != clone


def test_a_multi_task_ensemble_must_have_every_task(builder: RepositoryBuilder) -> None:
    name = builder.read_manifest(1).multi_task_ensembles[0].name
    builder.edit_config(1, name, lambda config: config.output.pop())
    assert f"{name}/config.pbtxt: output" in findings(builder)


def test_an_ensembles_steps_may_stand_in_any_order(builder: RepositoryBuilder) -> None:
    def reverse(config: Any) -> None:
        turned = list(reversed([type(step).FromString(step.SerializeToString()) for step in steps(config)]))
        config.ensemble_scheduling.ClearField("step")
        steps(config).extend(turned)

    builder.edit_config(1, ensemble_of(builder, "digits"), reverse)
    assert findings(builder) == ""


def test_labels_that_are_not_the_tasks(builder: RepositoryBuilder) -> None:
    path = f"{ensemble_of(builder, 'digits')}/labels.txt"
    builder.replace_file(1, path, b"a\nb\n")
    assert f"{path}: found 2 labels" in findings(builder)


def test_a_label_with_a_line_break(builder: RepositoryBuilder) -> None:
    ensemble = ensemble_of(builder, "digits")
    content = (builder.root / ensemble / "labels.txt").read_bytes()
    builder.edit(1, lambda message: message.tasks[0].labels.__setitem__(0, "digit\n0"))
    builder.replace_file(1, f"{ensemble}/labels.txt", content)
    assert findings(builder) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.tasks[0].route.reverse(), "the image gives"),
        (lambda m: m.tasks[0].route.pop(), "logits of its labels"),
        (lambda m: next(s for s in m.segments if s.input.name == "image").input.shape.__setitem__(0, 9), "the image gives"),
    ],
)
def test_routes_whose_shapes_do_not_chain(builder: RepositoryBuilder, change: Callable[[Any], Any], words: str) -> None:
    builder.edit(1, change)
    assert words in findings(builder)


def test_a_segment_between_that_takes_another_width(builder: RepositoryBuilder) -> None:
    segment = segment_of(builder, "digits", 2)

    def widen(message: Any) -> None:
        found = next(entry for entry in message.segments if entry.name == segment)
        found.input.shape[:] = [-1, 99]

    builder.edit(1, widen)
    assert f"segment '{segment}': found input float32 [-1, 99]" in findings(builder)
