"""A repository that goes from float32 to float16 and back while a real server process answers from it, against torch."""

from __future__ import annotations

import pathlib
import threading
import time

import numpy as np

from evolve.export.publish import export_system
from evolve.vit import reference_logits
from munet.parity import find_disagreement, tolerance_of
from server.client import Client
from tests.support.processes import ServerProcess, server
from tests.support.system import SKETCHES, build_system

TASKS = ("adapted", "cloned", "plain")


class Asking(threading.Thread):
    """Asks every task about the same images until told to stop; keeps each answer's generation and logits."""

    def __init__(self, address: str, images: np.ndarray) -> None:
        super().__init__()
        self._address = address
        self._images = list(images)
        self.stop = threading.Event()
        self.answers: dict[str, dict[int, set[bytes]]] = {task: {} for task in TASKS}
        self.failures: list[Exception] = []

    def run(self) -> None:
        with Client(self._address) as client:
            while not self.stop.is_set():
                for task in TASKS:
                    try:
                        answer = client.classify(task, self._images, include_logits=True)
                    except Exception as error:
                        self.failures.append(error)
                        continue
                    logits = np.stack([each.logits for each in answer.classifications]).astype(np.float32)
                    self.answers[task].setdefault(answer.generation, set()).add(logits.tobytes())


def _wait_for_answers(asking: Asking, generation: int) -> None:
    deadline = time.monotonic() + 60
    while any(generation not in asking.answers[task] for task in TASKS):
        assert time.monotonic() < deadline, f"nobody was answered by generation {generation}"
        time.sleep(0.05)


def test_float32_to_float16_and_back_while_it_serves(tmp_path: pathlib.Path) -> None:
    system = build_system(tmp_path / "system", {task: SKETCHES[task] for task in TASKS})
    repository = tmp_path / "repository"
    export_system(system, repository)
    images = np.random.default_rng(5).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    with ServerProcess(repository) as process, Client(process.address) as client:
        asking = Asking(process.address, images)
        asking.start()
        try:
            _wait_for_answers(asking, 1)
            for number, precision in ((2, "float16"), (3, "float32")):
                assert export_system(system, repository, precision=precision, num_top1_images=8).generation == number
                deadline = time.monotonic() + 60
                while client.list_tasks().generation < number:
                    assert time.monotonic() < deadline, "the server did not take up the new generation"
                    time.sleep(0.05)
                result = server("check", "--repository", repository)
                assert (result.returncode, result.stderr) == (0, "")
                _wait_for_answers(asking, number)
        finally:
            asking.stop.set()
            asking.join()
    assert process.status == 0
    assert asking.failures == []
    for task in TASKS:
        path = system.path(system.tasks()[task].path_id)
        expected = reference_logits(path, system.tensors, images)
        answers = asking.answers[task]
        assert sorted(answers) == [1, 2, 3]
        # Each generation gives one answer to the bit, and the third the first's.
        assert all(len(each) == 1 for each in answers.values())
        assert answers[1] == answers[3] != answers[2]
        for number, precision in ((1, "float32"), (2, "float16")):
            found = np.frombuffer(next(iter(answers[number])), dtype=np.float32).reshape(expected.shape)
            assert find_disagreement(found, expected, tolerance_of(precision, expected)) is None
