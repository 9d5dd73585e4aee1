"""Which generation servers are told to answer from, and what is kept for going back."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from evolve import cli
from evolve.errors import ExportError
from evolve.export import releases
from evolve.export.publish import export_system
from evolve.export.releases import end_canary, promote, read_release, roll_back, set_canary
from munet.v1 import generation_pb2
from tests.evolve.export.conftest import Published
from tests.evolve.export.whole import check_whole, read_generation
from tests.support.system import TaskSketch, add_task

pytestmark = pytest.mark.usefixtures("quick_disk")


def publish(published: Published, classes: int, canary: float | None = None) -> int:
    """Publishes with `another` being another path."""
    add_task(published.system, "another", TaskSketch(classes=classes))
    return export_system(published.system, published.repository, canary_percent=canary).generation


def check_server_agrees(repository: pathlib.Path, number: int, canary: int | None) -> None:
    """What servers read is whole, and the aliases are those of the current generation, with none besides."""
    generation = check_whole(repository)
    assert (generation.number, canary_of(repository).generation or None) == (number, canary)
    if canary is not None:
        assert read_generation(repository, canary).number == canary
    for task in generation.tasks:
        ensemble, alias = (config_of(repository / name) for name in (task.ensemble, task.name))
        ensemble.name = task.name
        assert alias == ensemble
        labels = [(repository / name / "labels.txt").read_bytes() for name in (task.ensemble, task.name)]
        assert labels[0] == labels[1]
    assert (repository / "another").is_dir() == ("another" in {task.name for task in generation.tasks})


def canary_of(repository: pathlib.Path) -> generation_pb2.Canary:
    file = repository / "CANARY"
    return json_format.Parse(file.read_text() if file.exists() else "{}", generation_pb2.Canary())


def config_of(folder: pathlib.Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_a_canary_is_tried_and_promoted(published: Published) -> None:
    repository = published.repository
    assert publish(published, 4, canary=10) == 2
    check_server_agrees(repository, 1, 2)
    # The same again is the same again; another percentage is another one.
    assert set_canary(repository, percent=50, percent_of_task={"another": 0}) == set_canary(repository)
    found = canary_of(repository)
    assert (found.percent, dict(found.percent_of_task)) == (50, {"another": 0})
    release = promote(repository)
    assert (release.current, release.canary, release.kept) == (2, None, (1, 2))
    check_server_agrees(repository, 2, None)
    assert roll_back(repository).current == 1
    check_server_agrees(repository, 1, None)


def test_what_is_published_ends_the_canary_and_keeps_it_for_a_while(published: Published) -> None:
    publish(published, 4, canary=10)
    assert publish(published, 5) == 3
    check_server_agrees(published.repository, 3, None)
    assert read_release(published.repository).kept == (1, 2, 3)


def test_a_canary_that_ends_leaves_what_serves(published: Published) -> None:
    publish(published, 4, canary=10)
    assert end_canary(published.repository).canary is None
    check_server_agrees(published.repository, 1, None)
    # It is still there, and may be tried again.
    assert set_canary(published.repository, number=2, percent=5).canary == 2
    check_server_agrees(published.repository, 1, 2)


def test_what_is_needed_for_going_back_and_the_canary_outlive_collection(published: Published) -> None:
    repository = published.repository
    for classes in (4, 5, 6):
        publish(published, classes)
    assert read_release(repository).kept == (2, 3, 4)
    assert roll_back(repository).current == 3
    assert roll_back(repository, 2).current == 2
    # Numbers are never used twice; what was current before the bad ones stays for going back, though it is old.
    assert publish(published, 7) == 5
    assert read_release(repository).kept == (2, 3, 4, 5)
    assert roll_back(repository).current == 2
    check_server_agrees(repository, 2, None)
    roll_back(repository, 5)
    set_canary(repository, number=publish(published, 8, canary=1), percent=2)
    for classes in (9, 10, 11):
        publish(published, classes, canary=1)
    release = read_release(repository)
    assert (release.current, release.canary) == (5, 9)
    assert release.kept == (2, 5, 7, 8, 9)
    check_server_agrees(repository, 5, 9)


def test_who_goes_back_twice_says_where_to(published: Published) -> None:
    publish(published, 4)
    assert roll_back(published.repository).current == 1
    with pytest.raises(
        ExportError, match=r"at generation 1, while 2 is the newest that can be read; expected the number .*: 1, 2"
    ):
        roll_back(published.repository)
    check_server_agrees(published.repository, 1, None)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda folder: roll_back(folder), "found no generation 0"),
        (lambda folder: roll_back(folder, 9), "found no generation 9 .* one that is kept: 1"),
        (lambda folder: set_canary(folder, percent=5), "found no canary"),
        (lambda folder: set_canary(folder, number=1, percent=5), "canary 1 beside generation 1"),
        (lambda folder: set_canary(folder, number=9, percent=5), "found no generation 9"),
        (lambda folder: set_canary(folder, number=1, percent=float("nan")), "found nan percent"),
        (lambda folder: promote(folder), "found no canary"),
        (lambda folder: promote(folder / "nowhere"), "found nothing published"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(published: Published, attempt: object, words: str) -> None:
    before = sorted(file.name for file in published.repository.iterdir())
    with pytest.raises(ExportError, match=words):
        attempt(published.repository)  # type: ignore[operator]
    assert sorted(file.name for file in published.repository.iterdir()) == before
    check_server_agrees(published.repository, 1, None)


def test_a_generation_that_lacks_a_file_is_nowhere_to_go(published: Published) -> None:
    publish(published, 4)
    golden = next(published.repository.glob("golden-*.npy"))
    content = golden.read_bytes()
    golden.unlink()
    with pytest.raises(ExportError, match="found generation 1 without golden-"):
        roll_back(published.repository)
    golden.write_bytes(content)
    check_server_agrees(published.repository, 2, None)


@pytest.mark.parametrize("damaged", ["generation-2.json", "CURRENT"])
def test_what_is_damaged_is_no_reason_to_stay(published: Published, damaged: str) -> None:
    publish(published, 4)
    (published.repository / damaged).write_bytes(b"{")
    with pytest.raises(ExportError, match="the number of the one to go to: 1"):
        roll_back(published.repository)
    assert roll_back(published.repository, 1).current == 1
    if damaged == "CURRENT":
        check_server_agrees(published.repository, 1, None)


def test_there_is_no_canary_before_there_is_a_generation(published: Published, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ExportError, match="found no current generation"):
        export_system(published.system, tmp_path / "new", canary_percent=10)
    with pytest.raises(ExportError, match="found 101 percent"):
        export_system(published.system, published.repository, canary_percent=101)


@pytest.mark.parametrize("killed_before", ["remove", "current"])
def test_a_rollback_that_is_killed_never_wakes_a_canary(
    published: Published, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    """Going back from a promoted generation whose CANARY was left behind."""
    repository = published.repository
    publish(published, 4, canary=50)
    left_behind = (repository / "CANARY").read_bytes()
    promote(repository)
    (repository / "CANARY").write_bytes(left_behind)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    name = "remove_canary" if killed_before == "remove" else "_set_current"
    with monkeypatch.context() as patch:
        patch.setattr(releases.Repository, name, kill)
        with pytest.raises(KeyboardInterrupt):
            roll_back(repository, 1)
    assert read_generation(repository).number == 2
    assert canary_of(repository).generation <= 2
    roll_back(repository, 1)
    check_server_agrees(repository, 1, None)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["munet-evolve", *map(str, arguments)])
    try:
        cli.main()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    return status, "".join(capsys.readouterr())


def test_the_commands(published: Published, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    where = ("--repository", published.repository)
    publish(published, 4, canary=10)
    words = "servers answer from generation 1, canary 2 with {} %; kept: 1, 2\n"
    assert run(capsys, monkeypatch, "canary", *where) == (0, words.format("10"))
    status, out = run(capsys, monkeypatch, "canary", *where, "--percent", 20, "--task", "another=50")
    assert (status, out) == (0, words.format("20 %, 50 % of another").replace("another %", "another"))
    assert run(capsys, monkeypatch, "canary", *where, "--promote")[0] == 0
    assert run(capsys, monkeypatch, "rollback", *where) == (0, "servers answer from generation 1; kept: 1, 2\n")
    status, out = run(capsys, monkeypatch, "rollback", *where)
    assert (status, "expected the number of the one to go to: 1, 2" in out) == (2, True)
    assert run(capsys, monkeypatch, "rollback", *where, "--to", 2)[1].startswith("servers answer from generation 2;")
    assert run(capsys, monkeypatch, "canary", *where, "--promote", "--end")[0] == 2
    assert run(capsys, monkeypatch, "canary", *where, "--task", "another")[0] == 2
