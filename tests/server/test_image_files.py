from __future__ import annotations

import io
import os
import pathlib

import pytest

from server.errors import SettingsError
from server.image_files import check_images, find_images
from tests.support.permissions import without_override


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    for name in (
        "b.png",
        "a/2.JPG",
        "a/10.jpeg",
        "a/z/1.webp",
        "c.bmp",
        "a/notes.txt",
        ".hidden.png",
        ".cache/1.png",
        "d/e/f.gif",
    ):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.png").write_bytes(b"")
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "other" / "linked.png")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*arguments: str) -> list[str]:
    check_images(arguments)
    return [str(file) for file in find_images(arguments)]


def test_a_folder_is_all_images_below_it_in_order(folder: pathlib.Path) -> None:
    below = ["photos/a/10.jpeg", "photos/a/2.JPG", "photos/a/z/1.webp", "photos/b.png", "photos/c.bmp", "photos/link.png"]
    assert found("photos") == below
    assert found("photos/") == below
    assert found(str(folder / "photos")) == [str(folder / name) for name in below]
    # A link that is named is followed.
    assert found("photos/again")[:1] == ["photos/again/a/10.jpeg"]


def test_a_pattern_is_the_files_that_fit(folder: pathlib.Path) -> None:
    assert found("photos/*.png") == ["photos/b.png", "photos/link.png"]
    assert found("photos/a/**/*.[jw]*") == ["photos/a/10.jpeg", "photos/a/z/1.webp"]
    # What fits is meant, whatever its name ends with.
    assert found("photos/a/*") == ["photos/a/10.jpeg", "photos/a/2.JPG", "photos/a/notes.txt"]
    assert found(f"{folder}/photos/?.bmp") == [f"{folder}/photos/c.bmp"]


def test_a_file_is_itself_there_or_not(folder: pathlib.Path) -> None:
    (folder / "[1].png").write_bytes(b"")
    (folder / "gone[2].png").symlink_to("nowhere")
    named = ["photos/b.png", "nowhere.png", "photos/b.png", "[1].png", "gone[2].png", "x" * 5000]
    assert found(*named) == named


def test_a_list_comes_from_standard_input(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("photos/b.png\n\n with a blank.png\nlast.png"))
    assert found("first.png", "-") == ["first.png", "photos/b.png", " with a blank.png", "last.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("photos", "photos/d"), "IMAGE: found 'photos/d', expected images below it, whose names end with .bmp, .jpeg"),
        (("photos/*.tiff",), "IMAGE: found 'photos/*.tiff', expected files that fit it"),
        (("photos/z*",), "expected files that fit it"),
        (("-", "-"), "IMAGE: found '- twice', expected one list on standard input"),
    ],
)
def test_what_means_nothing_is_said_before_anything_is_read(folder: pathlib.Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_images(arguments)
    assert words in str(caught.value)


def test_a_folder_that_cannot_be_read_is_not_passed_over(folder: pathlib.Path) -> None:
    closed = folder / "photos" / "a" / "z"
    closed.chmod(0)
    try:
        with without_override():
            assert "photos/a/z" in found("photos")
            with pytest.raises(PermissionError):
                closed.read_bytes()
    finally:
        closed.chmod(0o755)


def test_names_may_be_any_bytes(folder: pathlib.Path) -> None:
    name = os.fsdecode(b"photos/\xff.png")
    pathlib.Path(name).write_bytes(b"")
    assert found("photos")[-1] == name
