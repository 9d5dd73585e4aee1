"""The recipes that come with munet: they load, and what they promise of their data holds."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

from evolve.config import CharactersTask, DigitsTask, Experiment, FolderTask, TorchvisionTask, load_settings
from evolve.data.letters import held_out_fonts, letters_of
from evolve.data.load import load_task
from evolve.data.torchvision_source import SETS
from evolve.training.pretraining import PretrainingSettings
from tests.support.published import pixels, png

RECIPES = pathlib.Path(__file__).parents[2] / "evolve" / "recipes"


@pytest.fixture(scope="module")
def characters() -> Experiment:
    return load_settings(RECIPES / "characters.toml", Experiment)


def test_the_benchmark_has_the_digits_and_seven_scripts_that_the_root_never_saw(characters: Experiment) -> None:
    root = load_settings(RECIPES / "root-characters.toml", PretrainingSettings)
    scripts = [task.script for task in characters.tasks if isinstance(task, CharactersTask)]
    assert len(set(scripts)) == len(scripts) == 7
    assert not set(scripts) & set(root.scripts)
    assert [type(task) for task in characters.tasks].count(DigitsTask) == 1


def test_rendered_tasks_are_large_enough_to_judge_by(characters: Experiment) -> None:
    for task in characters.tasks:
        if isinstance(task, CharactersTask):
            letters = letters_of(task.script)[: task.max_classes]
            assert 20 <= task.train_per_class <= 60
            assert task.validation_per_class * len(letters) >= 1000
            assert task.test_per_class * len(letters) >= 2000
            assert task.held_out_fonts
            # Two fonts are too few to keep one back.
            assert all(held_out_fonts(letter) for letter in letters) == (task.script != "NKO")


# The settings of the paper

PUBLISHED = {
    "characters-paper": (("vit_tiny_patch16_224.augreg_in21k", 3), 32, (512, 100, 5, 10), 8),
    "decathlon-paper": (("vit_base_patch16_224.augreg_in21k", None), 80, (256, 200, 30, 10), 10),
}
"""Model and blocks of the root; image size; batch, batches an interval, intervals, validation batches; number of tasks."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_of_the_paper_have_its_settings(name: str) -> None:
    recipe = load_settings(RECIPES / f"{name}.toml", Experiment)
    root, image_size, amounts, num_tasks = PUBLISHED[name]
    assert (recipe.root.source, recipe.root.model, recipe.root.blocks) == ("timm", *root)
    training = recipe.training
    assert (training.batch_size, training.batches_per_interval, training.intervals, training.validation_batches) == amounts
    search = recipe.search
    assert (search.rounds, search.children_per_task, search.generation_size, search.mutation_rate) == (2, 64, 8, 0.1)
    assert (search.auto_tune, search.mutate_blocks, search.scale_factor) == (True, True, 1.0)
    start = recipe.defaults
    assert (start.image_size, start.adapter_width, start.learning_rate, start.schedule) == (image_size, 32, 0.01, "cosine")
    assert (start.warmup_ratio, start.momentum, start.nesterov) == (0.1, 0.9, False)
    assert (start.crop_area_min, start.crop_aspect_min, start.flip) == (0.05, 0.75, True)
    assert start.brightness == start.contrast == start.saturation == start.hue == 0
    assert len(recipe.tasks) == num_tasks


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_of_the_paper_fetch_nothing_by_themselves_and_say_how_much_they_train(name: str) -> None:
    recipe = load_settings(RECIPES / f"{name}.toml", Experiment)
    for task in recipe.tasks:
        assert isinstance(task, FolderTask | TorchvisionTask)
        if isinstance(task, TorchvisionTask):
            assert not task.download
            assert task.dataset in SETS
            assert set(task.arguments) <= set(SETS[task.dataset].arguments)
    search, training = recipe.search, recipe.training
    steps = search.rounds * search.children_per_task * training.intervals * training.batches_per_interval
    said = re.search(r"= ([\d,]+) million\s", (RECIPES / f"{name}.toml").read_text().replace("\n# ", " "))
    assert said is not None
    assert int(said[1].replace(",", "")) == round(len(recipe.tasks) * steps * training.batch_size / 1e6)


def test_what_the_decathlon_recipe_does_with_its_files_makes_tasks_of_them(tmp_path: pathlib.Path) -> None:
    text = (RECIPES / "decathlon-paper.toml").read_text()
    script = re.search(r"python - <<'END'\n(.*?)# +END", text, re.DOTALL)
    assert script is not None
    for split, count in (("train", 8), ("val", 6)):
        for label, seed in (("0001", 1), ("0002", 2)):
            folder = tmp_path / "data" / "decathlon" / "dtd" / split / label
            folder.mkdir(parents=True)
            for index, image in enumerate(pixels(count, 8, 9, 3, seed=seed + 10 * count)):
                (folder / f"{index:06}.png").write_bytes(png(image))
    (tmp_path / "data" / "decathlon" / "dtd" / "test").mkdir()
    (tmp_path / "data" / "decathlon" / "dtd" / "test" / "000000.png").write_bytes(b"without a label")
    (tmp_path / "data" / "decathlon" / "decathlon_mean_std.pickle").write_bytes(b"")
    code = "\n".join(line.removeprefix("#   ").rstrip("#") for line in script[1].splitlines())
    # The second time, nothing is left to do.
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    (tmp_path / "recipe.toml").write_text(text)
    (task,) = [task for task in load_settings(tmp_path / "recipe.toml", Experiment).tasks if task.name == "dtd"]
    data = load_task(task)
    assert [len(data.train), len(data.validation), len(data.test or ())] == [16, 6, 6]
    assert data.labels == ("0001", "0002")
    assert len(list((tmp_path / "data").rglob("*.png"))) == 2 * (8 + 6) + 1
