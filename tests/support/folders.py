"""Folders of small images, one folder a class, and tasks that are loaded from them."""

import pathlib

import pytest
from PIL import Image

from evolve.config import FolderTask
from evolve.data.load import load_task
from evolve.data.task import TaskData
from evolve.errors import DataError


def write(file: pathlib.Path, value: int = 0, size: tuple[int, int] = (4, 3)) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(file)
    return file


def fill(folder: pathlib.Path, count: int, start: int = 0) -> None:
    for index in range(count):
        write(folder / f"{index:03}.png", start + index)


def load(folder: pathlib.Path, **settings: object) -> TaskData:
    return load_task(FolderTask(name="t", source="folder", folder=folder, **settings))  # type: ignore[arg-type]


def failure(folder: pathlib.Path, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, **settings)
    return str(caught.value)


def splits_of(data: TaskData) -> dict[str, set[str]]:
    assert data.test is not None
    return {"train": set(data.train.names), "validation": set(data.validation.names), "test": set(data.test.names)}
