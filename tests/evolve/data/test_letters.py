"""Which letters a script has, what they are called, and what an unknown script is told."""

import unicodedata

import numpy as np
import pytest

from evolve.data.letters import FONTS, GLYPH_SIZE, NUM_STROKES, glyph, known_scripts, letters_of
from evolve.errors import DataError


@pytest.mark.parametrize(
    "script", ["GREEK", "ARMENIAN", "HEBREW", "NKO", "LATIN", "CANADIAN SYLLABICS", "GEORGIAN", "MATHEMATICAL SCRIPT"]
)
def test_letters_keep_the_rules(script: str) -> None:
    letters = letters_of(script)
    assert len({letter.label for letter in letters}) == len(letters)
    assert len({letter.character for letter in letters}) == len(letters)
    cased = {"Ll"} <= {unicodedata.category(letter.character) for letter in letters}
    for letter in letters:
        assert unicodedata.name(letter.character).startswith(script + " ")
        assert len(letter.fonts) >= 2
        assert not cased or unicodedata.category(letter.character) != "Lu"
        assert script.startswith("MATHEMATICAL") or not unicodedata.decomposition(letter.character)


def test_common_letters_come_first_and_labels_are_short() -> None:
    labels = [letter.label for letter in letters_of("GREEK")]
    assert labels[:4] == ["alpha", "beta", "gamma", "delta"]
    assert labels[17:25] == ["final sigma", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"]
    assert [letter.label for letter in letters_of("LATIN")][:26] == list("abcdefghijklmnopqrstuvwxyz")


def test_scripts_within_scripts_are_told_apart() -> None:
    assert {letter.label for letter in letters_of("MATHEMATICAL BOLD FRAKTUR")} == set("abcdefghijklmnopqrstuvwxyz")
    assert not any("FRAKTUR" in unicodedata.name(letter.character) for letter in letters_of("MATHEMATICAL BOLD"))


def test_letters_that_look_alike_are_left_out() -> None:
    # DejaVu draws the barred o of Cyrillic like its fita, and the farsi yeh of Arabic like alef maksura.
    assert "\u04e9" not in {letter.character for letter in letters_of("CYRILLIC")}
    assert "\u06cc" not in {letter.character for letter in letters_of("ARABIC")}


@pytest.mark.parametrize("script", ["greek", " Greek ", "GREEK"])
def test_case_and_spaces_of_a_script_do_not_matter(script: str) -> None:
    assert letters_of(script) == letters_of("GREEK")


@pytest.mark.parametrize("script", ["KLINGON", "", "GREEK SMALL", "HIRAGANA"])
def test_unknown_script_names_those_that_there_are(script: str) -> None:
    with pytest.raises(DataError) as caught:
        letters_of(script)
    assert f"found script {script!r}, of which the fonts draw no letters" in str(caught.value)
    assert f"GREEK ({len(letters_of('GREEK'))}), HEBREW (27)" in str(caught.value)


def test_known_scripts_are_sorted_and_large_enough() -> None:
    scripts = known_scripts()
    assert list(scripts) == sorted(scripts)
    assert min(scripts.values()) >= 2
    assert {
        "ARABIC",
        "ARMENIAN",
        "CANADIAN SYLLABICS",
        "CYRILLIC",
        "GEORGIAN",
        "GREEK",
        "HEBREW",
        "LAO",
        "LATIN",
        "LISU",
        "NKO",
    } <= set(scripts)


def test_glyphs_fill_the_same_square() -> None:
    for letter in letters_of("ARMENIAN"):
        for font in letter.fonts:
            ink = glyph(letter.character, font)
            assert max(ink.size) == GLYPH_SIZE + 2
            pixels = np.asarray(ink)
            assert pixels.max() > 200
            assert not pixels[[0, -1]].any()
            assert not pixels[:, [0, -1]].any()


def test_strokes_make_glyphs_bolder() -> None:
    ink = [np.asarray(glyph("\u03c6", 0, stroke), dtype=float).mean() for stroke in range(NUM_STROKES)]
    assert ink == sorted(ink)
    assert ink[-1] > ink[0] + 5


def test_character_without_ink() -> None:
    with pytest.raises(ValueError, match=f"found no ink for ' ' in {FONTS[0]}"):
        glyph(" ", 0)
