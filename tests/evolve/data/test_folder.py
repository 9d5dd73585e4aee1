"""The folder source: what it reads, and how it splits."""

import os
import pathlib
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from evolve.config import FolderTask
from evolve.data.load import load_task
from evolve.errors import DataError
from munet.preprocessing import decode
from tests.support.folders import failure, fill, load, splits_of, write


def test_reads_given_splits(tmp_path: pathlib.Path) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        fill(tmp_path / split / "a", 3, 10 * number)
        fill(tmp_path / split / "b", 2, 100 + 10 * number)
    data = load(tmp_path)
    assert data.labels == ("a", "b")
    assert [len(data.train), len(data.validation)] == [5, 5]
    assert data.test is not None
    assert len(data.test) == 5
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.train.names[0] == "train/a/000.png"
    assert data.train.images[0].shape == (3, 4, 3)
    # Every image is where its name says, with its own label.
    for images in (data.train, data.validation, data.test):
        for pixels, label, name in zip(images.images, images.labels, images.names, strict=True):
            assert np.array_equal(pixels, decode((tmp_path / name).read_bytes()))
            assert f"/{data.labels[label]}/" in name


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "VAL"])
def test_validation_has_other_names(tmp_path: pathlib.Path, name: str) -> None:
    for split in ("Train", name, "test"):
        fill(tmp_path / split / "a", 2)
        fill(tmp_path / split / "b", 2)
    assert {image.split("/")[0] for image in load(tmp_path).validation.names} == {name}


def test_missing_splits_take_about_five_percent_each(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 200)
    fill(tmp_path / "b", 200, 300)
    data = load(tmp_path)
    splits = splits_of(data)
    assert 8 <= len(splits["validation"]) <= 34
    assert 8 <= len(splits["test"]) <= 34
    assert sorted(set().union(*splits.values())) == sorted(f"{label}/{index:03}.png" for label in "ab" for index in range(200))
    assert sum(map(len, splits.values())) == 400
    assert list(data.train.names) == sorted(data.train.names)
    assert data.warnings == ()


def test_images_stay_in_their_split_when_others_are_added(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 80)
    fill(tmp_path / "b", 80, 300)
    before = splits_of(load(tmp_path))
    for index in range(120):
        write(tmp_path / "a" / f"more-{index}.png", 1000 + index)
    fill(tmp_path / "new class", 40, 2000)
    after = splits_of(load(tmp_path))
    for split, names in before.items():
        assert names <= after[split]
    # The file counts, not its name.
    (tmp_path / "b").rename(tmp_path / "renamed")
    renamed = splits_of(load(tmp_path))
    assert {name.replace("renamed/", "b/") for name in renamed["test"]} == after["test"]


def test_copies_of_a_file_are_in_one_split(tmp_path: pathlib.Path) -> None:
    for label in "ab":
        fill(tmp_path / label, 100, 300 * "ab".index(label))
        fill(tmp_path / label / "copies", 100, 300 * "ab".index(label))
    data = load(tmp_path)
    assert data.warnings == ()
    for names in splits_of(data).values():
        assert {name.replace("copies/", "") for name in names} == {name for name in names if "copies" not in name}


def test_only_the_missing_split_is_taken(tmp_path: pathlib.Path) -> None:
    for label in "ab":
        fill(tmp_path / "train" / label, 10, 100 * "ab".index(label))
        fill(tmp_path / "validation" / label, 4, 50 + 100 * "ab".index(label))
    splits = splits_of(load(tmp_path))
    assert len(splits["validation"]) == 8
    assert splits["test"]
    assert all(name.startswith("train/") for name in splits["test"])


