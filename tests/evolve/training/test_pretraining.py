"""Pretraining a root: what it returns, that it learns, that it repeats itself, and every recipe that cannot be run."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import safetensors
import torch

from evolve.config import RootSettings, load_settings
from evolve.errors import DataError, SettingsError
from evolve.layer import POS_EMBED, block_position
from evolve.path import ordered_positions
from evolve.root import load_root
from evolve.training.pretraining import PretrainingResult, PretrainingSettings, PretrainingStatus, augment, pretrain, run_recipe

RECIPE = pathlib.Path(__file__).parents[3] / "evolve" / "recipes" / "root-characters.toml"

TINY = PretrainingSettings(
    scripts=("OGHAM",),
    train_per_class=4,
    validation_per_class=2,
    image_size=16,
    patch_size=8,
    width=12,
    heads=2,
    blocks=2,
    steps=12,
    batch_size=16,
    threads=1,
    device="cpu",
)


def tiny(**changes: object) -> PretrainingSettings:
    return PretrainingSettings.model_validate({**TINY.model_dump(), **changes})


@pytest.fixture(scope="module")
def result() -> PretrainingResult:
    return pretrain(TINY)


def test_layers_make_a_root(result: PretrainingResult) -> None:
    assert tuple(result.layers) == ordered_positions(2, (), with_head=False)
    assert result.image_size == 16
    assert result.num_classes == 26
    assert result.num_trained_images == 12 * 16
    spec, tensors = result.layers[POS_EMBED]
    assert (spec.integer("grid_height"), tensors["weight"].shape) == (2, (5, 12))
    assert result.layers[block_position(1)][0].integer("heads") == 2
    assert all(tensor.dtype == np.float32 for _, tensors in result.layers.values() for tensor in tensors.values())


def test_same_settings_same_weights(result: PretrainingResult) -> None:
    def same(other: PretrainingResult) -> bool:
        return all(
            np.array_equal(tensor, other.layers[position][1][name])
            for position, (_, tensors) in result.layers.items()
            for name, tensor in tensors.items()
        )

    torch.manual_seed(99)
    assert same(pretrain(TINY))
    assert not same(pretrain(tiny(seed=1)))


def test_process_state_is_left_alone() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    pretrain(tiny(threads=2, steps=1))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_progress() -> None:
    seen: list[PretrainingStatus] = []
    result = pretrain(tiny(steps=25), seen.append)
    assert [status.step for status in seen] == list(range(1, 26))
    assert {status.num_steps for status in seen} == {25}
    measured = [status.validation_accuracy for status in seen if status.validation_accuracy is not None]
    assert len(measured) == 13
    assert seen[-1].validation_accuracy == measured[-1] == result.validation_accuracy
    assert all(status.loss > 0 and 0 <= status.train_accuracy <= 1 for status in seen)


def test_it_learns() -> None:
    settings = tiny(
        train_per_class=20, validation_per_class=5, distortion=0.3, augmentation=0.0, inverted=0.0, width=48, heads=3,
        steps=150, batch_size=32, learning_rate=0.003, image_size=32, patch_size=16,
    )  # fmt: skip
    result = pretrain(settings)
    # Chance is 4 %.
    assert result.validation_accuracy > 0.5
    assert result.train_accuracy > 0.5


def test_a_saved_root_can_be_loaded(result: PretrainingResult, tmp_path: pathlib.Path) -> None:
    lines: list[str] = []
    file = tmp_path / "new" / "root.safetensors"
    run_recipe(TINY, file, lines.append)
    assert lines[0].startswith("step 1/12  loss ")
    assert lines[-1].startswith(f"wrote {file}: 26 letters, validation accuracy ")
    with safetensors.safe_open(file, framework="numpy") as content:
        info = content.metadata()
    assert PretrainingSettings.model_validate_json(info["recipe"]) == TINY
    assert json.loads(info["figures"])["num_classes"] == 26
    loaded = load_root(RootSettings(source="file", file=file))
    assert loaded.image_size == 16
    for position, (spec, tensors) in result.layers.items():
        assert loaded.layers[position][0] == spec
        for name, tensor in tensors.items():
            assert np.allclose(loaded.layers[position][1][name], tensor, atol=1e-3, rtol=1e-3)


def test_augmentation_without_strength_changes_nothing() -> None:
    images = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    same = augment(images, 32, 0.0, 0.0, torch.Generator().manual_seed(0))
    assert torch.allclose(same, images / 127.5 - 1, atol=1e-5)
    inverted = augment(images, 32, 0.0, 1.0, torch.Generator().manual_seed(0))
    assert torch.allclose(inverted, 1 - images / 127.5, atol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_augmentation_keeps_the_range_and_follows_its_generator(size: int) -> None:
    images = torch.randint(0, 256, (4, 32, 32), dtype=torch.uint8)
    first, again, other = (augment(images, size, 1.0, 0.5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == (4, size, size)
    assert first.min() >= -1
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_bundled_recipe_leaves_the_scripts_of_tasks_alone() -> None:
    recipe = load_settings(RECIPE, PretrainingSettings)
    assert not {"GREEK", "LATIN", "ARMENIAN", "HEBREW", "NKO"} & set(recipe.scripts)
    assert (recipe.width, recipe.blocks, recipe.image_size) == (192, 3, 32)


# Recipes that cannot be run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("patch_size = 5", "image_size 32 is no multiple of patch_size 5"),
        ("heads = 5", "width 192 is no multiple of heads 5"),
        ('scripts = ["LAO", "lao"]', "scripts ['LAO'] appear more than once"),
        ("scripts = []", "scripts: Tuple should have at least 1 item"),
        ("steps = 0", "steps: found 0, expected a whole number of at least 1"),
        ("label_smoothing = 1.0", "label_smoothing: found 1.0, expected a number of at least 0 and below 1"),
        ("step = 9", "step: unknown setting; did you mean 'steps'"),
    ],
)
def test_impossible_settings(tmp_path: pathlib.Path, line: str, message: str) -> None:
    lines = [line] if line.startswith("scripts") else ['scripts = ["LAO"]', line]
    file = tmp_path / "recipe.toml"
    file.write_text("\n".join(lines))
    with pytest.raises(SettingsError) as caught:
        load_settings(file, PretrainingSettings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("root.pth", "a name that ends in .safetensors"),
        ("folder.safetensors", "(Is a directory)"),
        ("file/root.safetensors", "a file that can be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_found_out_first(tmp_path: pathlib.Path, name: str, message: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    with pytest.raises(SettingsError) as caught:
        run_recipe(TINY, tmp_path / name, lines.append)
    assert message in str(caught.value)
    assert not lines


def test_unknown_script() -> None:
    with pytest.raises(DataError, match="found script 'KLINGON'"):
        pretrain(tiny(scripts=("KLINGON",)))


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="found device = 'cuda' and no CUDA device"):
        pretrain(tiny(device="cuda"))


def test_divergence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., torch.Tensor] = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *given, **named: original(*given, **named) * float("nan"))
    with pytest.raises(SettingsError, match="found a loss of nan after 1 steps.*lower learning_rate"):
        pretrain(TINY)
