"""A real system that grows while it is served: two searches, two publications, one server."""

from __future__ import annotations

import pathlib
import time

import numpy as np
import pytest
from sklearn.datasets import load_digits

from evolve.config import DigitsTask
from evolve.data.digits import load_digits as load_task_digits
from evolve.root import save_root
from evolve.store import System
from server.client import Client
from tests.support.images import encode
from tests.support.processes import ServerProcess, evolve
from tests.support.system import IMAGE_SIZE, random_tensors, root_specs

EXPERIMENT = f"""
seed = 4
[root]
source = "file"
file = "root.safetensors"
[defaults]
image_size = {IMAGE_SIZE}
learning_rate = 0.05
crop_area_min = 0.5
flip = false
[search]
rounds = 1
children_per_task = 8
generation_size = 4
mutation_rate = 0.4
[training]
batch_size = 32
intervals = 2
batches_per_interval = 10
device = "cpu"
threads = 1
[[tasks]]
name = "digits"
source = "digits"
[[tasks]]
name = "greek"
source = "characters"
script = "GREEK"
max_classes = 4
"""


@pytest.fixture
def experiment(tmp_path: pathlib.Path) -> pathlib.Path:
    random = np.random.default_rng(0)
    layers = {position: (spec, random_tensors(spec, random)) for position, spec in root_specs().items()}
    save_root(tmp_path / "root.safetensors", layers, IMAGE_SIZE)
    (tmp_path / "experiment.toml").write_text(EXPERIMENT)
    return tmp_path / "experiment.toml"


def test_a_running_server_takes_up_a_task_that_splits_a_route_in_use_and_the_old_one_answers_with_the_same_bits(
    experiment: pathlib.Path,
):
    system, repository = experiment.parent / "system", experiment.parent / "repository"

    def grow(task: str) -> None:
        result = evolve("run", experiment, "--system", system, "--task", task, "--repository", repository)
        assert result.returncode == 0, result.stderr

    grow("digits")
    images = [encode((image * 15.9).astype(np.uint8)) for image in load_digits().images[:40]]
    with ServerProcess(repository) as process, Client(process.address) as client:
        _compare_accuracy(client, System.open(system))
        (old,) = client.list_tasks().tasks
        before = _logits(client, "digits", images)
        grow("greek")
        deadline = time.monotonic() + 120
        while client.list_tasks().generation < 2:
            assert time.monotonic() < deadline, "the server did not take up the new generation"
            time.sleep(0.05)
        new = {info.name: info for info in client.list_tasks().tasks}
        assert new["digits"].path_id == old.path_id
        assert len(new["digits"].route) > len(old.route), "the route in use was not split: another seed must set the scene"
        assert _logits(client, "digits", images) == before
        assert client.classify("greek", images[0]).generation == 2


def _logits(client: Client, task: str, images: list[bytes]) -> bytes:
    answers = client.classify(task, images, include_logits=True).classifications
    return b"".join(answer.logits.tobytes() for answer in answers if answer.logits is not None)


def _compare_accuracy(client: Client, system: System) -> None:
    """The accuracy through the server is the one that the search measured."""
    test = load_task_digits(DigitsTask(name="digits", source="digits")).test
    assert test is not None
    right = 0
    for start in range(0, len(test), 50):
        answers = client.classify("digits", list(test.images[start : start + 50])).classifications
        right += sum(int(a.top.index == label) for a, label in zip(answers, test.labels[start : start + 50], strict=True))
    # One image whose two best classes tie within rounding may fall either way.
    assert abs(right / len(test) - (system.tasks()["digits"].test_accuracy or 0)) <= 1.5 / len(test)
