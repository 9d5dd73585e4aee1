"""The arrays source: what it reads, and every way in which a .npz file can be wrong."""

from __future__ import annotations

import io
import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest

from evolve.config import ArraysTask
from evolve.data.load import load_task
from evolve.data.task import TaskData
from evolve.errors import DataError

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (60, 5, 4, 3), dtype=np.uint8)
LABELS = np.arange(60) % 3


def save(folder: pathlib.Path, **arrays: Any) -> pathlib.Path:
    np.savez_compressed(folder / "data.npz", **arrays)
    return folder / "data.npz"


def load(file: pathlib.Path, **settings: object) -> TaskData:
    return load_task(ArraysTask(name="t", source="arrays", file=file, **settings))  # type: ignore[arg-type]


def failure(file: pathlib.Path, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        load(file, **settings)
    return str(caught.value)


def pairs(data: TaskData) -> list[tuple[bytes, str]]:
    assert data.test is not None
    return sorted(
        (pixels.tobytes(), data.labels[label])
        for images in (data.train, data.validation, data.test)
        for pixels, label in zip(images.images, images.labels, strict=True)
    )


def test_every_image_has_its_label(tmp_path: pathlib.Path) -> None:
    data = load(save(tmp_path, images=IMAGES, labels=LABELS))
    assert data.labels == ("0", "1", "2")
    assert pairs(data) == sorted((image.tobytes(), str(label)) for image, label in zip(IMAGES, LABELS, strict=True))
    assert data.train.images[0].shape == (5, 4, 3)


def test_strings_and_their_order(tmp_path: pathlib.Path) -> None:
    words = np.array(["dog", "cat", " e\u0301te\u0301"])[LABELS]
    file = save(tmp_path, images=IMAGES, labels=words)
    assert load(file).labels == ("cat", "dog", "\u00e9t\u00e9")
    declared = load(file, classes=("\u00e9t\u00e9", "dog", "cat"))
    assert declared.labels == ("\u00e9t\u00e9", "dog", "cat")
    assert pairs(declared) == pairs(load(file))


def test_numbers_are_indices_of_declared_classes(tmp_path: pathlib.Path) -> None:
    data = load(save(tmp_path, images=IMAGES, labels=LABELS), classes=("zero", "one", "two"), limit_per_class=4)
    assert data.labels == ("zero", "one", "two")
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4]
    assert set(pairs(data)) <= {
        (image.tobytes(), ("zero", "one", "two")[label]) for image, label in zip(IMAGES, LABELS, strict=True)
    }


@pytest.mark.parametrize("shape", [(60, 5, 4), (60, 5, 4, 1)])
def test_grey(tmp_path: pathlib.Path, shape: tuple[int, ...]) -> None:
    data = load(save(tmp_path, images=IMAGES[..., 0].reshape(shape), labels=LABELS[:, None].astype(np.uint8)))
    assert data.train.images[0].shape == (5, 4, 3)
    assert (data.train.images[0][..., 0] == data.train.images[0][..., 2]).all()


def test_given_splits(tmp_path: pathlib.Path) -> None:
    file = save(
        tmp_path,
        train_images=IMAGES[:40],
        train_labels=LABELS[:40],
        val_images=IMAGES[40:50],
        val_labels=LABELS[40:50],
        test_images=IMAGES[50:],
        test_labels=LABELS[50:],
        about=np.array(["text"]),
    )
    data = load(file)
    assert [image.tobytes() for image in data.train.images] == [image.tobytes() for image in IMAGES[:40]]
    assert len(data.validation) == 10
    assert data.test is not None
    assert sorted(data.test.names)[0] == "test_images[0]"
    assert data.warnings == (f"left alone arrays 'about' of {file}, whose names munet does not know",)


def test_images_stay_in_their_split_when_others_are_put_before_them(tmp_path: pathlib.Path) -> None:
    before = load(save(tmp_path, images=IMAGES, labels=LABELS))
    more = RANDOM.integers(0, 256, (400, 5, 4, 3), dtype=np.uint8)
    after = load(save(tmp_path, images=np.concatenate([more, IMAGES]), labels=np.concatenate([np.arange(400) % 3, LABELS])))
    assert before.test is not None
    assert after.test is not None
    assert before.warnings == after.warnings == ()
    assert set(before.test.hashes) <= set(after.test.hashes)
    assert set(before.validation.hashes) <= set(after.validation.hashes)


def test_given_splits_that_overlap_are_counted(tmp_path: pathlib.Path) -> None:
    splits = {"images": IMAGES[:40], "labels": LABELS[:40], "valid_images": IMAGES[50:], "valid_labels": LABELS[50:]}
    data = load(save(tmp_path, **splits, test_images=IMAGES[30:50], test_labels=LABELS[30:50]))
    assert data.warnings == (
        f"10 of 20 test images of arrays {tmp_path / 'data.npz'} are also training images, pixel by pixel: accuracy on them shows "
        "memory, not skill",
    )


