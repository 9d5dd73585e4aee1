"""Every way a repository can be broken: refused whole, with words that say what, where and what instead."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from server.errors import GenerationRefusedError, NewerFormatError, NoGenerationError, RepositoryError
from server.repository import Repository
from tests.support.repository import DIGITS, LARGE, TASKS, RepositoryBuilder


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish()
    return builder


def refusal(builder: RepositoryBuilder) -> str:
    with pytest.raises(GenerationRefusedError) as caught:
        Repository(builder.root).read()
    assert all(finding.found and finding.expected for finding in caught.value.findings)
    return str(caught.value)


def test_a_whole_generation_is_read(builder: RepositoryBuilder) -> None:
    generation = Repository(builder.root).read()
    assert generation.number == 1
    assert list(generation.tasks) == sorted(TASKS)
    task = generation.tasks["large"]
    assert task.labels == LARGE.labels
    assert task.image_size == 16
    assert task.test_accuracy == 0.5
    assert task.golden.logits.shape == (4, 4)
    assert task.golden.read_images().shape == (4, 16, 16, 3)
    assert len(generation.segments) == 10
    with pytest.raises(TypeError):
        generation.tasks["new"] = task  # type: ignore[index]


def test_a_generation_by_number(builder: RepositoryBuilder) -> None:
    builder.publish({"digits": DIGITS})
    repository = Repository(builder.root)
    assert len(repository.read().tasks) == 1
    assert len(repository.read(1).tasks) == 5


def test_no_generation(tmp_path: pathlib.Path) -> None:
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(NoGenerationError, match="munet-evolve export"):
            Repository(root).read()


@pytest.mark.parametrize("content", [b"", b"one", b"-1", b"\xff\xfe", b"1 2", b"1" * 5000])
def test_a_current_that_is_no_number(builder: RepositoryBuilder, content: bytes) -> None:
    (builder.root / "CURRENT").write_bytes(content)
    with pytest.raises(RepositoryError, match="expected"):
        Repository(builder.root).read()


def test_current_names_a_generation_that_is_not_there(builder: RepositoryBuilder) -> None:
    builder.set_current(7)
    assert "generation-7.json" in refusal(builder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\x00\xff", b"[" * 100_000, b'{"format": 1, "tasks": 3}'])
def test_a_generation_that_does_not_parse(builder: RepositoryBuilder, content: bytes) -> None:
    (builder.root / "generation-1.json").write_bytes(content)
    assert "generation-1.json" in refusal(builder)


def test_a_newer_format(builder: RepositoryBuilder) -> None:
    builder.edit_json(1, {"format": 2, "somethingNew": {"a": 1}})
    with pytest.raises(NewerFormatError, match="update this server"):
        Repository(builder.root).read()


def test_unknown_fields_of_a_known_format_are_passed_over(builder: RepositoryBuilder) -> None:
    builder.edit_json(1, {"somethingNew": {"a": 1}})
    assert Repository(builder.root).read().number == 1


def test_the_number_must_be_the_files(builder: RepositoryBuilder) -> None:
    builder.edit_json(1, {"number": 2})
    assert "number: found 2, expected 1" in refusal(builder)


def test_every_file_is_checked(builder: RepositoryBuilder) -> None:
    for file in builder.read_manifest(1).files:
        content = (builder.root / file.path).read_bytes()
        (builder.root / file.path).unlink()
        assert file.path in refusal(builder)
        (builder.root / file.path).write_bytes(content)
        builder.alter(file.path)
        assert "sha256" in refusal(builder)
        (builder.root / file.path).write_bytes(content[:-1])
        assert "bytes" in refusal(builder)
        (builder.root / file.path).write_bytes(content)
    assert Repository(builder.root).read()


def test_a_file_altered_later_is_noticed_by_the_same_reader(builder: RepositoryBuilder) -> None:
    repository = Repository(builder.root)
    model = next(iter(repository.read().segments.values())).model
    builder.alter(model.relative_to(builder.root).as_posix())
    with pytest.raises(GenerationRefusedError, match="sha256"):
        repository.read()


def test_all_faults_are_named(builder: RepositoryBuilder) -> None:
    paths = [file.path for file in builder.read_manifest(1).files][:8]
    for path in paths:
        (builder.root / path).unlink()
    _, findings = Repository(builder.root).inspect()
    assert len(findings) == 8
    assert "and 3 more" in refusal(builder)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../outside", "a/../../outside", "./a", "a//b", "", "a\\..\\b", "a\0b", "..", "seg-\n"]
)
def test_paths_that_leave_the_repository(builder: RepositoryBuilder, path: str) -> None:
    (builder.root.parent / "outside").write_bytes(b"")
    builder.edit(1, lambda message: message.files.add(path=path, sha256="0" * 64, num_bytes=0))
    assert "files:" in refusal(builder)


def test_links_that_leave_the_repository(builder: RepositoryBuilder, tmp_path: pathlib.Path) -> None:
    path = next(file.path for file in builder.read_manifest(1).files if file.path.endswith("model.onnx"))
    outside = tmp_path / "outside.onnx"
    outside.write_bytes((builder.root / path).read_bytes())
    (builder.root / path).unlink()
    (builder.root / path).symlink_to(outside)
    assert "a link to" in refusal(builder)
    (builder.root / path).unlink()
    (builder.root / path).symlink_to(builder.root / path)
    assert "files:" in refusal(builder)


@pytest.mark.parametrize("name", ["CURRENT", "generation-1.json"])
def test_what_names_everything_else_lies_inside_too(builder: RepositoryBuilder, tmp_path: pathlib.Path, name: str) -> None:
    """A link would tell the first bytes of what it leads to, and whoever opens a pipe waits for ever."""
    file = builder.root / name
    (tmp_path / "outside").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(RepositoryError, match=f"{name}.*: found a link to .*outside"):
        Repository(builder.root).read()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(RepositoryError, match=f"{name}.*: found something that is no file"):
        Repository(builder.root).read()
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(RepositoryError, match=name):
        Repository(builder.root).read()
    # As Kubernetes mounts what changes: the link leads to a file inside.
    file.unlink()
    (tmp_path / "outside").rename(builder.root / "..inside")
    file.symlink_to("..inside")
    assert Repository(builder.root).read().number == 1


@pytest.mark.parametrize("part", ["seg", "seg/1", "ensemble"])
def test_folders_that_are_links_outside(builder: RepositoryBuilder, tmp_path: pathlib.Path, part: str) -> None:
    task = builder.read_manifest(1).tasks[0]
    folder = builder.root / {"seg": task.route[0], "seg/1": f"{task.route[0]}/1", "ensemble": task.ensemble}[part]
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    assert "a link to" in refusal(builder)


@pytest.mark.parametrize(
    "path",
    [
        "digits.0123456789ab/1/model.py",
        "seg-0123456789ab/model.so",
        "seg-0123456789ab/1/model.onnx.data",
        "run.sh",
        "seg-0123456789ab/1/model.plan",
    ],
)
def test_files_that_are_neither_models_nor_plain_data(builder: RepositoryBuilder, path: str) -> None:
    (builder.root / path).parent.mkdir(parents=True, exist_ok=True)
    (builder.root / path).write_bytes(b"code")
    digest = hashlib.sha256(b"code").hexdigest()
    builder.edit(1, lambda message: message.files.add(path=path, sha256=digest, num_bytes=4))
    assert "a file of another kind" in refusal(builder)


def test_a_repository_behind_a_link_is_served(builder: RepositoryBuilder, tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(builder.root)
    assert Repository(tmp_path / "link").read().number == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.files.pop(0), "no entry"),
        (lambda m: m.files.append(m.files[0]), "it twice"),
        (lambda m: m.tasks.append(m.tasks[0]), "it twice"),
        (lambda m: m.segments.append(m.segments[0]), "it twice"),
        (lambda m: setattr(m.segments[0], "name", "seg-../../x"), "12 hex digits"),
        (lambda m: setattr(m.segments[0], "max_batch_size", 0), "at least 1"),
        (lambda m: setattr(m.tasks[0], "name", "../x"), "not allowed"),
        (lambda m: setattr(m.tasks[0], "ensemble", "other.123"), "'digits.' and a hash"),
        (lambda m: m.tasks[0].ClearField("route"), "route"),
        (lambda m: m.tasks[0].route.append("seg-000000000000"), "one of the generation's segments"),
        (lambda m: m.tasks[0].ClearField("labels"), "a name for each class"),
        (lambda m: m.tasks[0].labels.__setitem__(0, m.tasks[0].labels[1]), "a name twice"),
        (lambda m: m.tasks[0].labels.append("one more"), "classes"),
        (lambda m: setattr(m.tasks[0].preprocessing, "version", 99), "update this server"),
        (lambda m: setattr(m.tasks[0].preprocessing, "image_size", 0), "image_size"),
        (lambda m: setattr(m.tasks[0].preprocessing, "image_size", 10**9), "image_size"),
        (lambda m: m.tasks[0].ClearField("golden"), "golden"),
        (lambda m: setattr(m.tasks[0].golden, "tolerance", float("nan")), "tolerance"),
        (
            lambda m: setattr(m.tasks[0].golden, "tolerance", 2e-2),
            "golden.tolerance: found 0.02, expected at most 0.0001 on a float32",
        ),
        (lambda m: setattr(m.tasks[0].golden, "images", "../golden.npy"), "no entry"),
        (lambda m: m.tasks[0].golden.logits.pop(), "golden.logits"),
        (lambda m: setattr(m.multi_task_ensembles[0], "name", "every-8.1"), "multi-task ensemble"),
        (lambda m: m.multi_task_ensembles[0].tasks.append("nobody"), "tasks of this generation"),
        (lambda m: m.multi_task_ensembles[0].tasks.pop(), "all tasks of 8 pixels"),
        (lambda m: m.multi_task_ensembles.append(m.multi_task_ensembles[0]), "each image size of the tasks once"),
        (lambda m: m.multi_task_ensembles.pop(0), "no multi-task ensemble"),
    ],
)
def test_a_generation_that_contradicts_itself(builder: RepositoryBuilder, change: Callable[[Any], Any], words: str) -> None:
    builder.edit(1, change)
    assert words in refusal(builder)


def test_only_what_is_new_is_hashed(builder: RepositoryBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    hashed = []
    digest = hashlib.file_digest

    def counting(file: Any, name: str) -> Any:
        hashed.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    repository = Repository(builder.root)
    repository.read()
    first = len(hashed)
    builder.publish({"digits": DIGITS})
    repository.read()
    assert len(hashed) - first <= 2


def test_fingerprints_change_when_something_does(builder: RepositoryBuilder) -> None:
    repository = Repository(builder.root)
    before = repository.fingerprint(), repository.fingerprint_of_files()
    assert (repository.fingerprint(), repository.fingerprint_of_files()) == before
    path = builder.root / builder.read_manifest(1).files[0].path
    os.utime(path, ns=(1, 1))
    assert repository.fingerprint() == before[0]
    assert repository.fingerprint_of_files() != before[1]
    builder.edit_json(1, {"exporter": "another"})
    assert repository.fingerprint() != before[0]
    (builder.root / "CURRENT").unlink()
    assert repository.fingerprint() != before[0]
    assert repository.fingerprint_of_files() == repository.fingerprint()