def test_never_takes_the_last_image_of_a_class_and_says_so(tmp_path: pathlib.Path) -> None:
    # Of 40 classes of one image, some would be in a split of their own.
    fill(tmp_path / "common", 200)
    for number in range(40):
        fill(tmp_path / f"rare {number}", 1, 500 + number)
    data = load(tmp_path)
    assert set(data.train.labels.tolist()) == set(range(41))
    assert len(data.warnings) == 1
    assert f"folder {tmp_path} has so few images, in all or of a class, that " in data.warnings[0]
    assert "of 240 were put into a split by need" in data.warnings[0]


def test_limit_per_class_keeps_splits(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 40)
    fill(tmp_path / "b", 40, 100)
    free, limited, again = load(tmp_path), load(tmp_path, limit_per_class=5), load(tmp_path, limit_per_class=5)
    assert np.bincount(limited.train.labels).tolist() == [5, 5]
    assert set(limited.train.names) <= set(free.train.names)
    assert limited.validation.names == free.validation.names
    assert limited.fingerprint == again.fingerprint != free.fingerprint


def test_nested_hidden_and_other_files(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a" / "deep" / "deeper", 5)
    fill(tmp_path / "b", 5, 50)
    write(tmp_path / "b" / ".hidden.png")
    write(tmp_path / "b" / ".thumbnails" / "x.png")
    write(tmp_path / ".cache" / "x.png")
    (tmp_path / "b" / "notes.txt").write_text("text among images")
    (tmp_path / "README.md").write_text("about")
    data = load(tmp_path)
    assert data.labels == ("a", "b")
    assert data.test is not None
    assert len(data.train) + len(data.validation) + len(data.test) == 10


def test_unicode_class_names_are_sorted_as_nfc(tmp_path: pathlib.Path) -> None:
    composed, decomposed = "\u00e9t\u00e9", unicodedata.normalize("NFD", "\u00e8re")
    for name in (composed, decomposed, "\u732b", "zebra", "Ant"):
        fill(tmp_path / name, 4)
    assert load(tmp_path).labels == ("Ant", "zebra", "\u00e8re", "\u00e9t\u00e9", "\u732b")


def test_a_class_may_be_called_train(tmp_path: pathlib.Path) -> None:
    for name in ("car", "plane", "train"):
        fill(tmp_path / name, 4)
    assert load(tmp_path).labels == ("car", "plane", "train")


def test_kinds_of_images(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "other", 6)
    folder = tmp_path / "kinds"
    folder.mkdir()
    Image.new("L", (5, 4), 90).save(folder / "grey.png")
    Image.new("RGBA", (5, 4), (255, 0, 0, 0)).save(folder / "alpha.png")
    Image.new("P", (5, 4), 1).save(folder / "palette.png")
    Image.new("CMYK", (5, 4), (0, 0, 0, 0)).save(folder / "print.JPG")
    Image.new("RGB", (5, 4), (9, 9, 9)).save(folder / "web.webp", lossless=True)
    turned = Image.new("RGB", (5, 4))
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.png", exif=exif)
    Image.fromarray(np.full((4, 5), 0x8000, dtype=np.uint16)).save(folder / "deep.tiff")
    data = load(tmp_path)
    assert data.test is not None
    found = {
        name: pixels
        for images in (data.train, data.validation, data.test)
        for name, pixels in zip(images.names, images.images, strict=True)
    }
    assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in found.values())
    assert found["kinds/grey.png"][0, 0].tolist() == [90, 90, 90]
    assert found["kinds/alpha.png"][0, 0].tolist() == [255, 255, 255]
    assert found["kinds/deep.tiff"][0, 0].tolist() == [128, 128, 128]
    assert found["kinds/turned.png"].shape == (5, 4, 3)
    assert found["kinds/turned.png"][0, 3].tolist() == [255, 255, 255]


def test_progress_and_order_are_kept_over_threads(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 50)
    fill(tmp_path / "b", 50, 300)
    seen: list[tuple[int, int]] = []
    data = load_task(FolderTask(name="t", source="folder", folder=tmp_path), lambda done, of: seen.append((done, of)))
    # Once to divide them, once to read them.
    assert seen == [(done, 200) for done in range(1, 201)]
    for pixels, name in zip(data.train.images, data.train.names, strict=True):
        assert np.array_equal(pixels, decode((tmp_path / name).read_bytes()))


