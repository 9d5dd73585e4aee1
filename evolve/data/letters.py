"""Letters of the scripts that the fonts shipped with matplotlib can draw: which there are, what they are called, their glyphs.

What counts as a letter of a script (so that the classes of a task can be told apart by their shape):

- a code point that Unicode names `SCRIPT [FINAL] SMALL LETTER ...`, `SCRIPT LETTER ...`, `CANADIAN SYLLABICS ...`: a letter by category, no
  modifier letter, with no decomposition (`alpha with tonos` is left out, and so are ligatures and presentation forms);
- capitals are left out where the script has small letters;
- at least two fonts draw it;
- no earlier letter of the script has the same glyph but for its size and place in some font.

The fonts are those of the installed matplotlib, drawn by Pillow's FreeType: letters and images are the same for the same versions of both.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import unicodedata
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from evolve.errors import DataError

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSansMono",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "STIXGeneral",
    "STIXGeneralItalic",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
)
"""Names of the fonts, in a fixed order. Of what matplotlib ships, these draw letters of their own for text."""

_FAMILIES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIX")

GLYPH_SIZE = 48
"""Longer side of a glyph's ink as `glyph` returns it, in pixels."""

NUM_STROKES = 4
"""Strokes from 0, as the font draws it, in steps of one thirty-second of a glyph's size, to this minus 1."""

_FONT_SIZE = 96
_SAME_GLYPH = 0.004

_NAME = re.compile(r"(?P<script>CANADIAN SYLLABICS|.+?) (?P<letter>(?:(?:FINAL )?(?:SMALL|CAPITAL) |LETTER |(?<=SYLLABICS ).).*)")


@dataclasses.dataclass(frozen=True)
class Letter:
    """One letter.

    Attributes:
        character: the letter itself, one code point.
        script: as Unicode names it, such as `GREEK`.
        label: a short readable name that no other letter of the script has, such as `alpha`.
        fonts: indices in FONTS of the fonts that draw it; two or more.
    """

    character: str
    script: str
    label: str
    fonts: tuple[int, ...]


def known_scripts() -> Mapping[str, int]:
    """Returns the number of letters by script, for all scripts with at least two, in alphabetical order."""
    counts = {script: len(_letters(script)) for script in sorted(_candidates())}
    return {script: count for script, count in counts.items() if count >= 2}


def letters_of(script: str) -> tuple[Letter, ...]:
    """Returns the letters of a script: those that most fonts draw first, then in the order of code points.

    So the first few are the common ones: of GREEK alpha to omega, archaic letters after them.

    Args:
        script: as Unicode names it, in capitals or small letters.

    Raises:
        DataError: no font draws two letters of such a script.
    """
    found = _letters(" ".join(script.upper().split()))
    if len(found) < 2:
        listed = ", ".join(f"{name} ({count})" for name, count in known_scripts().items())
        raise DataError(
            f"found script {script!r}, of which the fonts draw {len(found) or 'no'} letter{'s' * (len(found) != 1)}",
            f"one of these, with so many letters each: {listed}",
        )
    return found


def held_out_fonts(letter: Letter) -> tuple[int, ...]:
    """Returns the fonts that a letter's test images can have to themselves; none if it has too few fonts for that.

    Of several families, all fonts of one: STIX, or else DejaVu Serif, whose shapes differ most from those of the others. Of four or more
    fonts of one family, the bold half. So at least two fonts are left to train with.
    """
    families = {font: _family(font) for font in letter.fonts}
    if len(set(families.values())) > 1:
        last = max(families.values())
        held_out = tuple(font for font in letter.fonts if families[font] == last)
    else:
        held_out = tuple(font for font in letter.fonts if "Bol" in FONTS[font]) if len(letter.fonts) >= 4 else ()
    return held_out if len(letter.fonts) - len(held_out) >= 2 else ()


def _family(font: int) -> int:
    """Returns the index in _FAMILIES of a font's family."""
    matching = [index for index, family in enumerate(_FAMILIES) if FONTS[font].startswith(family)]
    # The longest name counts: DejaVuSansMono begins as DejaVuSans does.
    return max(matching, key=lambda index: len(_FAMILIES[index]))


@functools.cache
def glyph(character: str, font: int, stroke: int = 0) -> Image.Image:
    """Returns the ink of a character, its longer side GLYPH_SIZE pixels, with a clear margin of one pixel around it.

    Args:
        character: one code point that the font draws.
        font: index in FONTS.
        stroke: how much bolder than the font draws it, 0 to NUM_STROKES - 1.

    Returns:
        An image of mode L: 0 is paper, 255 is ink. It is shared: do not change it.

    Raises:
        ValueError: the font draws no ink for the character.
    """
    ink = Image.new("L", (4 * _FONT_SIZE, 4 * _FONT_SIZE))
    ImageDraw.Draw(ink).text(
        (2 * _FONT_SIZE, 2 * _FONT_SIZE), character, fill=255, font=_font(font), anchor="mm", stroke_width=stroke
    )
    box = ink.getbbox()
    if box is None:
        raise ValueError(f"found no ink for {character!r} in {FONTS[font]}, expected a glyph")
    ink = ink.crop(box)
    scale = GLYPH_SIZE / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    framed = Image.new("L", (size[0] + 2, size[1] + 2))
    framed.paste(ink.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC), (1, 1))
    return framed