# Bad input


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES / 255}, "found images of type float64 and shape [60, 5, 4, 3] in {0}; expected uint8, "),
        ({"images": IMAGES / 255}, "scale values to 0 to 255"),
        ({"images": IMAGES.astype(np.int64)}, "found images of type int64"),
        ({"images": IMAGES[..., :2]}, "shape [60, 5, 4, 2]"),
        ({"images": IMAGES[:, :0]}, "shape [60, 0, 4, 3]"),
        ({"images": IMAGES[:, 0, 0]}, "shape [60, 3]"),
        ({"images": IMAGES[:50]}, "found 50 images in images and 60 labels in labels of {0}; expected one label for each image"),
        ({"labels": LABELS / 1}, "found labels of type float64 and shape [60] in {0}; expected whole numbers or strings"),
        ({"labels": LABELS > 1}, "found labels of type bool"),
        ({"labels": np.stack([LABELS, LABELS], 1)}, "shape [60, 2]"),
        ({"labels": LABELS - 1}, "found label -1 at labels[0] of {0}; expected whole numbers from 0, or strings"),
        ({"labels": LABELS.astype(np.uint64) + 2**63}, "found label 9223372036854775808 at labels[0]"),
        ({"labels": LABELS * 0}, "found one class only, '0', in arrays {0}"),
        ({"labels": np.array(["", "a", "b"])[LABELS]}, "found class name '' in arrays {0}"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "found 0 training images of 0 classes in arrays {0}"),
        ({"images": IMAGES[:3], "labels": LABELS[:3]}, "found 3 training images of 3 classes in arrays {0} and no test and no validation"),
        ({"test_images": IMAGES}, "found test_images alone in {0}; expected test_images and test_labels"),
        ({"train_images": IMAGES, "train_labels": LABELS}, "found images and train_images in {0}; expected one array of train images"),
        ({"test_images": IMAGES, "test_labels": LABELS + 1}, "found no training images of class '3' in arrays {0}"),
        ({"test_images": IMAGES, "test_labels": np.array(["a", "b", "c"])[LABELS]}, "found strings and whole numbers among the labels"),
        ({"labels": LABELS.astype(object)}, "found pickled objects in array 'labels' of {0}; expected plain numbers or strings"),
    ],
)  # fmt: skip
def test_bad_arrays(tmp_path: pathlib.Path, arrays: dict[str, Any], message: str) -> None:
    file = save(tmp_path, **{"images": IMAGES, "labels": LABELS, **arrays})
    assert message.format(file) in failure(file)


def test_labels_outside_the_classes(tmp_path: pathlib.Path) -> None:
    file = save(tmp_path, images=IMAGES, labels=LABELS)
    assert "found label 2 for 'images[2]' among the training images" in failure(file, classes=("a", "b"))
    words = save(tmp_path, images=IMAGES, labels=np.array(["a", "b", "c"])[LABELS])
    assert f"found class 'c' for images[2] of {words}, which is not among the 2 classes" in failure(words, classes=("a", "b"))


def test_no_images_of_splits_only(tmp_path: pathlib.Path) -> None:
    file = save(tmp_path, test_images=IMAGES, test_labels=LABELS)
    assert f"found arrays ['test_images', 'test_labels'] in {file}; expected images and labels, or train_images" in failure(file)


class Touch:
    """What a pickle may do: anything."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.file,)


def test_nothing_is_unpickled(tmp_path: pathlib.Path) -> None:
    trap = np.array([Touch(tmp_path / "touched")], dtype=object)
    assert "pickled objects" in failure(save(tmp_path, images=trap, labels=trap))
    (tmp_path / "data.npz").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    assert f"found no .npz file at {tmp_path / 'data.npz'}" in failure(tmp_path / "data.npz")
    assert not (tmp_path / "touched").exists()


def test_files_that_are_no_archive(tmp_path: pathlib.Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    for content in (b"", b"text", buffer.getvalue()):
        (tmp_path / "data.npz").write_bytes(content)
        assert "found no .npz file at" in failure(tmp_path / "data.npz")
    assert "(No such file or directory)" in failure(tmp_path / "none.npz")
    assert "(Is a directory)" in failure(tmp_path)


def test_damaged_archives(tmp_path: pathlib.Path) -> None:
    whole = save(tmp_path, images=IMAGES, labels=LABELS).read_bytes()
    for end in (30, 500, len(whole) // 2, len(whole) - 5):
        (tmp_path / "data.npz").write_bytes(whole[:end])
        assert "found a damaged" in failure(tmp_path / "data.npz")
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 255
    (tmp_path / "data.npz").write_bytes(middle)
    assert "found a damaged array 'images' of" in failure(tmp_path / "data.npz")


def test_a_member_that_is_no_array(tmp_path: pathlib.Path) -> None:
    save(tmp_path, labels=LABELS)
    with zipfile.ZipFile(tmp_path / "data.npz", "a") as archive:
        archive.writestr("images.npy", b"text among arrays")
    message = failure(tmp_path / "data.npz")
    assert message.startswith(f"found a damaged array 'images' of {tmp_path / 'data.npz'} (no array as numpy writes them)")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"4, 3)", b"4, 3 "),  # tokenize.TokenError
        (b"'|u1'", b"',u1'"),  # SyntaxError
        (b" 'shape'", b"b'shape'"),  # TypeError
        (b"(60, 5, 4, 3), }" + b" " * 20, b"(" + b"9" * 30 + b",), }  "),  # OverflowError
        (b"'|u1',", b"(()), "),  # IndexError
    ],
)
def test_damaged_headers(tmp_path: pathlib.Path, old: bytes, new: bytes) -> None:
    save(tmp_path, labels=LABELS)
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    assert buffer.getvalue().count(old) == 1
    with zipfile.ZipFile(tmp_path / "data.npz", "a") as archive:
        archive.writestr("images.npy", buffer.getvalue().replace(old, new.ljust(len(old))))
    assert failure(tmp_path / "data.npz").startswith(f"found a damaged array 'images' of {tmp_path / 'data.npz'} (")


def test_an_array_that_claims_to_be_huge(tmp_path: pathlib.Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6, 3)})
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("images.npy", buffer.getvalue())
    assert "found a damaged array 'images' of" in failure(tmp_path / "data.npz")