def test_the_order_of_files_on_disk_does_not_matter(tmp_path: pathlib.Path) -> None:
    numbers = list(range(30))
    for folder, order in (("one", numbers), ("two", numbers[::-1])):
        for index in order:
            for label in ("a", "b"):
                write(tmp_path / folder / label / f"{index}.png", index)
    assert load(tmp_path / "one").fingerprint == load(tmp_path / "two").fingerprint


def test_a_link_to_a_folder_above_ends(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 4)
    fill(tmp_path / "b", 4)
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    assert len(load(tmp_path).train) == 6


def test_links_that_lead_to_each_other_end(tmp_path: pathlib.Path) -> None:
    for label in "ab":
        fill(tmp_path / "images" / label, 4, 10 * "ab".index(label))
    for one, other in ("xy", "yx"):
        fill(tmp_path / one, 2, 100 * "xy".index(one) + 50)
        (tmp_path / one / "on").symlink_to(tmp_path / other)
    (tmp_path / "images" / "a" / "elsewhere").symlink_to(tmp_path / "x")
    names = set().union(*splits_of(load(tmp_path / "images")).values())
    assert sorted(name for name in names if "elsewhere" in name) == [
        "a/elsewhere/000.png",
        "a/elsewhere/001.png",
        "a/elsewhere/on/000.png",
        "a/elsewhere/on/001.png",
    ]
    assert len(names) == 12


