"""Rendered characters: the same images for the same settings everywhere, varied by distortion, independent of how many are asked for."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from evolve.config import CharactersTask
from evolve.data.characters import IMAGE_SIZE, render_letters
from evolve.data.letters import FONTS, held_out_fonts, letters_of
from evolve.data.load import load_task
from evolve.errors import DataError

SMALL = {"train_per_class": 3, "validation_per_class": 2, "test_per_class": 2, "max_classes": 5}


def task(**changes: object) -> CharactersTask:
    return CharactersTask(name="t", source="characters", **{"script": "GREEK", **SMALL, **changes})  # type: ignore[arg-type]


def test_splits_labels_and_shapes() -> None:
    seen: list[tuple[int, int]] = []
    data = load_task(task(), lambda done, of: seen.append((done, of)))
    assert data.labels == ("alpha", "beta", "gamma", "delta", "epsilon")
    assert data.test is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 10, 10)
    assert np.bincount(data.validation.labels).tolist() == [2] * 5
    assert data.train.labels.tolist() == sorted(data.train.labels.tolist())
    assert data.validation.labels.tolist() != sorted(data.validation.labels.tolist())
    assert {image.shape for image in data.train.images} == {(IMAGE_SIZE, IMAGE_SIZE, 3)}
    assert data.train.names[0] == "GREEK alpha train 0"
    assert seen[-1] == (35, 35)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_every_image_differs() -> None:
    data = load_task(task(train_per_class=20))
    assert data.test is not None
    images = [image.tobytes() for images in (data.train, data.validation, data.test) for image in images.images]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize(
    "change",
    [{"render_seed": 1}, {"distortion": 0.5}, {"script": "HEBREW"}, {"train_per_class": 4}, {"max_classes": 4}],
    ids=str,
)
def test_other_settings_give_other_data(change: dict[str, object]) -> None:
    assert load_task(task(**change)).fingerprint != load_task(task()).fingerprint


def test_an_image_does_not_change_when_more_are_asked_for() -> None:
    letters = letters_of("NKO")
    few, _ = render_letters(letters[2:4], "train", 3, distortion=1.0, seed=5)
    many, labels = render_letters(letters[:6], "train", 8, distortion=1.0, seed=5)
    assert np.array_equal(few.reshape(2, 3, IMAGE_SIZE, IMAGE_SIZE), many.reshape(6, 8, IMAGE_SIZE, IMAGE_SIZE)[2:4, :3])
    assert labels.tolist() == [label for label in range(6) for _ in range(8)]
    other, _ = render_letters(letters[2:4], "test", 3, distortion=1.0, seed=5)
    assert not np.array_equal(few, other)


def test_same_bytes_in_another_process() -> None:
    program = (
        "from evolve.config import CharactersTask\n"
        "from evolve.data.load import load_task\n"
        f"settings = CharactersTask(name='t', source='characters', script='GREEK', **{SMALL!r})\n"
        "print(load_task(settings).fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == load_task(task()).fingerprint


def test_no_distortion_is_clean_and_centred() -> None:
    images, _ = render_letters(letters_of("HEBREW"), "train", 4, distortion=0.0, seed=0)
    for image in images:
        assert image.max() == 255
        assert image.min() < 60
        assert (image[0] == 255).all()
        assert (image[:, 0] == 255).all()
        rows, columns = np.nonzero(image < 128)
        if len(rows):
            assert abs((rows.min() + rows.max()) / 2 - 15.5) <= 2
            assert abs((columns.min() + columns.max()) / 2 - 15.5) <= 2


def test_distortion_moves_images_away_from_the_mean() -> None:
    spread = []
    for distortion in (0.0, 0.5, 1.0, 2.0):
        images, labels = render_letters(letters_of("ARMENIAN")[:8], "train", 20, distortion=distortion, seed=0)
        shares = images.astype(np.float64)
        means = np.stack([shares[labels == label].mean(axis=0) for label in range(8)])
        spread.append(float(np.abs(shares - means[labels]).mean()))
    assert spread == sorted(spread)


def test_ink_stays_darker_than_paper_at_full_distortion() -> None:
    images, _ = render_letters(letters_of("LISU")[:10], "train", 10, distortion=3.0, seed=0)
    assert images.shape == (100, IMAGE_SIZE, IMAGE_SIZE)
    assert np.median(images.reshape(100, -1), axis=1).min() > 100


def test_classes_can_be_told_apart() -> None:
    # The nearest mean of the training images is as plain as a classifier can be: chance is 4 %.
    data = load_task(task(max_classes=25, train_per_class=30, test_per_class=10))
    assert data.test is not None
    train, test = (
        np.stack(list(images.images))[..., 0].reshape(len(images), -1).astype(float) for images in (data.train, data.test)
    )
    train -= train.mean(axis=1, keepdims=True)
    test -= test.mean(axis=1, keepdims=True)
    means = np.stack([train[data.train.labels == label].mean(axis=0) for label in range(25)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    accuracy = float(np.mean((test @ means.T).argmax(axis=1) == data.test.labels))
    assert accuracy > 0.4


def test_unknown_script() -> None:
    with pytest.raises(DataError, match="found script 'klingon'"):
        load_task(task(script="klingon"))


@pytest.mark.parametrize("script", ["GREEK", "GEORGIAN", "HEBREW", "LATIN"])
def test_held_out_fonts_draw_test_images_alone(script: str) -> None:
    for letter in letters_of(script):
        held_out = set(held_out_fonts(letter))
        assert held_out < set(letter.fonts)
        assert len(set(letter.fonts) - held_out) >= 2
        if len(letter.fonts) >= 4:
            assert held_out, letter
    assert held_out_fonts(letters_of("NKO")[0]) == (), "two fonts are too few to keep one back"


def test_held_out_fonts_of_the_common_letters_are_another_family() -> None:
    fonts = {FONTS[font] for letter in letters_of("GREEK")[:30] for font in held_out_fonts(letter)}
    assert {name[:4] for name in fonts} == {"STIX"}
    assert all(FONTS[font].startswith("DejaVuSerif") for font in held_out_fonts(letters_of("ARMENIAN")[0]))


def test_held_out_fonts_change_splits_as_they_say() -> None:
    plain, held = load_task(task(distortion=0)), load_task(task(distortion=0, held_out_fonts=True))
    assert plain.test is not None
    assert held.test is not None
    alpha = letters_of("GREEK")[0]

    def drawings(fonts: tuple[int, ...]) -> set[bytes]:
        only = [dataclasses.replace(alpha, fonts=(font,)) for font in fonts]
        return {image.tobytes() for one in only for image in render_letters([one], "any", 200, distortion=0, seed=0)[0]}

    own = drawings(held_out_fonts(alpha))
    others = drawings(tuple(font for font in alpha.fonts if font not in held_out_fonts(alpha)))
    assert not own & others
    for images, expected in ((held.train, others), (held.validation, others), (held.test, own)):
        alphas = [image[..., 0].tobytes() for image, label in zip(images.images, images.labels, strict=True) if label == 0]
        assert alphas
        assert set(alphas) <= expected
    assert plain.fingerprint != held.fingerprint


def test_letters_with_too_few_fonts_to_keep_any_back_are_counted() -> None:
    assert load_task(task(script="NKO", held_out_fonts=True)).warnings[0].startswith("5 of 5 letters have too few fonts")
    assert load_task(task(held_out_fonts=True)).warnings == ()
