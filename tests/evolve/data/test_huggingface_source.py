"""The huggingface source, on small folders and Parquet files as the hub has them, without a network."""

from __future__ import annotations

import csv
import gc
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from evolve.config import Experiment, HuggingFaceTask, load_settings
from evolve.data.load import load_task
from evolve.data.task import ImageSet, LazyImages, TaskData
from evolve.errors import DataError, EvolveError
from tests.support.published import pixels, png, png_of_no_size, write_parquet

# The library leaves tables of metadata open, until they are collected: here, at the end of each test.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

IMAGES = [png(image) for image in pixels(120, 5, 6, 3)]
LABELS = [index % 3 for index in range(120)]
NAMES = ("cat", "dog", "bird")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the library converts goes into a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("library"))
    yield
    # Whatever a test has done, the library is as it was.
    assert not datasets.are_progress_bars_disabled()
    gc.collect()


def load(path: pathlib.Path | str, **settings: Any) -> TaskData:
    return load_task(HuggingFaceTask(name="t", source="huggingface", path=str(path), **settings))


def failure(path: pathlib.Path | str, **settings: Any) -> str:
    with pytest.raises(EvolveError) as caught:
        load(path, **settings)
    return str(caught.value)


def numbers(images: ImageSet | None) -> list[int]:
    """The first value of each image, which says which one it is."""
    assert images is not None
    return [int(image[0, 0, 0]) for image in images.images]


def parquet(
    folder: pathlib.Path, split: str = "train", part: slice = slice(None), names: Sequence[str] | None = NAMES, **columns: Any
) -> pathlib.Path:
    """Writes a part of IMAGES as a Parquet file of the hub's naming, and returns the folder of the set."""
    file = folder / "data" / f"{split}-00000-of-00001.parquet"
    labels = columns.pop("labels", LABELS[part])
    write_parquet(file, columns.pop("images", IMAGES[part]), labels, names, **columns)
    return folder


# Splits, classes, pixels


def test_parquet_with_encoded_images_and_class_labels(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path, "train", slice(0, 60))
    parquet(tmp_path, "validation", slice(60, 90))
    parquet(tmp_path, "test", slice(90, 120))
    data = load(tmp_path)
    assert data.labels == NAMES
    assert numbers(data.train) == list(range(60))
    assert sorted(numbers(data.validation)) == list(range(60, 90))
    assert sorted(numbers(data.test)) == list(range(90, 120))
    for images in (data.train, data.validation):
        assert [LABELS[number] for number in numbers(images)] == images.labels.tolist()
    assert np.array_equal(data.train.images[7], pixels(120, 5, 6, 3)[7])
    assert data.warnings == ()


def test_missing_splits_go_by_content(tmp_path: pathlib.Path) -> None:
    data = load(parquet(tmp_path / "a"))
    assert data.test is not None
    assert sorted(numbers(data.train) + numbers(data.validation) + numbers(data.test)) == list(range(120))
    # The order of the rows says nothing.
    turned = load(parquet(tmp_path / "b", images=IMAGES[::-1], labels=LABELS[::-1]))
    assert set(numbers(turned.validation)) == set(numbers(data.validation))
    assert set(numbers(turned.test)) == set(numbers(data.test))


def image_folder(folder: pathlib.Path) -> pathlib.Path:
    for split, start in (("train", 0), ("test", 60)):
        for index in range(start, start + 60):
            file = folder / split / NAMES[LABELS[index]] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(IMAGES[index])
    return folder


def test_a_folder_of_images(tmp_path: pathlib.Path) -> None:
    data = load(image_folder(tmp_path), limit_per_class=9)
    assert data.labels == ("bird", "cat", "dog")
    assert np.bincount(data.train.labels).tolist() == [9, 9, 9]
    assert sorted(numbers(data.test)) == list(range(60, 120))
    for number, label in zip(numbers(data.train), data.train.labels, strict=True):
        assert data.labels[label] == NAMES[LABELS[number]]


def test_a_folder_with_metadata(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train").mkdir()
    with (tmp_path / "train" / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "species", "note"])
        for index, image in enumerate(IMAGES):
            (tmp_path / "train" / f"{index}.png").write_bytes(image)
            writer.writerow([f"{index}.png", NAMES[LABELS[index]], "good"])
    data = load(tmp_path, label_column="species", classes=("dog", "cat", "bird"))
    assert data.labels == ("dog", "cat", "bird")
    for number, label in zip(numbers(data.train), data.train.labels, strict=True):
        assert data.labels[label] == NAMES[LABELS[number]]
    assert failure(tmp_path) == (
        f"found columns ['image', 'species', 'note'] in data set {tmp_path}; expected one column of labels; "
        "set label_column to one of them"
    )


