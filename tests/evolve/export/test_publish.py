from __future__ import annotations

import dataclasses
import pathlib
import shutil
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import evolve.export.publish
from evolve.errors import ExportError
from evolve.export.onnx import export_segment
from evolve.export.parity import Routes, varied
from evolve.export.publish import export_system
from evolve.export.segments import Unit, segment_of
from evolve.export.settings import ExportSettings, exporter_version
from evolve.layer import HEAD, NORM
from evolve.path import Path, PlacedLayer
from evolve.store import System
from evolve.vit import reference_logits
from munet import preprocessing
from munet.parity import tolerance_of
from munet.v1 import generation_pb2
from tests.evolve.export.conftest import Published
from tests.evolve.export.whole import check_whole
from tests.evolve.export.whole import read_generation as generation
from tests.support.system import IMAGE_SIZE, TaskSketch, add_task, block_position, build_system

FEW = 8
"""Heads of random weights leave near ties that 1,000 images would meet; what many images must say is told in test_parity.py."""


def tree(repository: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    files = (file for file in sorted(repository.rglob("*")) if file.is_file() and file.name != ".publishing.lock")
    return {str(file.relative_to(repository)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def answers(repository: pathlib.Path, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    routes = Routes(lambda name: repository / name / "1" / "model.onnx")
    found = {}
    for task in generation(repository).tasks:
        if task.preprocessing.image_size == images.shape[1]:
            found[task.name] = routes.run(task.route, images)
    return found


def test_the_generation_says_all_about_the_system(pristine: Published) -> None:
    current = check_whole(pristine.repository)
    assert (current.format, current.number, current.previous) == (1, 1, 0)
    assert current.system_id == pristine.system.id
    assert current.exporter == exporter_version()
    assert current.created.seconds > 0
    records = pristine.system.tasks()
    assert [task.name for task in current.tasks] == sorted(records)
    assert [segment.name for segment in current.segments] == sorted(segment.name for segment in current.segments)
    used = {}
    for task in current.tasks:
        record, path = records[task.name], pristine.system.path(task.path_id)
        used.update({layer.id: layer.num_parameters for _, layer in path.layers})
        assert (task.path_id, tuple(task.labels), task.quality) == (record.path_id, record.labels, record.quality)
        assert (task.test_accuracy if task.HasField("test_accuracy") else None) == record.test_accuracy
        assert task.num_parameters == path.num_parameters
        assert (task.preprocessing.version, task.preprocessing.image_size) == (
            preprocessing.VERSION,
            path.hyperparameters.image_size,
        )
    assert sum(task.accounted_parameters for task in current.tasks) == pytest.approx(sum(used.values()), rel=1e-12)


def test_shared_segments_stand_there_once(pristine: Published) -> None:
    routes = {task.name: list(task.route) for task in generation(pristine.repository).tasks}
    assert {name: len(route) for name, route in routes.items()} == {"adapted": 5, "cloned": 5, "large": 5, "plain": 5, "short": 4}
    assert routes["plain"][:3] == routes["short"][:3]
    assert routes["plain"][0] == routes["cloned"][0] == routes["adapted"][0]
    assert routes["plain"][3] == routes["cloned"][3] == routes["adapted"][3] == routes["large"][3]
    assert routes["plain"][1] == routes["large"][1]
    # Two stems with block 0's own segment behind, three kinds of block 1, one block 2, five heads.
    assert len({name for route in routes.values() for name in route}) == 12


def test_routes_answer_what_torch_answers(pristine: Published) -> None:
    for task in generation(pristine.repository).tasks:
        size = task.preprocessing.image_size
        images = np.random.default_rng(5).integers(0, 256, (7, size, size, 3), dtype=np.uint8)
        expected = reference_logits(pristine.system.path(task.path_id), pristine.system.tensors, images)
        found = answers(pristine.repository, images)[task.name]
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_golden_logits_are_torchs_for_images_of_the_oldest_task_of_a_size(pristine: Published) -> None:
    current = generation(pristine.repository)
    for task in current.tasks:
        images = np.load(pristine.repository / task.golden.images)
        oldest = "plain" if task.preprocessing.image_size == IMAGE_SIZE else "large"
        np.testing.assert_array_equal(images, pristine.system.examples(pristine.system.tasks()[oldest])[:4])
        expected = reference_logits(pristine.system.path(task.path_id), pristine.system.tensors, images)
        np.testing.assert_allclose(np.array(task.golden.logits).reshape(4, -1), expected, atol=1e-5)
        assert task.golden.tolerance == pytest.approx(1e-4)


def test_publishing_the_same_again_changes_nothing(published: Published) -> None:
    before = tree(published.repository)
    result = export_system(published.system, published.repository)
    assert (result.changed, result.generation, result.new_segments, len(result.reused_segments)) == (False, 1, (), 12)
    assert tree(published.repository) == before


def test_a_task_that_splits_a_route_leaves_old_files_and_old_answers_as_they_were(tmp_path: pathlib.Path) -> None:
    system = build_system(tmp_path / "system", {"plain": TaskSketch(), "second": TaskSketch(classes=4)})
    repository = tmp_path / "repository"
    first = export_system(system, repository)
    images = np.random.default_rng(5).integers(0, 256, (9, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    old_answers, old_files = answers(repository, images), tree(repository)
    add_task(system, "splitter", TaskSketch(cloned=(block_position(1),)))
    second = export_system(system, repository)
    assert [len(task.route) for task in check_whole(repository).tasks] == [4, 4, 4]
    assert (len(first.new_segments), len(second.new_segments)) == (3, 5)
    new_answers, new_files = answers(repository, images), tree(repository)
    for task, old in old_answers.items():
        np.testing.assert_array_equal(new_answers[task], old)
    changing = {"CURRENT"} | {name for name in old_files if name.partition("/")[0] in ("plain", "second")}
    assert {name: new_files[name] for name in old_files if name not in changing} == {
        name: content for name, content in old_files.items() if name not in changing
    }
    np.testing.assert_allclose(
        new_answers["splitter"],
        reference_logits(system.path(system.tasks()["splitter"].path_id), system.tensors, images),
        rtol=0,
        atol=1e-4,
    )


def test_a_new_head_exports_only_what_is_new_and_golden_images_stay(published: Published) -> None:
    add_task(published.system, "another", TaskSketch(classes=6))
    before = generation(published.repository)
    result = export_system(published.system, published.repository)
    after = check_whole(published.repository)
    assert (result.generation, len(result.new_segments), len(result.reused_segments)) == (2, 1, 12)
    assert (after.number, after.previous) == (2, 1)
    old = {task.name: task for task in before.tasks}
    for task in after.tasks:
        if task.name in old:
            assert task.route == old[task.name].route
            assert task.golden == old[task.name].golden
            assert task.ensemble == old[task.name].ensemble


def test_a_removed_task_leaves_and_the_cuts_it_caused_stay(published: Published) -> None:
    before = {task.name: list(task.route) for task in generation(published.repository).tasks}
    published.system.remove_task("cloned")
    published.system.remove_task("adapted")
    published.system.remove_task("short")
    result = export_system(published.system, published.repository)
    assert result.new_segments == ()
    after = {task.name: list(task.route) for task in check_whole(published.repository).tasks}
    assert after == {name: before[name] for name in ("large", "plain")}
    assert not (published.repository / "cloned").exists()
    assert (published.repository / "plain" / "config.pbtxt").exists()


def test_a_damaged_segment_is_written_again(published: Published) -> None:
    before = tree(published.repository)
    name = generation(published.repository).tasks[0].route[2]
    model = published.repository / name / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    (published.repository / "plain" / "config.pbtxt").unlink()
    result = export_system(published.system, published.repository)
    assert (result.changed, result.new_segments) == (False, (name,))
    assert {path: data for path, (_, data) in tree(published.repository).items()} == {p: d for p, (_, d) in before.items()}


def test_another_target_makes_other_segments(published: Published) -> None:
    before = {segment.name for segment in generation(published.repository).segments}
    export_system(published.system, published.repository, target="gpu")
    after = check_whole(published.repository)
    assert before.isdisjoint(segment.name for segment in after.segments)
    config = (published.repository / after.segments[0].name / "config.pbtxt").read_text()
    assert "KIND_GPU" in config


def test_with_a_cache_only_what_takes_the_image_is_another_segment(published: Published) -> None:
    before = {task.name: list(task.route) for task in generation(published.repository).tasks}
    export_system(published.system, published.repository, response_cache=True)
    for task in check_whole(published.repository).tasks:
        assert task.route[0] != before[task.name][0]
        assert list(task.route[1:]) == before[task.name][1:]
        assert "response_cache" in (published.repository / task.route[0] / "config.pbtxt").read_text()
        assert "response_cache" not in (published.repository / before[task.name][0] / "config.pbtxt").read_text()


def test_float16_is_another_generation_beside_and_the_way_back_exports_nothing(published: Published) -> None:
    first = check_whole(published.repository)
    told: list[str] = []
    result = export_system(published.system, published.repository, precision="float16", num_top1_images=FEW, progress=told.append)
    half = check_whole(published.repository)
    assert (result.changed, half.number) == (True, 2)
    assert {segment.name for segment in half.segments}.isdisjoint(segment.name for segment in first.segments)
    assert {tensor.data_type for segment in half.segments for tensor in (segment.input, segment.output)} == {
        generation_pb2.DATA_TYPE_UINT8,
        generation_pb2.DATA_TYPE_FLOAT16,
        generation_pb2.DATA_TYPE_FLOAT32,
    }
    for old, new in zip(first.tasks, half.tasks, strict=True):
        assert (old.path_id, old.golden.logits, old.golden.images) == (new.path_id, new.golden.logits, new.golden.images)
        assert old.golden.tolerance == pytest.approx(1e-4)
        logits = np.array(new.golden.logits, dtype=np.float32).reshape(-1, len(new.labels))
        assert new.golden.tolerance == pytest.approx(tolerance_of("float16", logits))
        assert any("best classes are torch's" in line and new.name in line for line in told)
    # Every weight takes half the room but those of heads' biases.
    sizes = [sum(file.num_bytes for file in each.files if file.path.endswith("model.onnx")) for each in (first, half)]
    assert sizes[1] < 0.75 * sizes[0]
    images = np.random.default_rng(3).integers(0, 256, (9, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    rounded = answers(published.repository, images)
    assert not export_system(published.system, published.repository, precision="float16", num_top1_images=FEW).changed
    result = export_system(published.system, published.repository)
    assert (result.generation, result.new_segments) == (3, ())
    again = check_whole(published.repository)
    assert (again.segments, again.tasks, again.files) == (first.segments, first.tasks, first.files)
    for name, logits in answers(published.repository, images).items():
        difference = np.abs(logits - rounded[name]).max()
        assert 0 < difference <= 5e-2


def test_values_beyond_float16_are_refused_in_float16_alone(published: Published) -> None:
    # Attention scores of about a million: fine in float32, infinite in float16, and NaN after the softmax.
    record = add_task(published.system, "loud", TaskSketch(cloned=(block_position(0),)))
    path = published.system.path(record.path_id)
    layer = path.layer(block_position(0))
    tensors = {name: np.array(tensor) for name, tensor in published.system.tensors(layer.id).items()}
    tensors["attn.qkv.bias"][: 2 * 16] = 400.0
    loud = published.system.put_layer(layer.spec, tensors)
    layers = [PlacedLayer(position, loud if each is layer else each) for position, each in path.layers]
    changed = Path.of(
        task="loud", layers=layers, hyperparameters=path.hyperparameters, parent_id=path.parent_id, quality=path.quality
    )
    published.system.put_path(changed)
    published.system.put_task(dataclasses.replace(record, path_id=changed.id))
    before = tree(published.repository)
    with pytest.raises(ExportError, match=r"found values up to .* within the path of task 'loud'; expected at most 32752"):
        export_system(published.system, published.repository, precision="float16")
    assert tree(published.repository) == before
    assert export_system(published.system, published.repository).generation == 2


def test_weights_beyond_float16_are_refused_in_float16_alone(published: Published) -> None:
    record = add_task(published.system, "heavy", TaskSketch())
    path = published.system.path(record.path_id)
    head = path.layer(HEAD)
    tensors = {name: np.array(tensor) for name, tensor in published.system.tensors(head.id).items()}
    tensors["weight"][0, 0] = 1e5
    # A bias stays float32 and may be anything.
    tensors["bias"][:] = 1e5
    heavy = published.system.put_layer(head.spec, tensors)
    segment = segment_of([Unit((path.layer(NORM), heavy))], ExportSettings(precision="float16"))
    with pytest.raises(ExportError, match=r"found weights up to 100000 in weight of a head"):
        export_segment(segment, published.system.tensors, ExportSettings(precision="float16"))
    assert export_segment(segment, published.system.tensors, ExportSettings())


def test_only_the_last_three_generations_and_what_they_name_stay(published: Published) -> None:
    repository = published.repository
    keepsakes = [repository / "README.md", repository / "theirs" / "config.pbtxt", repository / "notes-1.json"]
    for file in keepsakes:
        file.parent.mkdir(exist_ok=True)
        file.write_text("theirs")
    first = {segment.name for segment in generation(repository).segments}
    for name in ("adapted", "large", "cloned"):
        published.system.remove_task(name)
        export_system(published.system, repository)
    assert sorted(file.name for file in repository.glob("generation-*.json")) == [f"generation-{n}.json" for n in (2, 3, 4)]
    kept = {segment.name for number in (2, 3, 4) for segment in generation(repository, number).segments}
    assert {folder.name for folder in repository.glob("seg-*")} == kept < first
    named = {file.path for number in (2, 3, 4) for file in generation(repository, number).files}
    ours = {name for name in tree(repository) if not name.startswith(("plain/", "short/"))} - {"CURRENT"}
    assert ours - {f"generation-{n}.json" for n in (2, 3, 4)} == named | {str(f.relative_to(repository)) for f in keepsakes}
    assert sorted(folder.name for folder in repository.iterdir() if folder.is_dir() and "." not in folder.name)[:1] == ["plain"]


def test_a_route_that_differs_from_torch_is_not_published(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(published.repository)
    add_task(published.system, "wrong", TaskSketch(cloned=(block_position(2),)))
    real = evolve.export.publish.export_segment

    def spoiled(segment: Any, tensors: Any, settings: Any) -> bytes:
        return real(segment, lambda layer: {name: 1.01 * values for name, values in tensors(layer).items()}, settings)

    monkeypatch.setattr(evolve.export.publish, "export_segment", spoiled)
    with pytest.raises(ExportError, match="a difference of .* between torch and the exported float32 route of task 'wrong'"):
        export_system(published.system, published.repository)
    assert tree(published.repository) == before


def test_logits_that_are_no_numbers_are_not_published(tmp_path: pathlib.Path) -> None:
    logits = np.full((1, 3), np.nan, dtype=np.float32)
    routes = Routes(lambda name: tmp_path / name)
    routes.run = lambda route, images: logits  # type: ignore[method-assign]
    with pytest.raises(ExportError, match="nan"):
        routes.check("t", ("seg-0",), np.zeros((1, 16, 16, 3), dtype=np.uint8), logits, (1,))


def test_a_model_that_onnx_runtime_refuses_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "seg-0").write_bytes(b"no model")
    with pytest.raises(ExportError, match="refused segment seg-0"):
        Routes(lambda name: tmp_path / name).run(("seg-0",), np.zeros((1, 16, 16, 3), dtype=np.uint8))


def test_an_empty_system_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ExportError, match="found no task"):
        export_system(build_system(tmp_path / "system", {}), tmp_path / "repository")


def test_a_repository_of_another_system_is_refused(published: Published, tmp_path: pathlib.Path) -> None:
    before = tree(published.repository)
    with pytest.raises(ExportError, match="one for each system"):
        export_system(build_system(tmp_path / "other", {"plain": TaskSketch()}), published.repository)
    assert tree(published.repository) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "generation-1.json",
            b'"format": 1',
            b'"format": 2',
            "format 2.*expected format 1; use the version of munet that wrote it",
        ),
        ("generation-1.json", b'"tasks"', b'"tusks"', "found no generation in .*tusks"),
        ("generation-1.json", b'"route": [', b'"route": ["seg-0", ', "names segments that it does not describe"),
        ("CURRENT", b"1", b"one", "found no number in"),
    ],
)
def test_a_repository_that_cannot_be_read_is_refused(
    published: Published, name: str, old: bytes, new: bytes, message: str
) -> None:
    file = published.repository / name
    file.write_bytes(file.read_bytes().replace(old, new))
    before = tree(published.repository)
    with pytest.raises(ExportError, match=message):
        export_system(published.system, published.repository)
    assert tree(published.repository) == before


def test_a_folder_that_cannot_be_written_is_refused(published: Published, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ExportError, match="could not publish to"):
        export_system(published.system, tmp_path / "file" / "repository")


@pytest.mark.parametrize("file", ["model.onnx", "config.pbtxt", "generation-2.json"])
def test_a_full_disk_leaves_what_was_there(published: Published, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    before = tree(published.repository)
    add_task(published.system, "another", TaskSketch(cloned=(block_position(2),)))
    real = evolve.export.repository.write_atomically

    def full(target: pathlib.Path, data: bytes) -> None:
        if target.name == file:
            raise OSError(28, "No space left on device")
        real(target, data)

    monkeypatch.setattr(evolve.export.repository, "write_atomically", full)
    with pytest.raises(ExportError, match="No space left on device"):
        export_system(published.system, published.repository)
    assert tree(published.repository) == before


def test_a_failure_at_the_last_step_leaves_every_generation_whole(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    add_task(published.system, "another", TaskSketch(cloned=(block_position(2),)))
    real = evolve.export.repository.write_atomically

    def full(target: pathlib.Path, data: bytes) -> None:
        real(target, data)
        if target.name == "CURRENT":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(evolve.export.repository, "write_atomically", full)
    with pytest.raises(ExportError, match="Input/output error"):
        export_system(published.system, published.repository)
    monkeypatch.undo()
    assert check_whole(published.repository).number == 2
    export_system(published.system, published.repository)
    assert (published.repository / "another" / "config.pbtxt").exists()


def test_a_model_of_a_tasks_name_that_munet_did_not_write_stays(published: Published) -> None:
    theirs = published.repository / "another" / "config.pbtxt"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    add_task(published.system, "another", TaskSketch())
    with pytest.raises(ExportError, match="which munet did not write"):
        export_system(published.system, published.repository)
    assert theirs.read_text() == "theirs"


def test_labels_and_examples_must_fit_the_path(published: Published) -> None:
    record = published.system.tasks()["plain"]
    published.system.put_task(dataclasses.replace(record, labels=("only one",)))
    with pytest.raises(ExportError, match="found 1 labels of task 'plain'; expected 3"):
        export_system(published.system, published.repository)
    large = published.system.tasks()["large"]
    published.system.put_task(dataclasses.replace(record, examples=large.examples))
    with pytest.raises(ExportError, match="found example images"):
        export_system(published.system, published.repository)


def test_of_two_publishers_one_waits_and_nothing_is_lost(published: Published, tmp_path: pathlib.Path) -> None:
    add_task(published.system, "another", TaskSketch(classes=6))
    said: list[str] = []
    results = []

    def publish() -> None:
        results.append(export_system(System.open(published.system.folder), published.repository, progress=said.append))

    with evolve.export.publish.open_for_publishing(published.repository, published.system.id, said.append):
        thread = threading.Thread(target=publish)
        thread.start()
        while not said:
            thread.join(0.01)
        assert "waiting for another process" in said[0]
        assert thread.is_alive()
        add_task(published.system, "late", TaskSketch(classes=7))
    thread.join()
    assert results[0].changed
    assert {"another", "late"} < {task.name for task in check_whole(published.repository).tasks}


def test_numbers_are_never_reused(published: Published) -> None:
    """A publisher was killed between its generation and CURRENT."""
    shutil.copy(published.repository / "generation-1.json", published.repository / "generation-2.json")
    text = (published.repository / "generation-2.json").read_text().replace('"number": "1"', '"number": "2"')
    (published.repository / "generation-2.json").write_text(text)
    add_task(published.system, "another", TaskSketch(classes=6))
    assert export_system(published.system, published.repository).generation == 3
    assert check_whole(published.repository).previous == 1


def test_images_are_filled_up_with_varied_copies() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    many = varied(images, 32)
    assert many.shape == (32, 16, 16, 3)
    np.testing.assert_array_equal(many[:3], images)
    assert len({image.tobytes() for image in many}) > 20
    assert len(varied(images, 2)) == 2
