"""The torchvision source, on small sets in the very files that torchvision reads."""

from __future__ import annotations

import hashlib
import json
import pathlib
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from PIL import Image

from evolve.config import FolderTask, TorchvisionTask
from evolve.data.load import load_task
from evolve.data.splits import SHARE
from evolve.data.task import ImageSet, LazyImages, TaskData
from evolve.data.torchvision_source import SETS
from evolve.errors import DataError
from tests.support.published import pixels, write_emnist, write_gtsrb, write_idx, write_mnist

TRAIN = [index % 10 for index in range(200)]
TEST = [index % 10 for index in range(30)]


def load(root: pathlib.Path, dataset: str, **settings: Any) -> TaskData:
    return load_task(TorchvisionTask(name="t", source="torchvision", dataset=dataset, folder=root, **settings))


def failure(root: pathlib.Path, dataset: str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(root, dataset, **settings)
    return str(caught.value)


def numbers(images: ImageSet | None) -> list[int]:
    """The first value of each image, which says which one it is."""
    assert images is not None
    return [int(image[0, 0, 0]) for image in images.images]


# Splits, classes, pixels


def test_mnist_has_its_classes_its_test_and_its_first_images_for_validation(tmp_path: pathlib.Path) -> None:
    write_mnist(tmp_path, TRAIN, TEST)
    data = load(tmp_path, "MNIST")
    assert data.labels[:2] == ("0 - zero", "1 - one")
    assert len(data.labels) == 10
    assert numbers(data.train) == list(range(10, 200))
    assert sorted(numbers(data.validation)) == list(range(10))
    assert sorted(numbers(data.test)) == list(range(30))
    assert data.train.labels.tolist() == TRAIN[10:]
    for number, label in zip(numbers(data.validation), data.validation.labels, strict=True):
        assert label == TRAIN[number]
    expected = pixels(200, 28, 28)[10]
    assert all(np.array_equal(data.train.images[0][:, :, channel], expected) for channel in range(3))
    assert data.warnings == ()


@pytest.mark.parametrize(("name", "classes"), [("KMNIST", ("o", "ki")), ("FashionMNIST", ("T-shirt/top", "Trouser"))])
def test_the_kin_of_mnist(tmp_path: pathlib.Path, name: str, classes: tuple[str, ...]) -> None:
    write_mnist(tmp_path, TRAIN, TEST, name)
    data = load(tmp_path, name)
    assert data.labels[:2] == classes
    assert [len(data.train), len(data.validation), len(data.test or ())] == [190, 10, 30]


def test_emnist_letters_begin_at_a(tmp_path: pathlib.Path) -> None:
    labels = [index % 26 + 1 for index in range(26 * 25)]
    write_emnist(tmp_path, "letters", labels, labels[:52])
    data = load(tmp_path, "EMNIST", arguments={"split": "letters"})
    assert data.labels == tuple("abcdefghijklmnopqrstuvwxyz")
    assert data.train.labels[0] == labels[round(len(labels) * SHARE)] - 1
    assert set(data.train.labels.tolist()) == set(range(26))


def test_emnist_digits_are_another_set_in_the_same_folder_and_cache(tmp_path: pathlib.Path) -> None:
    letters = [index % 26 + 1 for index in range(26 * 25)]
    write_emnist(tmp_path, "letters", letters, letters[:52])
    write_emnist(tmp_path, "digits", TRAIN, TEST)
    kept = tmp_path / "cache"
    load(tmp_path, "EMNIST", arguments={"split": "letters"}, cache=kept)
    data = load(tmp_path, "EMNIST", arguments={"split": "digits"}, cache=kept)
    assert data.labels == tuple("0123456789")
    assert data.fingerprint == load(tmp_path, "EMNIST", arguments={"split": "digits"}).fingerprint
    assert sorted(folder.name.rpartition("-")[0] for folder in kept.iterdir()) == ["EMNIST-digits", "EMNIST-letters"]


def test_semeion_gives_its_first_images_to_no_split_as_they_are_sorted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    for index in range(600):
        values = np.zeros(266)
        values[:256] = np.random.default_rng(index).integers(0, 2, 256)
        values[256 + index // 60] = 1
        lines.append(" ".join(map(str, values)))
    file = tmp_path / "semeion.data"
    file.write_text("\n".join(lines))
    monkeypatch.setattr(torchvision.datasets.SEMEION, "md5_checksum", hashlib.md5(file.read_bytes()).hexdigest())
    data = load(tmp_path, "SEMEION")
    assert data.labels == tuple("0123456789")
    assert data.test is not None
    assert len(data.train) + len(data.validation) + len(data.test) == 600
    # The first 5 % would be of one class.
    assert len(set(data.test.labels.tolist())) > 3
    assert len(set(data.validation.labels.tolist())) > 3


def test_svhn_in_its_mat_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {}
    for split, count, seed in (("train", 200, 0), ("test", 30, 1)):
        file = tmp_path / f"{split}_32x32.mat"
        labels = np.arange(count) % 10
        # There, 10 stands for the digit 0.
        scipy.io.savemat(
            file, {"X": pixels(count, 32, 32, 3, seed=seed).transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)}
        )
        splits[split] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", splits)
    data = load(tmp_path, "SVHN")
    assert data.labels == tuple("0123456789")
    assert np.array_equal(data.train.images[0], pixels(200, 32, 32, 3)[10])
    assert data.train.labels[0] == 0
    assert [len(data.train), len(data.validation), len(data.test or ())] == [190, 10, 30]


def test_cifar_in_its_pickles(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CIFAR100
    base = tmp_path / kind.base_folder
    base.mkdir()
    for split, count, seed in (("train", 400, 0), ("test", 100, 1)):
        rows = pixels(count, 3, 32, 32, seed=seed).reshape(count, -1)
        (base / split).write_bytes(pickle.dumps({"data": rows, "fine_labels": [index % 100 for index in range(count)]}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing {index}" for index in range(100)]}))
    hashes = {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    monkeypatch.setattr(kind, "train_list", [["train", hashes["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", hashes["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashes["meta"]})
    data = load(tmp_path, "CIFAR100")
    assert data.labels[7] == "thing 7"
    assert np.array_equal(data.train.images[0], pixels(400, 3, 32, 32)[20].transpose(1, 2, 0))
    assert [len(data.train), len(data.validation), len(data.test or ())] == [380, 20, 100]


def test_gtsrb_is_read_from_its_files_of_many_sizes(tmp_path: pathlib.Path) -> None:
    write_gtsrb(tmp_path, [index % 43 for index in range(300)], [3, 4, 5])
    data = load(tmp_path, "GTSRB", cache=tmp_path / "cache")
    assert data.labels == tuple(map(str, range(43)))
    assert isinstance(data.train.images, LazyImages)
    assert len({tuple(size) for size in data.train.sizes.tolist()}) == 3
    assert data.test is not None
    assert sorted(data.test.labels.tolist()) == [3, 4, 5]
    assert data.train.names[0].startswith("gtsrb/GTSRB/Training/00000/")
    # Its order is that of the classes: the first images would all be of one.
    assert 0 in data.train.labels
    assert len(data.train) + len(data.validation) == 300
    assert load(tmp_path, "GTSRB").fingerprint == data.fingerprint


def write_listed(root: pathlib.Path, names: list[str], size: tuple[int, int] = (9, 8)) -> None:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(1, size[1], size[0], 3, seed=hash(name) % 1000 + index)[0]).save(root / name)


def test_dtd_has_all_three_splits(tmp_path: pathlib.Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part, split in enumerate(("train", "val", "test")):
        names = [f"{kind}/{kind}_{part}{index:03}.jpg" for kind in ("banded", "dotted") for index in range(3 + part)]
        write_listed(base / "images", names)
        (base / "labels" / f"{split}2.txt").write_text("\n".join(names) + "\n")
    data = load(tmp_path, "DTD", arguments={"partition": 2})
    assert data.labels == ("banded", "dotted")
    assert [len(data.train), len(data.validation), len(data.test or ())] == [6, 8, 10]


def test_aircraft_by_family(tmp_path: pathlib.Path) -> None:
    base = tmp_path / "fgvc-aircraft-2013b" / "data"
    base.mkdir(parents=True)
    (base / "families.txt").write_text("A320\nBoeing 747\n")
    for part, split in enumerate(("train", "val", "test")):
        names = [f"{part}{index:06}" for index in range(4)]
        write_listed(base / "images", [f"{name}.jpg" for name in names])
        lines = [f"{name} {('A320', 'Boeing 747')[index % 2]}" for index, name in enumerate(names)]
        (base / f"images_family_{split}.txt").write_text("\n".join(lines) + "\n")
    data = load(tmp_path, "FGVCAircraft", arguments={"annotation_level": "family"})
    assert data.labels == ("A320", "Boeing 747")
    assert [len(data.train), len(data.validation), len(data.test or ())] == [4, 4, 4]


def test_food_that_lists_its_classes_in_another_order(tmp_path: pathlib.Path) -> None:
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, start in (("train", 0), ("test", 60)):
        listed = {kind: [f"{kind}/{start + index}" for index in range(60)] for kind in ("churros", "apple_pie")}
        write_listed(base / "images", [f"{name}.jpg" for names in listed.values() for name in names])
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
    data = load(tmp_path, "Food101", limit_per_class=20)
    assert data.labels == ("apple_pie", "churros")
    assert np.bincount(data.train.labels).tolist() == [20, 20]
    for name, label in zip(data.train.names, data.train.labels, strict=True):
        assert data.labels[label] in name


def test_pets_and_both_caltechs_are_found_where_they_lie(tmp_path: pathlib.Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, start in (("trainval", 0), ("test", 50)):
        names = [f"{kind}_{start + index}" for kind in ("Abyssinian", "great_pyrenees") for index in range(30)]
        write_listed(base / "images", [f"{name}.jpg" for name in names])
        lines = [f"{name} {1 + name.startswith('great')} {1 + name.startswith('great')} 1" for name in names]
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    data = load(tmp_path, "OxfordIIITPet")
    assert data.labels == ("Abyssinian", "Great Pyrenees")
    assert all(("great" in name) == bool(label) for name, label in zip(data.train.names, data.train.labels, strict=True))
    # The real files have a folder that is no class.
    write_listed(tmp_path / "caltech101/101_ObjectCategories/BACKGROUND_Google", ["image_0001.jpg"])
    for number, (dataset, folder, stem) in enumerate(
        (
            ("Caltech101", "caltech101/101_ObjectCategories/{}", "image_{:04}.jpg"),
            ("Caltech256", "caltech256/256_ObjectCategories/{}", ""),
        )
    ):
        kinds = ("ant", "bass") if number == 0 else ("001.ak47", "002.flag")
        for index, kind in enumerate(kinds):
            pattern = stem or f"{index + 1:03}" + "_{:04}.jpg"
            write_listed(tmp_path / folder.format(kind), [pattern.format(image) for image in range(1, 31)])
        data = load(tmp_path, dataset)
        assert data.labels == kinds
        assert all(data.labels[label] in name for name, label in zip(data.train.names, data.train.labels, strict=True))
        assert len(data.train) + len(data.validation) + len(data.test or ()) == 60


def test_omniglot_is_one_alphabet_after_another(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "omniglot-py"
    kinds = [f"{alphabet}/character{index:02}" for alphabet in ("Greek", "Latin") for index in (1, 2)]
    write_listed(base / "images_background", [f"{kind}/{image:04}.png" for kind in kinds for image in range(20)])
    (base / "images_background.zip").write_bytes(b"archive")
    monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", {"images_background": hashlib.md5(b"archive").hexdigest()})
    data = load(tmp_path, "Omniglot")
    assert data.labels == tuple(kinds)
    assert set(data.train.labels.tolist()) == {0, 1, 2, 3}
    assert all(data.labels[label] in name for name, label in zip(data.train.names, data.train.labels, strict=True))


def test_imagenette_joins_the_names_of_a_class(tmp_path: pathlib.Path) -> None:
    for split, count in (("train", 40), ("val", 3)):
        for wnid in ("n01440764", "n02102040"):
            write_listed(tmp_path / "imagenette2-160" / split / wnid, [f"{split}{index}.JPEG" for index in range(count)])
    data = load(tmp_path, "Imagenette", arguments={"size": "160px"})
    assert data.labels == ("tench, Tinca tinca", "English springer, English springer spaniel")
    # The set validates and has no test.
    assert len(data.validation) == 6
    assert data.test is not None
    assert len(data.train) + len(data.test) == 80


def test_imagenet_tells_classes_of_one_name_apart(tmp_path: pathlib.Path) -> None:
    import torch

    wnids = {"n02012849": ("crane",), "n03126707": ("crane",), "n01440764": ("tench", "Tinca tinca")}
    torch.save((wnids, []), tmp_path / "meta.bin")
    for split in ("train", "val"):
        for wnid in wnids:
            write_listed(tmp_path / split / wnid, [f"{split}{index}.JPEG" for index in range(20)])
    data = load(tmp_path, "ImageNet")
    assert data.labels == ("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)")


def test_an_image_folder_is_the_source_folder(tmp_path: pathlib.Path) -> None:
    write_listed(tmp_path, [f"{kind}/{index}.png" for kind in ("cat", "dog") for index in range(30)])
    data = load(tmp_path, "ImageFolder", limit_per_class=9)
    assert data.labels == ("cat", "dog")
    assert data.fingerprint == load_task(FolderTask(name="t", source="folder", folder=tmp_path, limit_per_class=9)).fingerprint


def test_classes_may_be_given_better_names(tmp_path: pathlib.Path) -> None:
    write_mnist(tmp_path, TRAIN, TEST)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    data = load(tmp_path, "MNIST", classes=names)
    assert data.labels == names
    assert "found 2 names in classes for MNIST in" in (message := failure(tmp_path, "MNIST", classes=("a", "b")))
    assert "expected 10, one for each of its classes, in the order of 0 - zero, 1 - one, 2 - two ..." in message


def test_a_cache_gives_the_same_and_is_used_again(tmp_path: pathlib.Path) -> None:
    write_mnist(tmp_path, TRAIN, TEST)
    kept = tmp_path / "cache"
    first = load(tmp_path, "MNIST", cache=kept)
    assert isinstance(first.train.images, LazyImages)
    (folder,) = kept.iterdir()
    size = (folder / "pixels").stat().st_size
    assert first.fingerprint == load(tmp_path, "MNIST", cache=kept).fingerprint == load(tmp_path, "MNIST").fingerprint
    assert (folder / "pixels").stat().st_size == size
    # Other pixels under the old names are noticed, though their files are not looked at.
    write_idx(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte", pixels(200, 28, 28, seed=9))
    changed = load(tmp_path, "MNIST", cache=kept)
    assert changed.fingerprint == load(tmp_path, "MNIST").fingerprint != first.fingerprint


def test_limit_and_unreadable_files(tmp_path: pathlib.Path) -> None:
    write_gtsrb(tmp_path, [index % 43 for index in range(300)], [3, 4, 5])
    bad = sorted((tmp_path / "gtsrb" / "GTSRB" / "Training" / "00007").iterdir())[0]
    bad.write_bytes(b"P6 nothing")
    assert f"could not read the image {bad}: found " in (message := failure(tmp_path, "GTSRB"))
    assert message.endswith("skip_unreadable = true leaves such images out")
    data = load(tmp_path, "GTSRB", skip_unreadable=True, limit_per_class=2)
    assert data.warnings[0].startswith(
        f"left out 1 image of GTSRB in {tmp_path}, the first because munet could not read the image"
    )
    assert max(np.bincount(data.train.labels)) == 2


# Bad input


def test_every_set_is_one_of_torchvision() -> None:
    assert set(torchvision.datasets.__all__) >= SETS.keys()
    assert all("train" in published.splits for published in SETS.values())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("MINST", "found data set 'MINST', which torchvision does not have or munet cannot read; expected one of Caltech101, "),
        ("MINST", "did you mean 'MNIST' or"),
        ("mnist", "did you mean 'MNIST'?"),
        (
            "CelebA",
            "found data set 'CelebA' of torchvision, which is no set of images with one label each; expected one of Caltech",
        ),
        ("VOCDetection", "which is no set of images with one label each"),
        ("Kinetics", "which is no set of images with one label each"),
        ("FakeData", "which is no set of images with one label each"),
        ("", "other sets can be read as folders, tables or arrays"),
    ],
)
def test_sets_that_cannot_be_used(tmp_path: pathlib.Path, dataset: str, message: str) -> None:
    assert message in failure(tmp_path, dataset)


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        ("MNIST", {}, "could not open the train images of MNIST in {0} (Dataset not found); expected the files that torchvision reads; "
         "put them there, or set download = true"),
        ("FER2013", {}, "fetch them as torchvision's documentation of the set says"),
        ("EMNIST", {}, "missing 1 required positional argument: 'split'"),
        ("EMNIST", {}, 'set arguments = {{ split = "letters" }}, or another of its splits'),
        ("EMNIST", {"arguments": {"split": "leters"}}, "Unknown value 'leters' for argument split"),
        ("MNIST", {"arguments": {"train": True}}, "found argument 'train' for MNIST; expected only arguments that a task may set: none"),
        ("DTD", {"arguments": {"split": "val"}}, "found argument 'split' for DTD; expected only arguments that a task may set: partition"),
        ("ImageNet", {"download": True}, "found download = true for ImageNet, which torchvision cannot download"),
        ("ImageNet", {}, "could not open the train images of ImageNet in {0} ("),
        ("ImageFolder", {"arguments": {"loader": "x"}}, "found arguments of ImageFolder; expected folder alone"),
        ("ImageFolder", {"download": True}, "found download of ImageFolder"),
    ],
)  # fmt: skip
def test_settings_and_files_that_do_not_fit(tmp_path: pathlib.Path, dataset: str, settings: dict[str, Any], message: str) -> None:
    assert message.format(tmp_path) in failure(tmp_path, dataset, **settings)
    # Nothing was fetched or made.
    assert not list(tmp_path.iterdir())


def test_no_folder(tmp_path: pathlib.Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert failure(nowhere, "MNIST") == (
        f"found nothing at {nowhere}; expected the folder that torchvision's MNIST calls root; set folder of the task; "
        "download = true fetches the set"
    )
    assert failure(nowhere, "ImageNet").endswith("set folder of the task")
    nowhere.write_text("a file")
    assert failure(nowhere, "MNIST").startswith(f"found a file at {nowhere}")


def test_packed_files_are_seen(tmp_path: pathlib.Path) -> None:
    write_mnist(tmp_path, TRAIN, TEST)
    for file in (tmp_path / "MNIST" / "raw").iterdir():
        file.rename(file.with_name(f"{file.name}.gz"))
    assert failure(tmp_path, "MNIST").endswith("unpack t10k-images-idx3-ubyte.gz and those beside it (gunzip --keep)")


def test_a_download_that_fails_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    message = failure(tmp_path / "new", "MNIST", download=True)
    assert "could not open the train images of MNIST in" in message
    assert "Error downloading train-images-idx3-ubyte.gz" in message
    assert message.endswith("put its files there yourself")


def test_files_that_are_there_are_not_downloaded_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, TRAIN, TEST)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert len(load(tmp_path, "MNIST", download=True).train) == 190


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", b"text", b"\0\0\x08\x03" + bytes(12), "cut short"])
def test_damaged_idx_files(tmp_path: pathlib.Path, content: bytes | str) -> None:
    write_mnist(tmp_path, TRAIN, TEST)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100] if isinstance(content, str) else content)
    message = failure(tmp_path, "MNIST")
    assert message.startswith(
        (f"could not open the train images of MNIST in {tmp_path} (", "found 200 labels for 0 train images of")
    )


def test_fewer_labels_than_images(tmp_path: pathlib.Path) -> None:
    write_mnist(tmp_path, TRAIN, TEST)
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.zeros(7, dtype=np.uint8))
    assert failure(tmp_path, "MNIST").startswith("found 7 labels for 200 train images of MNIST in")


def test_labels_outside_the_classes(tmp_path: pathlib.Path) -> None:
    write_mnist(tmp_path, [*TRAIN, 12], TEST)
    assert "found label 12 for 'train[200]' among the training images of MNIST in" in failure(tmp_path, "MNIST")


def test_a_class_in_test_alone(tmp_path: pathlib.Path) -> None:
    write_mnist(tmp_path, [label for label in TRAIN if label != 3], TEST)
    assert "found no training images of class '3 - three' in MNIST in" in failure(tmp_path, "MNIST")


def test_classes_that_differ_between_splits(tmp_path: pathlib.Path) -> None:
    for split, kinds in (("train", ("banded", "dotted")), ("val", ("banded", "dotted")), ("test", ("banded", "zigzagged"))):
        names = [f"{kind}/{split}.jpg" for kind in kinds]
        write_listed(tmp_path / "dtd" / "dtd" / "images", names)
        (tmp_path / "dtd" / "dtd" / "labels").mkdir(exist_ok=True)
        (tmp_path / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text("\n".join(names))
    assert failure(tmp_path, "DTD").startswith(
        f"found other classes among the test images of DTD in {tmp_path} than among those to train on: "
    )


def test_images_of_no_size(tmp_path: pathlib.Path) -> None:
    write_mnist(tmp_path, TRAIN, TEST)
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw / "train-images-idx3-ubyte", np.zeros((200, 0, 28), dtype=np.uint8))
    message = failure(tmp_path, "MNIST")
    assert message.startswith((f"could not open the train images of MNIST in {tmp_path}", "could not read the image train["))


def test_a_package_of_torchvision_that_is_missing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "h5py is not found" in failure(tmp_path, "PCAM")