def test_photographs_stand_upright_as_everywhere(tmp_path: pathlib.Path) -> None:
    for index in range(40):
        exif = Image.Exif()
        exif[0x0112] = 6
        file = tmp_path / ("cat", "dog")[index % 2] / f"{index}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(1, 8, 4, 3, seed=index)[0]).save(file, exif=exif)
    assert set(map(tuple, load(tmp_path).train.sizes.tolist())) == {(4, 8)}


def test_labels_that_are_names_or_numbers(tmp_path: pathlib.Path) -> None:
    texts = load(parquet(tmp_path / "a", names=None, labels=[NAMES[label] for label in LABELS]))
    assert texts.labels == ("bird", "cat", "dog")
    whole = load(parquet(tmp_path / "b", names=None))
    assert whole.labels == ("0", "1", "2")
    named = load(tmp_path / "b", classes=NAMES)
    assert named.labels == NAMES
    assert np.array_equal(named.train.labels, whole.train.labels)
    # A class label has a name already: classes puts them in order.
    ordered = load(parquet(tmp_path / "c"), classes=("bird", "dog", "cat"))
    assert ordered.labels == ("bird", "dog", "cat")
    assert ordered.train.labels.tolist() == [(2, 1, 0)[label] for label in whole.train.labels]


def test_columns_of_other_names_and_bytes_without_a_type(tmp_path: pathlib.Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet(tmp_path / "a", image_column="img", label_column="fine_label")
    assert load(tmp_path / "a").labels == NAMES
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"picture": IMAGES, "kind": [NAMES[label] for label in LABELS]}), tmp_path / "b" / "x.parquet")
    (tmp_path / "c").mkdir()
    stored = [{"bytes": image, "path": "x.png"} for image in IMAGES]
    pq.write_table(pa.table({"picture": stored, "kind": [NAMES[label] for label in LABELS]}), tmp_path / "c" / "x.parquet")
    prints = {load(tmp_path / folder, image_column="picture", label_column="kind").fingerprint for folder in ("b", "c")}
    assert len(prints) == 1


def test_splits_by_the_names_and_slices_that_the_task_gives(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path, "train", slice(0, 60))
    parquet(tmp_path, "validation", slice(60, 90))
    data = load(tmp_path, train_split="train[:50%]", validation_split="validation[:50%]", test_split="validation[50%:]")
    assert numbers(data.train) == list(range(30))
    assert sorted(numbers(data.validation)) == list(range(60, 75))
    assert sorted(numbers(data.test)) == list(range(75, 90))
    assert data.warnings == ()


def test_splits_of_unknown_names_are_left_alone_and_said(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path, "train", slice(0, 60))
    parquet(tmp_path, "extra", slice(60, 90))
    parquet(tmp_path, "test", slice(90, 120))
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    readme += "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in ("train", "extra", "test"))
    (tmp_path / "README.md").write_text(f"{readme}---\n")
    data = load(tmp_path)
    assert data.warnings[0] == f"left alone splits 'extra' of data set {tmp_path}, whose names munet does not know"
    assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(60))
    assert len(load(tmp_path, train_split="train+extra").train) > 60


def test_a_cache_gives_the_same_and_is_used_again(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path / "set")
    kept = tmp_path / "cache"
    first = load(tmp_path / "set", cache=kept)
    assert isinstance(first.train.images, LazyImages)
    (folder,) = kept.iterdir()
    size = (folder / "pixels").stat().st_size
    assert load(tmp_path / "set", cache=kept).fingerprint == first.fingerprint == load(tmp_path / "set").fingerprint
    assert (folder / "pixels").stat().st_size == size
    changed = [png(image) for image in pixels(120, 5, 6, 3, seed=5)]
    parquet(tmp_path / "set", images=changed)
    assert load(tmp_path / "set", cache=kept).fingerprint == load(tmp_path / "set").fingerprint != first.fingerprint


