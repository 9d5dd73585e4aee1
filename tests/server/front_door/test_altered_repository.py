"""A repository that is altered, cut off, replaced or taken away under a running server: it goes on, says why, and recovers by itself."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator

import pytest

from server.client import AdminClient, Client
from server.errors import CallRefusedError
from tests.support.background import Background
from tests.support.repository import DIGITS, GREEK, HEBREW, SHORT, RepositoryBuilder, random_images
from tests.support.serving import ServerThread, serving, wait_until

IMAGE = random_images(1, 8)[0]


@dataclasses.dataclass
class Scene:
    """A running server and its repository.

    Attributes:
        builder: of the repository; generation 1 serves when a test begins, or a later one of the same tasks.
        server: that serves it.
        copy: the repository as it was when the test began.
    """

    builder: RepositoryBuilder
    server: ServerThread
    copy: pathlib.Path

    @property
    def root(self) -> pathlib.Path:
        return self.builder.root

    @property
    def away(self) -> pathlib.Path:
        """Where the repository is while it is not in its place."""
        return self.root.with_name("away")

    def path(self, name: str) -> pathlib.Path:
        """Returns a file of the newest generation: CURRENT, `generation`, or the model or config of a task's own segment or ensemble."""
        number = self.builder.newest()
        if name == "generation":
            return self.root / f"generation-{number}.json"
        if name == "model":
            return self.root / self.builder.read_manifest(number).tasks[0].route[-1] / "1" / "model.onnx"
        if name == "config":
            return self.root / self.builder.read_manifest(number).tasks[0].ensemble / "config.pbtxt"
        return self.root / name

    def restore(self) -> None:
        """Puts the repository back as it was, CURRENT last."""
        if self.root.is_dir():
            shutil.rmtree(self.root)
        self.root.unlink(missing_ok=True)
        shutil.copytree(self.copy, self.root, ignore=shutil.ignore_patterns("CURRENT"))
        shutil.copy(self.copy / "CURRENT", self.root / "CURRENT")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RepositoryBuilder, ServerThread]]:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("model") / "repository")
    builder.publish({"digits": DIGITS, "moving": SHORT})
    with serving(builder.root) as server:
        yield builder, server


@pytest.fixture
def scene(served: tuple[RepositoryBuilder, ServerThread], tmp_path: pathlib.Path) -> Iterator[Scene]:
    builder, server = served
    scene = Scene(builder, server, tmp_path / "copy")
    shutil.copytree(builder.root, scene.copy)
    yield scene
    shutil.rmtree(scene.away, ignore_errors=True)
    if not (builder.root / "CURRENT").is_file():
        scene.restore()


