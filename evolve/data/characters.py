"""Tasks of rendered characters: the letters of a script, drawn in many fonts, distorted and photographed badly.

An image is drawn in a random font of those that have the letter, a little bolder or not, dark on light. With distortion 0 it is upright,
centred and clean, and only font and boldness vary. With distortion 1 it is turned by up to 15 degrees, sheared, stretched, shifted,
warped on a grid of nine fields (which makes it look handwritten rather than printed), blurred, noisy and of low contrast, each by an
amount drawn evenly up to its limit; the limits grow with `distortion`. It is never inverted: that is left to augmentation. The ink
fills the same square for every letter, so size tells nothing. With `held_out_fonts`, test images are drawn in fonts of their own.

Each image has a generator of its own, derived from seed, script, letter, split and number: no image changes when more are asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from evolve.config import CharactersTask
from evolve.data.letters import GLYPH_SIZE, NUM_STROKES, Letter, glyph, held_out_fonts, letters_of
from evolve.data.task import ImageSet, TaskData
from munet.preprocessing import to_rgb

IMAGE_SIZE = 32
"""Height and width of the images, in pixels."""

Grey = npt.NDArray[np.uint8]
"""Grey values: [height, width] or [images, height, width] uint8, 0 is black."""

_CANVAS = 2 * IMAGE_SIZE
_INK_SIZE = 42
_CELLS = 3
_EDGES = tuple(round(_CANVAS * step / _CELLS) for step in range(_CELLS + 1))


@dataclasses.dataclass(frozen=True)
class Distortion:
    """Greatest amounts of each distortion; every image draws its own up to them.

    Attributes:
        rotation: in degrees, either way.
        shear: in widths per height, either way.
        stretch: of width and height each, either way, as a natural logarithm.
        shift: across and down each, either way, in pixels.
        warp: of each corner of the grid, across and down each, either way, in pixels.
        blur: standard deviation, in pixels.
        noise: standard deviation, in grey values.
        fading: of paper and of ink towards the middle, in grey values.
    """

    rotation: float = 15.0
    shear: float = 0.25
    stretch: float = 0.2
    shift: float = 2.5
    warp: float = 1.3
    blur: float = 0.8
    noise: float = 20.0
    fading: float = 80.0

    def scaled(self, strength: float) -> Distortion:
        """Returns all amounts times `strength`; ink stays darker than paper."""
        amounts = {field.name: getattr(self, field.name) * strength for field in dataclasses.fields(self)}
        return Distortion(**{**amounts, "fading": min(amounts["fading"], 100.0)})


STANDARD = Distortion()
"""What `distortion = 1` means."""


def load_characters(task: CharactersTask, progress: Callable[[int, int], None] | None = None) -> TaskData:
    """Renders the splits of a task.

    Raises:
        DataError: the fonts draw no such script.
    """
    letters = letters_of(task.script)[: task.max_classes]
    counts = {"train": task.train_per_class, "validation": task.validation_per_class, "test": task.test_per_class}
    total = len(letters) * sum(counts.values())
    splits = {}
    done = 0
    for split, count in counts.items():
        drawn = [_with_fonts_of(letter, split) for letter in letters] if task.held_out_fonts else letters

        def report(rendered: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + rendered, total)

        grey, labels = render_letters(drawn, split, count, distortion=task.distortion, seed=task.render_seed, progress=report)
        names = [f"{letter.script} {letter.label} {split} {index}" for letter in letters for index in range(count)]
        splits[split] = ImageSet([to_rgb(image) for image in grey], labels, names)
        done += len(labels)
    names_of_classes = tuple(letter.label for letter in letters)
    return TaskData(task.name, names_of_classes, splits["train"], splits["validation"], splits["test"], _warnings(task, letters))


def _warnings(task: CharactersTask, letters: Sequence[Letter]) -> tuple[str, ...]:
    without = sum(not held_out_fonts(letter) for letter in letters) if task.held_out_fonts else 0
    if not without:
        return ()
    return (f"{without} of {len(letters)} letters have too few fonts to keep any back: their test images show fonts of training",)


def _with_fonts_of(letter: Letter, split: str) -> Letter:
    """Returns a letter with the fonts that its images of a split are drawn in if fonts are held out for the test."""
    held_out = held_out_fonts(letter)
    others = tuple(font for font in letter.fonts if font not in held_out)
    return dataclasses.replace(letter, fonts=held_out if held_out and split == "test" else others)


def render_letters(
    letters: Sequence[Letter],
    split: str,
    count: int,
    *,
    distortion: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Grey, npt.NDArray[np.int64]]:
    """Renders images of letters, of one script or of many.

    Args:
        letters: the classes.
        split: any name; another gives other images.
        count: images of each letter.
        distortion: 0 is none, 1 the standard; see Distortion.
        seed: another gives other images.
        progress: is told after each letter how many images are done, and of how many.

    Returns:
        Images [letters * count, IMAGE_SIZE, IMAGE_SIZE] uint8, all of the first letter, then all of the second and so on, and their
        labels [letters * count] int64, indices of `letters`.
    """
    images = np.empty((len(letters), count, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    amounts = STANDARD.scaled(distortion)
    for row, letter in enumerate(letters):
        for index in range(count):
            images[row, index] = render(letter, amounts, _generator(seed, letter, split, index))
        if progress is not None:
            progress((row + 1) * count, len(letters) * count)
    labels = np.repeat(np.arange(len(letters), dtype=np.int64), count)
    return images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE), labels


def render(letter: Letter, amounts: Distortion, generator: np.random.Generator) -> Grey:
    """Renders one image, [IMAGE_SIZE, IMAGE_SIZE] uint8."""
    choices = generator.random(4)
    ink = glyph(
        letter.character,
        letter.fonts[int(choices[0] * len(letter.fonts))],
        int(choices[1] * NUM_STROKES),
    )
    warped = ink.transform(
        (_CANVAS, _CANVAS), Image.Transform.MESH, _mesh(ink.size, amounts, generator), Image.Resampling.BILINEAR
    ).reduce(_CANVAS // IMAGE_SIZE)
    if amounts.blur > 0:
        warped = warped.filter(ImageFilter.GaussianBlur(amounts.blur * generator.random()))
    share = np.asarray(warped, dtype=np.float32) / 255
    black, white = amounts.fading * choices[2], 255 - amounts.fading * choices[3]
    grey = white + (black - white) * share
    if amounts.noise > 0:
        deviation = amounts.noise * generator.random()
        grey = grey + deviation * generator.standard_normal(grey.shape, dtype=np.float32)
    rounded: Grey = np.rint(np.clip(grey, 0, 255)).astype(np.uint8)
    return rounded


def _mesh(
    ink_size: tuple[int, int], amounts: Distortion, generator: np.random.Generator
) -> list[tuple[tuple[int, int, int, int], tuple[float, ...]]]:
    """Returns the fields of the canvas, each with where its corners lie on the ink, counter-clockwise from the top left."""
    rotation, shear, stretch_x, stretch_y, shift_x, shift_y = (2 * generator.random(6) - 1).tolist()
    angle = math.radians(amounts.rotation * rotation)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    lean = np.array([[1.0, amounts.shear * shear], [0.0, 1.0]])
    scale = np.diag(np.exp([amounts.stretch * stretch_x, amounts.stretch * stretch_y])) * (GLYPH_SIZE / _INK_SIZE)
    unit = _CANVAS / IMAGE_SIZE
    shift = np.array([shift_x, shift_y]) * (amounts.shift * unit)
    corners = np.array([[(x, y) for x in _EDGES] for y in _EDGES], dtype=np.float64) - _CANVAS / 2 - shift
    corners += (2 * generator.random(corners.shape) - 1) * (amounts.warp * unit)
    on_ink = (corners @ (turn.T @ lean.T @ scale) + np.array(ink_size) / 2).tolist()
    return [
        (
            (_EDGES[x], _EDGES[y], _EDGES[x + 1], _EDGES[y + 1]),
            (*on_ink[y][x], *on_ink[y + 1][x], *on_ink[y + 1][x + 1], *on_ink[y][x + 1]),
        )
        for y in range(_CELLS)
        for x in range(_CELLS)
    ]


def _generator(seed: int, letter: Letter, split: str, index: int) -> np.random.Generator:
    key = f"{seed}\n{letter.script}\n{ord(letter.character)}\n{split}\n{index}".encode()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest())))