def test_progress_counts_every_image(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path)
    told: list[tuple[int, int]] = []
    task = HuggingFaceTask(name="t", source="huggingface", path=str(tmp_path))
    load_task(task, lambda done, total: told.append((done, total)))
    # A set to be divided is looked at twice.
    assert told[-1] == (240, 240)


def test_a_path_is_a_folder_beside_the_experiment_or_a_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "data" / "pets").mkdir(parents=True)
    task = '[[tasks]]\nname = "{0}"\nsource = "huggingface"\npath = "data/{0}"\n'
    (tmp_path / "experiment.toml").write_text(task.format("pets") + task.format("birds"))
    pets, birds = load_settings(tmp_path / "experiment.toml", Experiment).tasks
    assert isinstance(pets, HuggingFaceTask)
    assert isinstance(birds, HuggingFaceTask)
    assert pets.path == str(tmp_path / "data" / "pets")
    assert birds.path == "data/birds"


def test_a_set_of_the_hub_that_is_on_this_machine_is_used_without_a_network(tmp_path: pathlib.Path) -> None:
    """The library keeps what it prepared under the name of the set; a later start without a network finds it there."""
    parquet(tmp_path)
    datasets.load_dataset(str(tmp_path), cache_dir=tmp_path / "prepared")
    (prepared,) = (tmp_path / "prepared").glob("*/default/*/*/dataset_info.json")
    revision = "0123456789abcdef0123456789abcdef01234567"
    kept = pathlib.Path(datasets.config.HF_DATASETS_CACHE) / "somebody___pets" / "default" / "0.0.0" / revision
    kept.parent.mkdir(parents=True)
    shutil.copytree(prepared.parent, kept)
    for file in kept.glob("*.arrow"):
        file.rename(kept / "pets-train.arrow")
    info = (kept / "dataset_info.json").read_text()
    (name,) = {file.name for file in prepared.parent.glob("*.arrow")}
    (kept / "dataset_info.json").write_text(info.replace(name.removesuffix("-train.arrow"), "pets"))
    assert load("somebody/pets").fingerprint == load(tmp_path).fingerprint


# Bad input


def test_no_folder_and_nothing_on_this_machine(tmp_path: pathlib.Path) -> None:
    assert failure(tmp_path / "no") == (
        f"found nothing at {tmp_path / 'no'}; expected a folder of images or Parquet files; set path of the task"
    )
    assert failure("somebody/pets") == (
        "found no folder 'somebody/pets' beside the experiment, and no such data set of the hub on this machine; expected one of them; "
        "mend path, or set download = true to fetch the data set"
    )
    (tmp_path / "file").write_text("text")
    assert failure(tmp_path / "file").startswith(f"found a file at {tmp_path / 'file'}")
    (tmp_path / "empty").mkdir()
    assert failure(tmp_path / "empty").startswith(f"could not open data set {tmp_path / 'empty'} (")


def test_nothing_is_fetched_unless_asked_for(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    asked = []

    def load_dataset(*arguments: Any, **settings: Any) -> None:
        asked.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    failure("somebody/pets")
    assert failure("somebody/pets", download=True) == (
        "could not open data set somebody/pets (no route); expected a data set of the hub; mend the settings; is there a network?"
    )
    assert asked == [(True, True), (False, False)]
    assert (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE) == (False, False)


def test_the_package_is_missing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert failure(tmp_path) == "found no module 'datasets'; expected the packages of 'huggingface'; pip install '.[huggingface]'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "picture"}, "found columns ['image', 'label'] in data set {0}; expected a column 'picture'; set image_column"),
        ({"label_column": "lable"}, "expected a column 'lable'; did you mean 'label'?"),
        ({"image_column": "label"}, "found column 'label' of type ClassLabel(names=['cat', 'dog', 'bird']) in data set {0}; expected "
         "images, or the bytes of image files; set image_column to one of ['image']"),
        ({"label_column": "image"}, "found labels of type Image("),
        ({"classes": ("cat", "dgo", "bird")}, "found class 'dog' in data set {0}, which is not among the 3 classes that the task declares"),
        ({"classes": ("cat", "dgo", "bird")}, "did you mean 'dgo'?"),
        ({"classes": (*NAMES, "cow")}, "found no training images of class 'cow' in data set {0}"),
        ({"config": "large"}, "could not open data set {0} (BuilderConfig 'large' not found. Available: ['default'])"),
        ({"revision": "main"}, "found revision 'main' for the folder {0}; expected revisions of sets on the hub alone"),
        ({"test_split": "tset"}, "could not open data set {0} (Unknown split \"tset\". Should be one of ['train'].)"),
        ({"train_split": "train[:0]"}, 'could not open data set {0} (Instruction "train[:0]" corresponds to no data!)'),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: pathlib.Path, settings: dict[str, Any], message: str) -> None:
    assert message.format(tmp_path) in failure(parquet(tmp_path), **settings)


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing", "cut short"])
def test_a_damaged_table(tmp_path: pathlib.Path, content: bytes | str) -> None:
    (file,) = parquet(tmp_path).glob("data/*.parquet")
    file.write_bytes(file.read_bytes()[:-200] if isinstance(content, str) else content)
    assert failure(tmp_path).startswith(f"could not open data set {tmp_path} (")


