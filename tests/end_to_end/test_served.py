"""A system whose routes leave and rejoin shared segments, exported and served by a real process, against torch."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import shutil
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from evolve.export.publish import export_system
from evolve.store import System
from evolve.vit import reference_logits
from munet.preprocessing import decode, resize
from server.client import AdminClient, Client
from server.triton.process import TritonProcess
from tests.support.processes import ServerProcess, server
from tests.support.system import SKETCHES, TaskSketch, add_task, build_system
from tests.support.triton import environment

NUM_IMAGES = 200


@dataclasses.dataclass
class Running:
    system: System
    repository: pathlib.Path
    process: ServerProcess


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[System, pathlib.Path]:
    folder = tmp_path_factory.mktemp("served")
    system = build_system(folder / "system")
    export_system(system, folder / "repository")
    return system, folder / "repository"


@pytest.fixture(scope="module", params=["embedded", "triton"])
def running(published: tuple[System, pathlib.Path], request: pytest.FixtureRequest) -> Iterator[Running]:
    arguments = ["--engine", request.param]
    with contextlib.ExitStack() as stack:
        if request.param == "triton":
            log = published[1].with_name("triton.log")
            triton = stack.enter_context(TritonProcess(environment(), published[1], log=log))
            arguments += ["--triton", triton.addresses.grpc]
        process = stack.enter_context(ServerProcess(published[1], *arguments))
        yield Running(*published, process)
    assert process.status == 0


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Real handwritten digits as files: PNG and JPEG, square and not, grey and coloured, upright and turned by EXIF."""
    digits = load_digits().images
    random = np.random.default_rng(0)
    encoded = []
    for number in range(NUM_IMAGES):
        grey = Image.fromarray((digits[number] * 15.9).astype(np.uint8))
        width, height = [(8, 8), (24, 24), (40, 17), (13, 31), (64, 48)][number % 5]
        image = grey.resize((width, height), Image.Resampling.BICUBIC)
        if number % 3:
            tint = random.integers(0, 256, 3)
            image = Image.fromarray((np.asarray(image)[:, :, None] * (tint / 255)).astype(np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        buffer = io.BytesIO()
        image.save(buffer, "JPEG" if number % 2 else "PNG", exif=exif)
        encoded.append(buffer.getvalue())
    return encoded


def _torch_logits(system: System, task: str, files: list[bytes]) -> np.ndarray:
    path = system.path(system.tasks()[task].path_id)
    size = path.hyperparameters.image_size
    images = np.stack([resize(decode(file), size) for file in files])
    return reference_logits(path, system.tensors, images).astype(np.float64)


@pytest.mark.parametrize("task", sorted(SKETCHES))
def test_logits_and_probabilities_equal_torchs_on_real_images_of_every_kind(running: Running, files: list[bytes], task: str):
    logits = _torch_logits(running.system, task, files)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    assert np.ptp(expected, axis=0).max() > 0.01, "images that all look alike would prove nothing"
    with Client(running.process.address) as client:
        answers = []
        for start in range(0, len(files), 40):
            answers += client.classify(task, files[start : start + 40], top_k=100, include_logits=True).classifications
    assert np.abs(np.stack([answer.logits for answer in answers]) - logits).max() <= 1e-4
    found = np.zeros_like(expected)
    for row, answer in enumerate(answers):
        for label in answer.labels:
            assert label.label == f"{task} {label.index}"
            found[row, label.index] = label.probability
    assert np.abs(found - expected).max() <= 1e-4
    assert [answer.top.index for answer in answers] == found.argmax(axis=1).tolist()


def test_logits_do_not_depend_on_what_else_is_asked(running: Running, files: list[bytes]):
    with Client(running.process.address) as client:
        alone = {
            task: client.classify(task, files[0], include_logits=True).classifications[0].logits.tobytes() for task in SKETCHES
        }
        together = client.classify_tasks(files[0], include_logits=True)
        batch = {task: client.classify(task, files[:33], include_logits=True).classifications[0] for task in SKETCHES}
    for task in SKETCHES:
        assert together[task].logits.tobytes() == alone[task]
        assert batch[task].logits.tobytes() == alone[task]


def test_one_image_for_all_tasks_runs_each_shared_segment_on_one_row(running: Running, files: list[bytes]):
    with AdminClient(running.process.admin_address) as admin, Client(running.process.address) as client:
        before = {row.name: row for row in admin.status().segments}
        client.classify_tasks(files[0])
        after = {row.name: row for row in admin.status().segments}
        routes = {task.name: task.route for task in client.list_tasks().tasks}
    histories: dict[str, set[tuple[str, ...]]] = {}
    for route in routes.values():
        for length, name in enumerate(route):
            histories.setdefault(name, set()).add(tuple(route[:length]))
    for name, row in after.items():
        asked = sum(name in route for route in routes.values())
        assert row.rows_requested - before[name].rows_requested == asked
        # Once for each different history: the same weights after another prefix have another input.
        assert row.rows_computed - before[name].rows_computed == len(histories[name])
    assert any(len(prefixes) == 1 and sum(name in r for r in routes.values()) >= 3 for name, prefixes in histories.items())
    assert any(len(prefixes) > 1 for prefixes in histories.values()), "some route must rejoin a shared segment"


def test_check_finds_the_repository_whole(published: tuple[System, pathlib.Path]):
    result = server("check", "--repository", published[1])
    assert (result.returncode, result.stderr) == (0, "")
    assert "5 tasks" in result.stdout


def test_a_publication_that_splits_a_route_in_use_changes_no_bit_of_other_answers(files: list[bytes], tmp_path: pathlib.Path):
    names = ["large", "plain"]
    system = build_system(tmp_path / "system", {name: SKETCHES[name] for name in names})
    export_system(system, tmp_path / "repository")
    with ServerProcess(tmp_path / "repository") as process, Client(process.address) as client:
        old = {task.name: task for task in client.list_tasks().tasks}
        before = {task: _logits(client, task, files[:30]) for task in names}
        # One leaves after the first block, another has a block of its own in the middle: both cut the old tasks' routes.
        for number, (name, sketch) in enumerate([("early", TaskSketch(blocks=1)), ("cloned", SKETCHES["cloned"])], start=2):
            add_task(system, name, sketch)
            export_system(system, tmp_path / "repository")
            _wait_for_generation(client, number)
            new = {task.name: task for task in client.list_tasks().tasks}
            assert all(len(new[task].route) > len(old[task].route) for task in names), "a route was not split"
            assert {task: new[task].path_id for task in names} == {task: old[task].path_id for task in names}
            assert {task: _logits(client, task, files[:30]) for task in names} == before
            assert client.classify(name, files[0]).generation == number
            old = new


def test_removing_a_task_and_publishing_takes_it_out_and_changes_no_other_answer(
    published: tuple[System, pathlib.Path], files: list[bytes], tmp_path: pathlib.Path
):
    shutil.copytree(published[0].folder, tmp_path / "system")
    shutil.copytree(published[1], tmp_path / "repository")
    system = System.open(tmp_path / "system")
    with ServerProcess(tmp_path / "repository") as process, Client(process.address) as client:
        before = _logits(client, "plain", files[:10])
        with system.locks.publishing():
            system.remove_task("adapted")
        export_system(system, tmp_path / "repository")
        _wait_for_generation(client, 2)
        assert "adapted" not in [task.name for task in client.list_tasks().tasks]
        assert _logits(client, "plain", files[:10]) == before


def _logits(client: Client, task: str, files: list[bytes]) -> bytes:
    answers = client.classify(task, files, include_logits=True).classifications
    return b"".join(answer.logits.tobytes() for answer in answers if answer.logits is not None)


def _wait_for_generation(client: Client, number: int) -> None:
    deadline = time.monotonic() + 120
    while client.list_tasks().generation < number:
        assert time.monotonic() < deadline, "the server did not take up the new generation"
        time.sleep(0.05)
