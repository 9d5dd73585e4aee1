"""Every way in which a folder can be wrong, and what the folder source says of it."""

import os
import pathlib
import struct
import unicodedata
import zlib
from collections.abc import Iterator

import pytest

from tests.support.folders import failure, fill, load, write


def test_too_few_images_to_set_aside(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 1)
    fill(tmp_path / "b", 1)
    message = failure(tmp_path)
    assert "found 2 training images of 2 classes" in message
    assert "no test and no validation images" in message
    assert "add images" in message


def test_class_twice_after_normalising(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "\u00e9", 4)
    fill(tmp_path / unicodedata.normalize("NFD", "\u00e9"), 4)
    assert "two folders that are both class '\u00e9'" in failure(tmp_path)


@pytest.mark.parametrize(
    ("link", "target", "other"),
    [
        ("train/a/l", "train/b", "train/b"),
        ("train/a/deep/l", "train/b/deep", "train/b"),
        ("train/a/l", "test/a", "test/a"),
        ("train/a/l", "train", "train/b"),
        ("train/a/l", "", "train/b"),
        ("train/a/l", "..", "train/b"),
        ("train/c", "train/a", "train/a"),
    ],
)
def test_links_into_another_class_are_named(tmp_path: pathlib.Path, link: str, target: str, other: str) -> None:
    folder = tmp_path / "images"
    for split in ("train", "val", "test"):
        for label in "ab":
            fill(folder / split / label / "deep", 2, 10 * "ab".index(label))
    (folder / link).symlink_to(folder / target)
    assert failure(folder) == (
        f"found link {folder / link} to {(folder / target).resolve()}, which is, holds or lies in another class folder, {folder / other}; "
        "expected each image in one class folder; take the link away"
    )


def test_folder_of_text_files(tmp_path: pathlib.Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "notes.txt").write_text("text")
    assert f"found no images of class 'a' in {tmp_path / 'a'}; expected one or more files that end in .jpg" in failure(tmp_path)
    for label in "ab":
        for index in range(9):
            (tmp_path / label / f"{index}.jpg").write_text(f"text {label}{index}")
    assert "could not read the image" in failure(tmp_path)
    assert "found 0 training images of 0 classes" in failure(tmp_path, cache=tmp_path.parent / "cache", skip_unreadable=True)


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_image_without_pixels(tmp_path: pathlib.Path, kind: str) -> None:
    fill(tmp_path / "train" / "a", 3)
    fill(tmp_path / "train" / "b", 3, 20)
    fill(tmp_path / "val" / "a", 3, 40)
    fill(tmp_path / "test" / "a", 3, 60)
    header = struct.pack(">IIBBBBB", 0, 4, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bmp = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 4, 1, 24, 0, 0, 0, 0, 0, 0)
    bad = tmp_path / "train" / "b" / f"bad.{kind}"
    bad.write_bytes({"png": png, "bmp": bmp}[kind])
    assert f"could not read the image {bad}: found " in failure(tmp_path)


@pytest.mark.parametrize("place", ["class", "file", "split"])
def test_names_that_are_not_utf8(tmp_path: pathlib.Path, place: str) -> None:
    for split in ("train", "val", "test"):
        for label in "ab":
            fill(tmp_path / split / label, 3)
    name = os.fsdecode(b"caf\xe9")
    where = {"class": tmp_path / "train", "file": tmp_path / "train" / "b", "split": tmp_path}[place]
    if place == "file":
        write(where / "x.png").rename(where / f"{name}.png")
    else:
        fill(where / name, 3)
    message = failure(tmp_path)
    assert message.startswith(f"found the name b'caf\\xe9{'.png' if place == 'file' else ''}' in {where}, which is not UTF-8")
    assert message.isascii()


def test_files_of_one_name_after_normalising(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 5)
    fill(tmp_path / "b", 5)
    write(tmp_path / "a" / "\u00e9.png")
    write(tmp_path / "a" / "e\u0301.png")
    assert "found two files called 'a/\u00e9.png' once Unicode is normalised" in failure(tmp_path)


def test_folder_outside_the_declared_classes(tmp_path: pathlib.Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            fill(tmp_path / split / label, 10)
    message = failure(tmp_path, classes=("cat", "dgo"))
    assert message.startswith(
        f"found class 'dog' in {tmp_path / 'train'}, which is not among the 2 classes that the task declares"
    )
    assert message.endswith("did you mean 'dgo'?")
    assert "found no training images of class 'bird'" in failure(tmp_path, classes=("cat", "dog", "bird"))
    fill(tmp_path / "test" / "bird", 2)
    assert f"found class 'bird' in {tmp_path / 'test'}, which is not" in failure(tmp_path, classes=("cat", "dog"))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("a", "b", "a"), "found class 'a' more than once in the setting classes"),
        (("\u00e9", "e\u0301"), "found class '\u00e9' more than once in the setting classes, once Unicode is normalised"),
        (("a", ""), "found an empty name in the setting classes"),
    ],
)
def test_bad_class_lists(tmp_path: pathlib.Path, classes: tuple[str, ...], message: str) -> None:
    fill(tmp_path / "a", 10)
    fill(tmp_path / "b", 10)
    assert message in failure(tmp_path, classes=classes)


