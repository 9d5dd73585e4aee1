"""Many files: in groups, several at a time, in order, whatever is wrong with some of them."""

from __future__ import annotations

import asyncio
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from server.bulk import _groups
from server.client import (
    AsyncClient,
    CallRefusedError,
    Client,
    FileAnswer,
    Retry,
    ServerBusyError,
    ServerFailedError,
    ServerUnreachableError,
    TaskNotFoundError,
)
from server.config import Limits
from tests.support.images import encode
from tests.support.repository import TASKS, TRAP, RepositoryBuilder, random_images
from tests.support.serving import ServerThread, serving

IMAGES = random_images(40, 8, seed=6)
QUICK = Retry(first_pause_seconds=0.001)
TRAPPED = IMAGES[0].copy()
TRAPPED[0, 0, 0] = 255


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("repository"))
    builder.publish({**TASKS, "trap": TRAP})
    # Fewer images and bytes than a client sends if nobody tells it otherwise.
    with serving(builder.root, limits=Limits(max_images=4, max_message_bytes=20_000)) as server:
        yield server


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(IMAGES):
        (folder / f"{index:02}.png").write_bytes(encode(image))
    return sorted(folder.iterdir())


def ask_blocking(address: str, files: Iterable[pathlib.Path], *told: Any, **options: Any) -> list[FileAnswer]:
    with Client(address, retry=QUICK) as client:
        return list(client.classify_files(files, *told, **options))


def ask_awaited(address: str, files: Iterable[pathlib.Path], *told: Any, **options: Any) -> list[FileAnswer]:
    async def ask() -> list[FileAnswer]:
        async with AsyncClient(address, retry=QUICK) as client:
            return [answer async for answer in client.classify_files(files, *told, **options)]

    return asyncio.run(ask())


@pytest.fixture(params=[ask_blocking, ask_awaited], ids=["blocking", "awaited"])
def ask(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_every_file_is_answered_in_order_as_it_would_be_alone(server: ServerThread, files: list[pathlib.Path], ask: Any) -> None:
    answers = ask(server.address, iter(files), ["digits"], include_logits=True, top_k=2, in_flight=3, max_images=3)
    assert [answer.file for answer in answers] == files
    assert [answer.error for answer in answers] == [None] * 40
    with Client(server.address) as client:
        for image, answer in list(zip(IMAGES, answers, strict=True))[::7]:
            alone = client.classify("digits", image, include_logits=True)
            ((told,), generation) = answer.result.tasks, answer.result.generation
            assert (told.task, told.path_id, generation) == ("digits", alone.path_id, alone.generation)
            assert np.array_equal(told.classification.logits, alone.classifications[0].logits)
            assert len(told.classification.labels) == 2


def test_several_tasks_and_all_tasks(server: ServerThread, files: list[pathlib.Path], ask: Any) -> None:
    for tasks, names in ((["large", "digits"], ["large", "digits"]), ((), sorted((*TASKS, "trap")))):
        answers = ask(server.address, files[:5], tasks)
        assert [[told.task for told in answer.result.tasks] for answer in answers] == [names] * 5


def test_files_that_fail_cost_the_others_nothing(
    server: ServerThread, files: list[pathlib.Path], tmp_path: pathlib.Path, ask: Any
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "trapped.png").write_bytes(encode(TRAPPED))
    # Together with others it is more than the server takes, and alone too.
    (tmp_path / "large.png").write_bytes(bytes(30_000))
    bad = [tmp_path / name for name in ("text.png", "none.png", "empty.png", "trapped.png", "large.png")]
    bad.append(tmp_path)
    mixed = list(itertools.chain.from_iterable(zip(files[:6], bad, strict=True)))
    # Groups of six are more than the server takes too: they are halved until it does.
    answers = ask(server.address, mixed, ["trap"], max_images=6)
    assert [answer.file for answer in answers] == mixed
    assert [answer.error for answer in answers[::2]] == [None] * 6
    assert all(answer.result is None for answer in answers[1::2])
    errors = [type(answer.error) for answer in answers[1::2]]
    assert errors == [
        CallRefusedError,
        FileNotFoundError,
        CallRefusedError,
        ServerFailedError,
        ServerBusyError,
        IsADirectoryError,
    ]


def test_what_concerns_all_files_is_raised(server: ServerThread, files: list[pathlib.Path], ask: Any) -> None:
    with pytest.raises(TaskNotFoundError, match="did you mean 'digits'"):
        ask(server.address, files, ["digit"])
    with pytest.raises(ServerUnreachableError):
        ask("127.0.0.1:1", files, ["digits"])
    with pytest.raises(TypeError, match=re.escape("write ['digits']")):
        ask(server.address, files, "digits")
    for name in ("in_flight", "max_images", "max_bytes"):
        with pytest.raises(ValueError, match=f"{name}: found 0, expected at least 1"):
            ask(server.address, files, ["digits"], **{name: 0})


def test_no_more_files_are_looked_for_than_are_asked_about(server: ServerThread, files: list[pathlib.Path]) -> None:
    taken = itertools.count()
    endless = (files[next(taken) % 40] for _ in itertools.repeat(None))

    async def ask() -> list[FileAnswer]:
        async with AsyncClient(server.address) as client:
            answers = client.classify_files(endless, ["digits"], in_flight=3, max_images=2)
            found = [await anext(answers) for _ in range(4)]
            await answers.aclose()
            return found

    with Client(server.address) as client:
        answers = client.classify_files(endless, ["digits"], in_flight=3, max_images=2)
        assert [answer.file for answer in itertools.islice(answers, 4)] == files[:4]
    # Two groups were answered, two more are under way, and the first file of the next shows that a group is full.
    assert next(taken) <= 2 * 2 + 2 * 2 + 1
    taken = itertools.count()
    assert [answer.file for answer in asyncio.run(ask())] == files[:4]
    assert next(taken) <= 2 * 2 + 2 * 2 + 1


def test_groups_hold_as_much_as_one_request_may(tmp_path: pathlib.Path) -> None:
    files = []
    for index, size in enumerate([10, 10, 10, 50, 200, 10, 90, 10]):
        files.append(tmp_path / f"{index}.png")
        files[-1].write_bytes(bytes(size))
    files.append(tmp_path / "none.png")
    assert [[int(file.stem) if file.stem != "none" else -1 for file in group] for group in _groups(files, 3, 100)] == [
        [0, 1, 2],
        [3],
        [4],
        [5, 6],
        [7, -1],
    ]
    assert list(_groups([], 3, 100)) == []
