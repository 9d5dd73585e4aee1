"""Every block of settings in docs/data.md loads data that fit what the page says."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from evolve.config import Experiment, load_settings
from evolve.data.load import load_task

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "data.md"
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_blocks_for_all_sources() -> None:
    assert set(re.findall(r'source = "(\w+)"', "".join(BLOCKS))) == {"folder", "csv", "arrays", "digits", "characters"}


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_settings(block: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for label in ("cat", "dog", "parrot"):
        (tmp_path / "images" / "pets" / label).mkdir(parents=True)
        for number in range(30):
            Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(
                tmp_path / f"images/pets/{label}/{number}.png"
            )
    (tmp_path / "birds" / "photos").mkdir(parents=True)
    lines = ["file,label,split"]
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(tmp_path / f"birds/photos/{number}.jpg")
        lines.append(f"{number}.jpg,{('sparrow', 'wren')[number % 2]},{('train', 'validation', 'test')[number // 4]}")
    (tmp_path / "birds" / "labels.csv").write_text("\n".join(lines))
    images = random.integers(0, 256, (90, 4, 4, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "shapes.npz", images=images, labels=np.arange(90) % 2)
    (tmp_path / "experiment.toml").write_text(block, encoding="utf-8")
    for task in load_settings(tmp_path / "experiment.toml", Experiment).tasks:
        data = load_task(task)
        assert len(data.train) > len(data.labels) >= 2
        assert len(data.validation)
