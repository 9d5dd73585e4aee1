from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from server.check import check
from server.embedded.engine import EmbeddedEngine
from server.repository import Repository
from tests.support.repository import DIGITS, VOID, RepositoryBuilder
from tests.support.serving import ENGINE


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish()
    return builder


@pytest.fixture
def engine() -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(ENGINE)
    yield engine
    assert engine.statistics() == []
    engine.close()


def findings(builder: RepositoryBuilder, engine: EmbeddedEngine) -> list[str]:
    return [str(finding) for finding in check(Repository(builder.root), engine)[1]]


def test_a_whole_repository_has_no_faults(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    generation, found = check(Repository(builder.root), engine)
    assert generation is not None
    assert found == []


def test_a_canary_is_checked_too(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    builder.publish({"digits": DIGITS}, current=False)
    builder.set_canary(2, 10)
    assert findings(builder, engine) == []
    builder.edit(2, lambda message: message.tasks[0].golden.logits.__setitem__(0, 99.0))
    (found,) = findings(builder, engine)
    assert found.startswith("canary 2: task 'digits': golden answer: found ")
    builder.set_canary(7, 10)
    (found,) = findings(builder, engine)
    assert found.startswith("canary 7: generation-7.json: found No such file")
    (builder.root / "CANARY").write_text("nonsense")
    (found,) = findings(builder, engine)
    assert found.endswith("end it with `munet-evolve canary --end`")
    # What a killed publisher left behind is no canary.
    builder.set_canary(1, 10)
    assert findings(builder, engine) == []


def test_every_alias_must_be_its_ensemble(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    (builder.root / "digits" / "config.pbtxt").unlink()
    (builder.root / "greek" / "config.pbtxt").write_bytes(b"nonsense")
    config = builder.root / "hebrew" / "config.pbtxt"
    config.write_text(config.read_text().replace('"hebrew"', '"other"'))
    (builder.root / "large" / "labels.txt").write_text("a\nb\nc\nd\n")
    found = findings(builder, engine)
    assert len(found) == 4
    assert [line.split("/")[0] for line in found] == ["digits", "greek", "hebrew", "large"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"opset": 26}, ["opset: found 26, expected at most 25"]),
        ({"ir_version": 99}, ["IR version: found 99, expected at most 13", "found .*Unsupported model IR version: 99"]),
    ],
)
def test_segments_too_new_for_a_container_of_triton_are_named(
    builder: RepositoryBuilder, engine: EmbeddedEngine, change: dict[str, int], expected: list[str]
) -> None:
    segment = builder.read_manifest(1).tasks[0].route[-1]
    model = onnx.load(builder.root / segment / "1" / "model.onnx")
    model.ir_version = change.get("ir_version", model.ir_version)
    model.opset_import[0].version = change.get("opset", model.opset_import[0].version)
    builder.replace_file(1, f"{segment}/1/model.onnx", model.SerializeToString())
    found = findings(builder, engine)
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.search(f"segment '{segment}'.*{pattern}", line)


def test_every_segment_onnx_runtime_refuses_is_named(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    route = builder.read_manifest(1).tasks[0].route
    for segment in route[:2]:
        builder.replace_file(1, f"{segment}/1/model.onnx", b"no model")
    found = findings(builder, engine)
    assert len(found) == 2
    assert all(any(segment in line for line in found) for segment in route[:2])


def test_every_wrong_golden_answer_is_named(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    def alter(message) -> None:
        message.tasks[0].golden.logits[0] += 1
        message.tasks[2].golden.logits[0] = float("nan")

    builder.edit(1, alter)
    found = findings(builder, engine)
    assert len(found) == 2
    assert "digits" in found[0]
    assert "a difference of 1" in found[0]
    assert "nan" in found[1]


def test_a_task_without_numbers_is_named_and_the_others_are_still_asked(
    builder: RepositoryBuilder, engine: EmbeddedEngine
) -> None:
    number = builder.publish({"digits": DIGITS, "void": VOID})
    path = builder.read_manifest(number).tasks[0].golden.images
    images = np.load(builder.root / path)
    images[0, 0, 0, 0] = 255
    np.save(builder.root / path, images)
    builder.replace_file(number, path, (builder.root / path).read_bytes())
    found = findings(builder, engine)
    assert len(found) == 2
    assert found[0].startswith("task 'digits': golden answer: found a difference of ")
    assert found[1].startswith("task 'void': golden answer: found segment ")
    assert "no numbers" in found[1]


def test_golden_images_that_are_none(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    path = builder.read_manifest(1).tasks[0].golden.images
    np.save(builder.root / path, np.zeros((4, 8, 8, 3), np.float32))
    builder.replace_file(1, path, (builder.root / path).read_bytes())
    assert any(path in line for line in findings(builder, engine))
    builder.replace_file(1, path, b"no array")
    assert any(path in line for line in findings(builder, engine))


def test_what_a_triton_would_find_and_nobody_published_is_named(
    builder: RepositoryBuilder, engine: EmbeddedEngine, tmp_path: pathlib.Path
) -> None:
    task = builder.read_manifest(1).tasks[0]
    segment = builder.root / task.route[0]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.onnx").write_bytes((segment / "1" / "model.onnx").read_bytes())
    # What a publisher is writing at the moment.
    (segment / "1" / ".model.onnx.abc.part").write_bytes(b"half")
    assert findings(builder, engine) == []
    (segment / "2").mkdir()
    (segment / "2" / "model.onnx").write_bytes(b"another")
    (segment / "3").symlink_to(outside)
    (segment / "1" / "model.py").write_text("import os")
    (builder.root / task.ensemble / "1" / "model.onnx").write_bytes(b"another")
    (builder.root / task.name / "2").mkdir()
    (builder.root / task.name / "old.txt").symlink_to("nowhere")
    found = findings(builder, engine)
    wheres = {line.partition(":")[0]: line for line in found}
    assert sorted(wheres) == sorted(
        [
            f"{segment.name}/1/model.py",
            f"{segment.name}/2",
            f"{segment.name}/2/model.onnx",
            f"{segment.name}/3",
            f"{task.ensemble}/1/model.onnx",
            f"{task.name}/2",
            f"{task.name}/old.txt",
        ]
    )
    assert "found a link to" in wheres[f"{segment.name}/3"]
    assert "found a link that leads nowhere" in wheres[f"{task.name}/old.txt"]
    assert "found what nobody published" in wheres[f"{segment.name}/2"]


def test_an_external_reference_is_a_fault_of_the_segment(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    segment = builder.read_manifest(1).tasks[0].route[0]
    model = onnx.load(builder.root / segment / "1" / "model.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    builder.replace_file(1, f"{segment}/1/model.onnx", model.SerializeToString())
    (found,) = findings(builder, engine)
    assert f"segment {segment!r}: found 1 references to what is outside the file" in found