def test_splits_that_overlap_are_counted(tmp_path: pathlib.Path) -> None:
    for label in "ab":
        fill(tmp_path / "train" / label, 5, 100 * "ab".index(label))
        fill(tmp_path / "val" / label, 4, 3 + 100 * "ab".index(label))
        fill(tmp_path / "test" / label, 4, 60 + 100 * "ab".index(label))
    assert load(tmp_path).warnings == (
        f"4 of 8 validation images of folder {tmp_path} are also training images, pixel by pixel: accuracy on them shows memory, not skill",
    )


def test_missing_folder(tmp_path: pathlib.Path) -> None:
    message = failure(tmp_path / "nowhere")
    assert message.startswith(f"found nothing at {tmp_path / 'nowhere'}; expected a folder with one folder of images per class")


def test_a_file_instead_of_a_folder(tmp_path: pathlib.Path) -> None:
    assert "found a file at" in failure(write(tmp_path / "x.png"))


def test_empty_folder(tmp_path: pathlib.Path) -> None:
    assert f"found no folders in {tmp_path}" in failure(tmp_path)


def test_single_class(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "only", 10)
    message = failure(tmp_path)
    assert message == f"found one class only, 'only', in folder {tmp_path}; expected two or more classes"


@pytest.mark.parametrize("file", [None, "list.txt"])
def test_class_without_images(tmp_path: pathlib.Path, file: str | None) -> None:
    fill(tmp_path / "a", 10)
    fill(tmp_path / "b", 10)
    (tmp_path / "empty").mkdir()
    if file:
        (tmp_path / "empty" / file).write_text("no image")
    message = failure(tmp_path)
    assert f"found no images of class 'empty' in {tmp_path / 'empty'}" in message
    assert ".png" in message
    assert "add some, or take the folder away" in message


def test_class_without_images_in_train(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "train" / "a", 10)
    (tmp_path / "train" / "b").mkdir()
    assert "found no images of class 'b'" in failure(tmp_path)


def test_class_in_test_alone(tmp_path: pathlib.Path) -> None:
    for label in "ab":
        fill(tmp_path / "train" / label, 10)
        fill(tmp_path / "test" / label, 2)
    fill(tmp_path / "test" / "new", 2)
    message = failure(tmp_path)
    assert message.startswith(f"found class 'new' in {tmp_path / 'test'} but not in {tmp_path / 'train'}")
    assert "add training images of it" in message


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "found no bytes"), (b"text", "b'text'"), (None, "damaged image")],
    ids=["empty", "text", "truncated"],
)
def test_unreadable_image_is_named(tmp_path: pathlib.Path, content: bytes | None, found: str) -> None:
    fill(tmp_path / "a", 20)
    fill(tmp_path / "b", 20)
    bad = write(tmp_path / "b" / "bad.png", size=(90, 90))
    bad.write_bytes(bad.read_bytes()[:90] if content is None else content)
    message = failure(tmp_path)
    assert f"could not read the image {bad}" in message
    assert found in message
    assert message.endswith("mend it, or take it away; skip_unreadable = true leaves such images out")


def test_image_of_another_format_is_named(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 10)
    fill(tmp_path / "b", 10)
    (tmp_path / "a" / "moving.GIF").write_bytes(b"GIF89a")
    message = failure(tmp_path)
    assert f"found {tmp_path / 'a' / 'moving.GIF'}, an image of another format" in message
    assert "JPEG, PNG, WEBP, BMP, TIFF" in message


def test_image_outside_of_classes(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 10)
    fill(tmp_path / "b", 10)
    write(tmp_path / "loose.png")
    assert f"found image {tmp_path / 'loose.png'} outside of any class" in failure(tmp_path)


def test_folder_beside_train(tmp_path: pathlib.Path) -> None:
    for folder in ("train", "test", "extra"):
        fill(tmp_path / folder / "a", 3)
        fill(tmp_path / folder / "b", 3)
    assert "found folder 'extra' beside train/" in failure(tmp_path)


def test_splits_without_train(tmp_path: pathlib.Path) -> None:
    for folder in ("val", "test"):
        fill(tmp_path / folder / "a", 3)
    assert "found test/ and val/ but no train/" in failure(tmp_path)


def test_two_validation_folders(tmp_path: pathlib.Path) -> None:
    for folder in ("train", "val", "valid"):
        fill(tmp_path / folder / "a", 3)
    assert "found val/ and valid/" in failure(tmp_path)


def test_images_in_train_itself(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / "test", 3)
    assert "outside of any class" in failure(tmp_path)


def test_train_without_classes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert f"found no class folders in {tmp_path / 'train'}" in failure(tmp_path)


def test_folder_that_may_not_be_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "a", 10)
    fill(tmp_path / "b", 10)
    listed = pathlib.Path.iterdir

    def refuse(folder: pathlib.Path) -> Iterator[pathlib.Path]:
        if folder == tmp_path / "b":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    # Tests may run as root, who may read everything.
    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    assert f"could not read folder {tmp_path / 'b'} (Permission denied)" in failure(tmp_path)
