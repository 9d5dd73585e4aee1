"""The csv source: what it reads, and every way in which a table can be wrong, with the line that is."""

from __future__ import annotations

import pathlib
import unicodedata

import numpy as np
import pytest
from PIL import Image

from evolve.config import CsvTask
from evolve.data.load import load_task
from evolve.data.task import TaskData
from evolve.errors import DataError


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Images 0.png to 39.png; the number is their red."""
    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


LINES = [f"images/{number}.png,{'cat' if number % 2 else 'dog'}" for number in range(40)]
SPLITS = [f"{line},{'train' if number < 30 else 'val' if number < 34 else 'test'}" for number, line in enumerate(LINES)]


def table(folder: pathlib.Path, *lines: str, header: str = "file,label", encoding: str = "utf-8") -> pathlib.Path:
    file = folder / "labels.csv"
    file.write_bytes("\n".join([header, *lines, ""]).encode(encoding))
    return file


def load(file: pathlib.Path, **settings: object) -> TaskData:
    return load_task(CsvTask(name="t", source="csv", file=file, **settings))  # type: ignore[arg-type]


def failure(file: pathlib.Path, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        load(file, **settings)
    return str(caught.value)


def test_every_image_has_its_label(folder: pathlib.Path) -> None:
    data = load(table(folder, *LINES))
    assert data.labels == ("cat", "dog")
    assert data.test is not None
    seen = []
    for images in (data.train, data.validation, data.test):
        for pixels, label, name in zip(images.images, images.labels, images.names, strict=True):
            number = int(pixels[0, 0, 0])
            seen.append(number)
            assert name == f"images/{number}.png"
            assert data.labels[label] == ("cat" if number % 2 else "dog")
    assert sorted(seen) == list(range(40))


def test_split_column(folder: pathlib.Path) -> None:
    data = load(table(folder, *SPLITS, header="file,label,split"))
    assert [int(image[0, 0, 0]) for image in data.train.images] == list(range(30))
    assert sorted(int(image[0, 0, 0]) for image in data.validation.images) == list(range(30, 34))
    assert data.test is not None
    assert sorted(int(image[0, 0, 0]) for image in data.test.images) == list(range(34, 40))


def test_columns_delimiter_encoding_folder_and_classes_as_set(folder: pathlib.Path) -> None:
    lines = [f'"{number % 2}";"x;y";{number}.png;Größe {number % 2}' for number in range(40)]
    file = table(folder, *lines, header="id;note;path;kind", encoding="cp1252")
    data = load(
        file,
        image_column="path",
        label_column="kind",
        delimiter=";",
        encoding="cp1252",
        folder=folder / "images",
        classes=("Größe 1", "Größe 0"),
        limit_per_class=3,
    )
    assert data.labels == ("Größe 1", "Größe 0")
    assert np.bincount(data.train.labels).tolist() == [3, 3]
    assert all(int(image[0, 0, 0]) % 2 == 1 - label for image, label in zip(data.train.images, data.train.labels, strict=True))


def test_byte_order_mark_quotes_empty_lines_and_spaces(folder: pathlib.Path) -> None:
    lines = [
        f'"images/{number}.png", {unicodedata.normalize(("NFC", "NFD")[number % 2], "é")}{number % 4 // 2}\r\n'
        for number in range(40)
    ]
    data = load(table(folder, *lines, header="\ufefffile,label"))
    assert data.labels == ("é0", "é1")


def test_numbers_are_classes_in_their_order(folder: pathlib.Path) -> None:
    lines = [f"images/{number}.png,{number % 12}" for number in range(40)]
    assert load(table(folder, *lines)).labels == tuple(map(str, range(12)))


def test_long_numbers_are_classes_in_their_order(folder: pathlib.Path) -> None:
    classes = ("0", "007", "7", "10", "9" * 5000, "1" + "0" * 5000)
    lines = [f"images/{number}.png,{classes[::-1][number % 6]}" for number in range(40)]
    assert load(table(folder, *lines)).labels == classes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be", "utf-7"])
def test_byte_order_mark_of_any_encoding(folder: pathlib.Path, encoding: str) -> None:
    mark = "" if encoding in ("utf-8-sig", "utf-16") else "\ufeff"
    assert load(table(folder, *LINES, header=f"{mark}file,label", encoding=encoding), encoding=encoding).labels == ("cat", "dog")


@pytest.mark.parametrize("name", ["Split", "SPLIT"])
def test_split_column_in_other_letters_is_not_passed_over(folder: pathlib.Path, name: str) -> None:
    file = table(folder, *SPLITS, header=f"file,label,{name}")
    assert failure(file) == (
        f"found column {name!r} in {file}; expected a split column to be called 'split', or set; set split_column = {name!r}; "
        "if it says something else, call it otherwise"
    )
    data = load(file, split_column=name)
    assert [len(data.train), len(data.validation)] == [30, 4]
    # Beside a split column, or as the column of labels, such a name is none.
    both = table(folder, *[f"{line},x" for line in SPLITS], header=f"file,label,split,{name}")
    assert load(both).fingerprint == data.fingerprint
    assert load(table(folder, *LINES, header=f"file,{name}"), label_column=name).labels == ("cat", "dog")


def test_class_list_in_a_file(folder: pathlib.Path) -> None:
    (folder / "classes.txt").write_text("dog\n\ncat\n", encoding="utf-8")
    assert load(table(folder, *LINES), classes=folder / "classes.txt").labels == ("dog", "cat")


def test_a_cache_gives_the_same(folder: pathlib.Path) -> None:
    file = table(folder, *SPLITS, header="file,label,split")
    assert load(file, cache=folder / "cache").fingerprint == load(file).fingerprint


def test_skips_images_that_are_missing_or_damaged(folder: pathlib.Path) -> None:
    (folder / "images" / "7.png").write_bytes(b"text")
    data = load(table(folder, *LINES, "images/none.png,cat"), skip_unreadable=True)
    assert data.warnings[0] == (
        f"left out 2 images of table {folder / 'labels.csv'}, the first because munet found no file at {folder / 'images/none.png'}, "
        f"the image in line 42 of {folder / 'labels.csv'}"
    )


# Bad input


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("file,label", ["images/0.png,cat", "images/x.png,dog"], "found no file at {0}/images/x.png, the image in line 3 of {0}/"),
        ("file,label", ["images,cat"], "found a folder, no file, at {0}/images, the image in line 2 of"),
        ("file,label", ["images/0.png,cat", "", "images/1.png"], "found 1 cells in line 4 of {0}/labels.csv; expected 2, as"),
        ("file,label", ["images/0.png,cat,dog"], "found 3 cells in line 2 of"),
        ("file,label", ["images/0.png, "], "found an empty cell in line 2 of {0}/labels.csv, column 'label'"),
        ("file,label", [",cat"], "found an empty cell in line 2 of {0}/labels.csv, column 'file'"),
        ("file,label", [*LINES, LINES[3]], "found image 'images/3.png' in lines 5 and 42 of {0}/labels.csv; expected each image once"),
        ("file,label", ['images/0.png,"cat\n'], "found no CSV in line 2 of {0}/labels.csv (unexpected end of data)"),
        ("file,label", ["images/0.png,\0"], "found a zero byte in line 2 of {0}/labels.csv; expected utf-8 text; set encoding"),
        ("file,label", ["x" * 5000 + ",cat"], "found no file (File name too long) at {0}/xxx"),
        ("file,label", [], "found no images in {0}/labels.csv; expected a line for each image below the column names"),
        ("path,label", LINES, "found columns ['path', 'label'] in {0}/labels.csv; expected a column 'file'; set image_column"),
        ("file,kind", LINES, "expected a column 'label'; set label_column"),
        ("file;label", ["images/0.png;cat"], "expected a column 'file'; set delimiter = ';'"),
        ("file,label,label", [f"{line},x" for line in LINES], "found column 'label' more than once in {0}/labels.csv"),
        ("file,label,split", [*SPLITS[:3], "images/3.png,cat,trian"], "found split 'trian' in line 5 of {0}/labels.csv; expected"),
        ("file,label,split", ["images/0.png,cat,"], "found split '' in line 2 of"),
        ("file,label,split", SPLITS[30:], "found no line of the train split in {0}/labels.csv"),
        ("file,label,split", [*SPLITS, "images/../images/0.png,bird,test"], "found no training images of class 'bird' in table"),
        ("file,label", [line.replace("dog", "cat") for line in LINES], "found one class only, 'cat', in table {0}/labels.csv"),
        ("file,label", LINES[:2], "found 2 training images of 2 classes in table {0}/labels.csv and no test and no validation images"),
    ],
)  # fmt: skip
def test_bad_tables(folder: pathlib.Path, header: str, lines: list[str], message: str) -> None:
    assert message.format(folder) in failure(table(folder, *lines, header=header))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ("cat", "dgo")}, "found class 'dog' in line 2 of {0}/labels.csv, which is not among the 2 classes"),
        ({"classes": ("cat", "dgo")}, "did you mean 'dgo'?"),
        ({"classes": ("cat", "dog", "bird")}, "found no training images of class 'bird' in table"),
        ({"classes": ("cat", "dog", "cat ")}, "found class 'cat' more than once in the setting classes, once Unicode is normalised"),
        ({"classes": ("cat", " ")}, "found an empty name in the setting classes"),
        ({"split_column": "part"}, "expected a column 'part'; set split_column"),
        ({"encoding": "klingon"}, "found encoding 'klingon'; expected an encoding that Python knows"),
        ({"encoding": "utf\0"}, "found encoding 'utf\\x00'; expected an encoding that Python knows"),
        ({"encoding": "\ud800"}, "found encoding '\\ud800'; expected an encoding that Python knows"),
        ({"encoding": "undefined"}, "found bytes in {0}/labels.csv that are not undefined ("),
        ({"encoding": "punycode"}, "{0}/labels.csv that are not punycode ("),
        ({"folder": pathlib.Path("\0")}, "found no file (embedded null byte) at \0/images/0.png, the image in line 2 of"),
        ({"folder": pathlib.Path("\ud800")}, "found no file ('utf-8' codec can't encode character '\\ud800'"),
        ({"classes": pathlib.Path("a\0b")}, "found 'a\\x00b' as the class list, which is no path (embedded null byte)"),
        ({"classes": pathlib.Path("/nowhere/classes.txt")}, "could not read the class list /nowhere/classes.txt (No such"),
        ({"folder": pathlib.Path("/nowhere")}, "expected an image file; paths are relative to /nowhere; mend the path, or set folder"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(folder: pathlib.Path, settings: dict[str, object], message: str) -> None:
    assert message.format(folder) in failure(table(folder, *LINES), **settings)


def test_bytes_of_another_encoding_are_named_by_line(folder: pathlib.Path) -> None:
    message = failure(table(folder, LINES[0], LINES[1], "images/2.png,Größe", encoding="latin-1"))
    assert f"found bytes in line 4 of {folder / 'labels.csv'} that are not utf-8" in message
    assert "set encoding, such as 'cp1252'" in message


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_table(folder: pathlib.Path, content: bytes) -> None:
    (folder / "labels.csv").write_bytes(content)
    assert failure(folder / "labels.csv").startswith(f"found an empty table in {folder / 'labels.csv'}")


def test_missing_table(folder: pathlib.Path) -> None:
    assert failure(folder / "no.csv").startswith(f"could not read {folder / 'no.csv'} (No such file or directory)")
    assert "(Is a directory)" in failure(folder)
    assert failure(pathlib.Path("a\0b")).startswith("found 'a\\x00b', which is no path (embedded null byte); expected a CSV file")


def test_half_of_a_surrogate_pair_is_named_by_line(folder: pathlib.Path) -> None:
    message = failure(table(folder, LINES[0], r"images/\ud800.png,cat"), encoding="unicode_escape")
    assert message == f"found half of a surrogate pair in line 3 of {folder / 'labels.csv'}; expected whole characters"


def test_damaged_image_is_named_with_its_line(folder: pathlib.Path) -> None:
    (folder / "images" / "7.png").write_bytes(b"text")
    message = failure(table(folder, *LINES))
    assert f"could not read the image {folder / 'images/7.png'} (line 9 of {folder / 'labels.csv'}): found 4 bytes" in message


def test_class_list_that_is_not_text(folder: pathlib.Path) -> None:
    (folder / "classes.txt").write_bytes(b"caf\xe9\n")
    assert "that is not UTF-8" in failure(table(folder, *LINES), classes=folder / "classes.txt")