@functools.cache
def _font(font: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_file(font), size=_FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _file(font: int) -> pathlib.Path:
    return pathlib.Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{FONTS[font]}.ttf"


@functools.cache
def _candidates() -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    """Returns by script the fonts that say that they have a letter, by letter in the order of code points."""
    fonts_of: dict[int, list[int]] = {}
    for font in range(len(FONTS)):
        for code in FT2Font(str(_file(font))).get_charmap():
            fonts_of.setdefault(code, []).append(font)
    scripts: dict[str, dict[str, tuple[int, ...]]] = {}
    for code in sorted(fonts_of):
        character = chr(code)
        named = _NAME.fullmatch(unicodedata.name(character, ""))
        if named and _is_letter(character, named["script"]):
            scripts.setdefault(named["script"], {})[character] = tuple(fonts_of[code])
    return scripts


def _is_letter(character: str, script: str) -> bool:
    decomposition = unicodedata.decomposition(character)
    # The mathematical alphabets are all given as variants of plain letters; within one of them nothing is twice.
    plain = not decomposition or (script.startswith("MATHEMATICAL") and decomposition.startswith("<font>"))
    return plain and unicodedata.category(character) in ("Ll", "Lo", "Lu")


@functools.cache
def _letters(script: str) -> tuple[Letter, ...]:
    candidates = _candidates().get(script, {})
    has_case = {"Ll", "Lu"} <= {unicodedata.category(character) for character in candidates}
    chosen: dict[str, tuple[int, ...]] = {}
    shapes = {font: _Shapes(len(candidates)) for font in range(len(FONTS))}
    for character, claimed in candidates.items():
        if has_case and unicodedata.category(character) == "Lu":
            continue
        drawn = {font: shape for font in claimed if (shape := _shape(character, font)) is not None}
        if len(drawn) < 2 or any(shapes[font].holds(shape) for font, shape in drawn.items()):
            continue
        for font, shape in drawn.items():
            shapes[font].add(shape)
        chosen[character] = tuple(drawn)
    ordered = tuple(sorted(chosen, key=lambda character: (-len(chosen[character]), character)))
    labels = _labels(ordered, script)
    return tuple(Letter(character, script, labels[character], chosen[character]) for character in ordered)


def _shape(character: str, font: int) -> npt.NDArray[np.float32] | None:
    """Returns the ink of a glyph on a square of 32 x 32, 0 to 1, centred; None if there is none."""
    try:
        ink = glyph(character, font)
    except ValueError:
        return None
    square = Image.new("L", (GLYPH_SIZE + 2, GLYPH_SIZE + 2))
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    return np.asarray(square.resize((32, 32), Image.Resampling.BOX), dtype=np.float32) / np.float32(255)


class _Shapes:
    """Glyphs of one font, to find out whether another looks like one of them."""

    def __init__(self, capacity: int) -> None:
        self._rows = np.empty((capacity, 32 * 32), dtype=np.float32)
        self._squares = np.empty(capacity, dtype=np.float32)
        self._count = 0

    def holds(self, shape: npt.NDArray[np.float32]) -> bool:
        row = shape.ravel()
        rows, squares = self._rows[: self._count], self._squares[: self._count]
        return bool(np.any((squares + row @ row - 2 * (rows @ row)) / row.size < _SAME_GLYPH))

    def add(self, shape: npt.NDArray[np.float32]) -> None:
        row = shape.ravel()
        self._rows[self._count] = row
        self._squares[self._count] = row @ row
        self._count += 1


def _labels(characters: tuple[str, ...], script: str) -> dict[str, str]:
    """Returns the shortest form of each name that is unique within the script: `alpha`, or else `small alpha`, or all of it."""
    names = {character: unicodedata.name(character).removeprefix(script + " ").lower() for character in characters}
    shortened = [
        {character: re.sub(r"^(small letter|letter|small) ", "", name) for character, name in names.items()},
        {character: re.sub(r"\bletter ", "", name) for character, name in names.items()},
        names,
    ]
    taken: set[str] = set()
    result = {}
    for character in characters:
        forms = [form[character] for form in shortened]
        result[character] = next((form for form in forms if form not in taken), f"{forms[-1]} {ord(character):04x}")
        taken.add(result[character])
    return result
