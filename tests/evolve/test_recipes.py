"""The recipes that come with munet: they load, and what they promise of their data holds."""

from __future__ import annotations

import pathlib

import pytest

from evolve.config import CharactersTask, DigitsTask, Experiment, load_settings
from evolve.data.letters import held_out_fonts, letters_of
from evolve.training.pretraining import PretrainingSettings

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