def test_labels_outside_the_classes(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path / "a", "train", slice(0, 60))
    # As the hub has tests whose labels are kept back.
    parquet(tmp_path / "a", "test", slice(60, 90), labels=[-1] * 30)
    assert failure(tmp_path / "a") == (
        f"found label -1 for test[0] of data set {tmp_path / 'a'}; expected 0 to 2, the indices of its 3 classes; "
        "a split without labels, which are often -1, is no test split: set test_split"
    )
    parquet(tmp_path / "b", names=None, labels=[7, *LABELS[1:]])
    assert "found label 7 for 'train[0]' among the" in failure(tmp_path / "b", classes=NAMES)
    parquet(tmp_path / "c", names=None, labels=[None, *LABELS[1:]])
    assert failure(tmp_path / "c") == f"found no label for train[0] of data set {tmp_path / 'c'}; expected one for each image"
    parquet(tmp_path / "d", names=None, labels=[0.5] * 120)
    assert "found labels of type Value('float64') in column 'label' of data set" in failure(tmp_path / "d")
    parquet(tmp_path / "e", names=None, labels=[[0, 1]] * 120)
    assert "expected class labels, names or whole numbers, one for each image; set label_column" in failure(tmp_path / "e")


def test_a_class_in_test_alone(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path, "train", slice(0, 60), labels=[index % 2 for index in range(60)])
    parquet(tmp_path, "test", slice(60, 90))
    assert "found no training images of class 'bird' in data set" in failure(tmp_path)


def test_no_training_split_and_two_for_one(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path / "a", "test")
    assert failure(tmp_path / "a") == (
        f"found splits ['test'] in data set {tmp_path / 'a'}; expected one called 'train'; set train_split to the one to train on"
    )
    parquet(tmp_path / "c", "train", slice(0, 60))
    parquet(tmp_path / "c", "test", slice(0, 0))
    assert failure(tmp_path / "c").startswith(
        f'could not open data set {tmp_path / "c"} (Instruction "test" corresponds to no data!)'
    )
    for split in ("train", "validation", "val"):
        parquet(tmp_path / "b", split, slice(0, 60))
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    readme += "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in ("train", "validation", "val"))
    (tmp_path / "b" / "README.md").write_text(f"{readme}---\n")
    assert "found splits 'validation' and 'val' in" in (message := failure(tmp_path / "b"))
    assert message.endswith("set validation_split to one of them, or to both: validation_split = 'validation+val'")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (png_of_no_size(), "could not read the image train[3] of data set {0}: found "),
        (b"a picture of it", "could not read the image train[3] of data set {0}: found 15 bytes that start with"),
        (None, "could not read the image train[3] of data set {0}: found no image, expected one in each row"),
    ],
    ids=["no size", "text", "none"],
)
def test_images_that_cannot_be_read(tmp_path: pathlib.Path, image: bytes | None, message: str) -> None:
    parquet(tmp_path, images=[*IMAGES[:3], image, *IMAGES[4:]])
    assert message.format(tmp_path) in (said := failure(tmp_path))
    assert said.endswith("skip_unreadable = true leaves such images out")
    data = load(tmp_path, skip_unreadable=True)
    assert data.warnings[0].startswith(f"left out 1 image of data set {tmp_path}, the first because munet could not read")
    assert len(data.train) + len(data.validation) + len(data.test or ()) == 119


def test_a_file_that_a_folder_has_lost(tmp_path: pathlib.Path) -> None:
    image_folder(tmp_path)
    assert load(tmp_path).labels
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="could not read the image train"):
        load(tmp_path)