def test_pipes_are_not_waited_for(tmp_path: pathlib.Path) -> None:
    for label in "ab":
        fill(tmp_path / label, 10, 20 * "ab".index(label))
    pipe = tmp_path / "b" / "pipe.png"
    os.mkfifo(pipe)
    for cache in (None, tmp_path.parent / "cache"):
        assert failure(tmp_path, cache=cache).startswith(
            f"could not read {pipe} (a pipe or device, no regular file); expected a file"
        )
        data = load(tmp_path, cache=cache, skip_unreadable=True)
        assert len(set().union(*splits_of(data).values())) == 20


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_limit_counts_readable_images_alone(tmp_path: pathlib.Path, cache: bool, given: bool) -> None:
    folder = tmp_path / "images"
    for label in "ab":
        fill(folder / "train" / label, 30, 100 * "ab".index(label))
        for index in range(40):
            (folder / "train" / label / f"bad {index}.png").write_bytes(f"no image {label} {index}".encode())
        fill(folder / "test" / label, 2, 60 + 100 * "ab".index(label))
        if given:
            fill(folder / "val" / label, 2, 80 + 100 * "ab".index(label))
    seen: list[tuple[int, int]] = []
    task = FolderTask(
        name="t",
        source="folder",
        folder=folder,
        limit_per_class=10,
        skip_unreadable=True,
        cache=tmp_path / "c" if cache else None,
    )
    data = load_task(task, lambda done, of: seen.append((done, of)))
    assert np.bincount(data.train.labels).tolist() == [10, 10]
    assert data.warnings[0].startswith(f"left out 80 images of folder {folder}, the first ")
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("cache", [False, True])
def test_skips_and_counts_what_cannot_be_read(tmp_path: pathlib.Path, cache: bool) -> None:
    folder = tmp_path / "images"
    for label in "ab":
        fill(folder / "train" / label, 5, 100 * "ab".index(label))
        fill(folder / "val" / label, 5, 30 + 100 * "ab".index(label))
        fill(folder / "test" / label, 5, 60 + 100 * "ab".index(label))
    for name in ("train/a/bad.png", "val/b/bad.png", "train/b/000.png"):
        (folder / name).write_bytes(b"")
    settings = {"skip_unreadable": True, "cache": tmp_path / "cache" if cache else None}
    data = load(folder, **settings)
    assert [len(data.train), len(data.validation)] == [9, 10]
    assert "train/b/000.png" not in data.train.names
    assert data.warnings == (
        f"left out 3 images of folder {folder}, the first because munet could not read the image {folder / 'train/a/bad.png'}: found no "
        "bytes, expected a whole JPEG, PNG, WEBP, BMP or TIFF file",
    )
    # A class that is left without training images is an error all the same.
    for file in (folder / "train" / "b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="found no training images of class 'b'"):
        load(folder, **settings)


def test_declared_classes_fix_the_order(tmp_path: pathlib.Path) -> None:
    for label in ("cat", unicodedata.normalize("NFD", "\u00e9t\u00e9"), "dog"):
        fill(tmp_path / "images" / label, 10)
    (tmp_path / "classes.txt").write_text("\u00e9t\u00e9\ndog\ncat\n", encoding="utf-8")
    for classes in (("\u00e9t\u00e9", "dog", "cat"), tmp_path / "classes.txt"):
        data = load(tmp_path / "images", classes=classes)
        assert data.labels == ("\u00e9t\u00e9", "dog", "cat")
        for name, label in zip(data.train.names, data.train.labels, strict=True):
            assert name.startswith(f"{data.labels[label]}/")


def test_a_strip_and_a_pixel_are_images(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 5)
    write(tmp_path / "b" / "strip.png", size=(20_000, 1))
    write(tmp_path / "b" / "pole.png", 9, size=(1, 20_000))
    for index in range(4):
        write(tmp_path / "b" / f"{index}.png", 50 + index, size=(1, 1))
    data = load(tmp_path)
    assert {
        tuple(size) for images in (data.train, data.validation, data.test or data.train) for size in images.sizes.tolist()
    } == {
        (1, 20_000),
        (20_000, 1),
        (1, 1),
        (3, 4),
    }
    assert data.train.resized(16).shape == (len(data.train), 16, 16, 3)


def test_deep_animated_and_turned_kinds(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "other", 6)
    folder = tmp_path / "kinds"
    folder.mkdir()
    red, blue = Image.new("RGB", (5, 4), (255, 0, 0)), Image.new("RGB", (5, 4), (0, 0, 255))
    red.save(folder / "animated.webp", save_all=True, append_images=[blue], lossless=True)
    red.save(folder / "animated.png", save_all=True, append_images=[blue])
    red.save(folder / "pages.tif", save_all=True, append_images=[blue])
    red.save(folder / "plain.bmp")
    Image.fromarray(np.full((4, 5), 0x1234, dtype=np.uint16)).save(folder / "deep.png")
    Image.new("LA", (5, 4), (9, 0)).save(folder / "grey-alpha.png")
    Image.new("1", (5, 4), 1).save(folder / "bits.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    red.save(folder / "turned.jpg", exif=exif)
    # 16 bits a channel, which Pillow does not write: filter 0, then big-endian red 0x80ff, green 0x00ff, blue 0xff00.
    rows = zlib.compress((b"\0" + bytes.fromhex("80ff00ffff00") * 5) * 4)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts]
    (folder / "deep-rgb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    data = load(tmp_path)
    found = {
        name: (list(pixels.shape), pixels[0, 0].tolist())
        for images in (data.train, data.validation, data.test or data.train)
        for name, pixels in zip(images.names, images.images, strict=True)
    }
    for name in ("animated.webp", "animated.png", "pages.tif", "plain.bmp"):
        assert found[f"kinds/{name}"] == ([4, 5, 3], [255, 0, 0])
    assert found["kinds/deep.png"][1] == [0x12] * 3
    assert found["kinds/deep-rgb.png"][1] == [0x80, 0, 0xFF]
    assert found["kinds/grey-alpha.png"][1] == [255, 255, 255]
    assert found["kinds/bits.png"][1] == [255, 255, 255]
    assert found["kinds/turned.jpg"][0] == [5, 4, 3]
