"""One small experiment, and processes of munet-evolve that start at once."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from evolve.root import save_root
from tests.support.commands import Commands
from tests.support.system import ADAPTER_WIDTH, IMAGE_SIZE, random_tensors, root_specs

TASKS = ("a", "b", "c")

SETTINGS = f"""
[root]
source = "file"
file = "root.safetensors"
[defaults]
image_size = {IMAGE_SIZE}
adapter_width = {ADAPTER_WIDTH}
learning_rate = 0.05
crop_area_min = 0.5
flip = false
[search]
rounds = 2
children_per_task = 6
generation_size = 3
mutation_rate = 0.3
[training]
batch_size = 16
intervals = 2
batches_per_interval = 2
device = "cpu"
threads = 1
""" + "".join(f'[[tasks]]\nname = "{name}"\nsource = "arrays"\nfile = "{name}.npz"\n' for name in TASKS)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("output")) as started:
        yield started


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("experiment")
    generator = np.random.default_rng(0)
    layers = {position: (spec, random_tensors(spec, generator)) for position, spec in root_specs().items()}
    save_root(folder / "root.safetensors", layers, IMAGE_SIZE)
    for name in TASKS:
        labels = np.arange(60) % 3
        images = generator.integers(0, 150, (60, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        images[np.arange(60), :, :, labels] += 100
        np.savez(folder / f"{name}.npz", images=images, labels=np.array(["red", "green", "blue"])[labels])
    (folder / "experiment.toml").write_text(SETTINGS)
    return folder / "experiment.toml"