def replace(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name("temporary")
    temporary.write_bytes(content)
    temporary.replace(path)


def replace_by(path: pathlib.Path, make: Callable[[pathlib.Path], object]) -> None:
    path.unlink()
    make(path)


def cut(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


ALTERATIONS: dict[str, Callable[[Scene], object]] = {
    "CURRENT names nothing": lambda scene: replace(scene.path("CURRENT"), b"4711\n"),
    "CURRENT names a huge number": lambda scene: replace(scene.path("CURRENT"), b"9" * 30),
    "CURRENT is huge": lambda scene: replace(scene.path("CURRENT"), b"1" * 10_000_000),
    "CURRENT is garbage": lambda scene: replace(scene.path("CURRENT"), b"\xff\x00\xb2 not a number"),
    "CURRENT is empty": lambda scene: replace(scene.path("CURRENT"), b""),
    "CURRENT is negative": lambda scene: replace(scene.path("CURRENT"), b"-1\n"),
    "CURRENT is missing": lambda scene: scene.path("CURRENT").unlink(),
    "CURRENT is a folder": lambda scene: replace_by(scene.path("CURRENT"), pathlib.Path.mkdir),
    "CURRENT is a pipe": lambda scene: replace_by(scene.path("CURRENT"), os.mkfifo),
    "CURRENT is a link to itself": lambda scene: replace_by(scene.path("CURRENT"), lambda path: path.symlink_to("CURRENT")),
    "CURRENT is a link elsewhere": lambda scene: replace_by(
        scene.path("CURRENT"), lambda path: path.symlink_to(scene.copy / "CURRENT")
    ),
    "the generation is cut off": lambda scene: cut(scene.path("generation")),
    "the generation is missing": lambda scene: scene.path("generation").unlink(),
    "the generation is a pipe": lambda scene: replace_by(scene.path("generation"), os.mkfifo),
    "the generation is nested a million deep": lambda scene: replace(scene.path("generation"), b"[" * 1_000_000),
    "the generation is a list": lambda scene: replace(scene.path("generation"), b"[1, 2]"),
    "the generation lists numbers": lambda scene: replace(scene.path("generation"), b'{"format": 1, "files": [{"path": 5}, 7]}'),
    "the generation is of no format": lambda scene: replace(scene.path("generation"), b'{"format": 1e999}'),
    "the repository is missing": lambda scene: scene.root.rename(scene.away),
    "the repository is a file": lambda scene: (scene.root.rename(scene.away), scene.root.write_bytes(b"")),
    "the repository is empty": lambda scene: (scene.root.rename(scene.away), scene.root.mkdir()),
}
"""What is done to the repository; all of it is noticed."""


def logits(client: Client) -> dict[str, bytes]:
    tasks = client.classify_tasks(IMAGE, ["digits", "moving"], include_logits=True, timeout_seconds=10).tasks
    return {task.task: task.classification.logits.tobytes() for task in tasks}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_it_goes_on_says_why_and_recovers(scene: Scene, name: str) -> None:
    with Client(scene.server.address) as client, AdminClient(scene.server.admin_address) as admin:
        before = logits(client)
        number = admin.status().generation
        ALTERATIONS[name](scene)
        # Those who look by themselves notice, and so does who is told to look.
        wait_until(lambda: "expected" in admin.status().last_reload.error)
        with pytest.raises(CallRefusedError, match=r"expected.*FAILED_PRECONDITION"):
            admin.reload(timeout_seconds=10)
        assert admin.status().generation == number
        assert logits(client) == before
        scene.restore()
        moved = {"digits": DIGITS, "moving": HEBREW if number % 2 else SHORT}
        published = scene.builder.publish(moved)
        wait_until(lambda: admin.status().generation == published)
        after = logits(client)
        assert after["digits"] == before["digits"]
        assert after["moving"] != before["moving"]
        assert admin.status().last_reload.error == ""


SPOILT: dict[str, Callable[[Scene], object]] = {
    "a bit of a model": lambda scene: scene.builder.alter(str(scene.path("model").relative_to(scene.root))),
    "half of a model": lambda scene: cut(scene.path("model")),
    "no model": lambda scene: scene.path("model").unlink(),
    "a folder for a model": lambda scene: replace_by(scene.path("model"), pathlib.Path.mkdir),
    "a pipe for a model": lambda scene: replace_by(scene.path("model"), os.mkfifo),
    "half of a config": lambda scene: cut(scene.path("config")),
    "no config": lambda scene: scene.path("config").unlink(),
}


@pytest.mark.parametrize("name", SPOILT)
def test_files_of_what_serves_may_go_and_come(scene: Scene, name: str) -> None:
    """What serves was read whole. Altered files are noticed by the next reload that needs them, and used again when they are whole."""
    with Client(scene.server.address) as client, AdminClient(scene.server.admin_address) as admin:
        before = logits(client)
        number = admin.status().generation
        SPOILT[name](scene)
        assert logits(client) == before
        with pytest.raises(CallRefusedError, match=r"expected.*FAILED_PRECONDITION"):
            admin.reload(timeout_seconds=10)
        assert logits(client) == before
        scene.restore()
        # Whoever refused it looks again by itself.
        wait_until(lambda: admin.status().last_reload.error == "")
        assert admin.reload(timeout_seconds=10).changed is False
        assert admin.status().generation == number
        assert logits(client) == before


def test_another_repository_in_its_place_is_served(scene: Scene, tmp_path: pathlib.Path) -> None:
    other = RepositoryBuilder(tmp_path / "other")
    other.publish({"greek": GREEK}, number=1)
    with Client(scene.server.address) as client, AdminClient(scene.server.admin_address) as admin:
        number = admin.status().generation
        scene.root.rename(scene.away)
        other.root.rename(scene.root)
        wait_until(lambda: [task.name for task in client.list_tasks().tasks] == ["greek"])
        scene.root.rename(other.root)
        scene.away.rename(scene.root)
        wait_until(lambda: [task.name for task in client.list_tasks().tasks] == ["digits", "moving"])
        assert admin.status().generation == number


def test_a_publisher_that_writes_nonsense_all_the_time_disturbs_nobody(scene: Scene) -> None:
    """CURRENT is something else at every look, and files come and go while they are read."""
    seen: set[tuple[int, bytes]] = set()

    def ask(stop: threading.Event) -> None:
        with Client(scene.server.address) as client:
            while not stop.is_set():
                result = client.classify("digits", IMAGE, include_logits=True, timeout_seconds=10)
                seen.add((result.generation, result.classifications[0].logits.tobytes()))

    with AdminClient(scene.server.admin_address) as admin:
        number = admin.status().generation
        with Background([ask]):
            wait_until(lambda: bool(seen))
            for round_number in range(60):
                ALTERATIONS[list(ALTERATIONS)[round_number % 10]](scene)
                if round_number % 7 == 0:
                    cut(scene.path("generation"))
                threading.Event().wait(0.01)
                if round_number % 5 == 0:
                    scene.restore()
                else:
                    current = scene.path("CURRENT")
                    shutil.rmtree(current) if current.is_dir() else current.unlink(missing_ok=True)
                    shutil.copy(scene.copy / "CURRENT", current)
        scene.restore()
        assert {generation for generation, _ in seen} == {number}
        assert len(seen) == 1
        published = scene.builder.publish({"digits": DIGITS, "moving": HEBREW if number % 2 else SHORT})
        wait_until(lambda: admin.status().generation == published)
