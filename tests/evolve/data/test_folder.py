"""The folder source: what it reads, how it splits, and every way in which a folder can be wrong."""

import pathlib
import unicodedata
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from evolve.config import FolderTask
from evolve.data.load import load_task
from evolve.data.splits import hashed_order
from evolve.data.task import TaskData
from evolve.errors import DataError
from munet.preprocessing import decode


def write(file: pathlib.Path, value: int = 0, size: tuple[int, int] = (4, 3)) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(file)
    return file


def fill(folder: pathlib.Path, count: int, start: int = 0) -> None:
    for index in range(count):
        write(folder / f"{index:03}.png", start + index)


def load(folder: pathlib.Path, **settings: object) -> TaskData:
    return load_task(FolderTask(name="t", source="folder", folder=folder, **settings))  # type: ignore[arg-type]


def failure(folder: pathlib.Path) -> str:
    with pytest.raises(DataError) as caught:
        load(folder)
    return str(caught.value)


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


def test_missing_splits_take_five_percent_each_of_all_classes(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 60)
    fill(tmp_path / "b", 60, 100)
    data = load(tmp_path)
    assert data.test is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (108, 6, 6)
    everything = [*data.train.names, *data.validation.names, *data.test.names]
    assert sorted(everything) == sorted(f"{label}/{index:03}.png" for label in "ab" for index in range(60))
    assert set(data.test.labels.tolist()) == {0, 1}
    assert list(data.train.names) == sorted(data.train.names)


def test_only_the_missing_split_is_taken(tmp_path: pathlib.Path) -> None:
    for label in "ab":
        fill(tmp_path / "train" / label, 10)
        fill(tmp_path / "validation" / label, 4)
    data = load(tmp_path)
    assert data.test is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (19, 8, 1)
    assert data.test.names[0].startswith("train/")


def test_the_test_split_is_taken_first(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 30)
    fill(tmp_path / "b", 30, 100)
    data = load(tmp_path)
    names = [f"{label}/{index:03}.png" for label in "ab" for index in range(30)]
    order = [names[index] for index in hashed_order(names, "split")]
    assert data.test is not None
    assert sorted(data.test.names) == sorted(order[:3])
    assert sorted(data.validation.names) == sorted(order[3:6])


def test_never_takes_the_last_image_of_a_class(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "rare", 1, 500)
    fill(tmp_path / "common", 200)
    data = load(tmp_path)
    assert data.train.labels.tolist().count(data.labels.index("rare")) == 1


def test_too_few_images_to_set_aside(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "a", 1)
    fill(tmp_path / "b", 1)
    message = failure(tmp_path)
    assert "found 2 training images of 2 classes" in message
    assert "no test and no validation images" in message
    assert "add images" in message


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


def test_class_twice_after_normalising(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "\u00e9", 4)
    fill(tmp_path / unicodedata.normalize("NFD", "\u00e9"), 4)
    assert "two folders that are both class '\u00e9'" in failure(tmp_path)


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
    assert seen == [(done, 100) for done in range(1, 101)]
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


# Bad input


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
    assert message.endswith("mend it, or take it away")


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
