"""munet-evolve on every data set that cannot be used: the message, exit status 2, and nothing written. Odd ones are said and used."""

from __future__ import annotations

import pathlib
import re
import sys
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from evolve import cli
from evolve.root import save_root
from evolve.store import System
from tests.support.published import pixels, png, png_of_no_size, write_idx, write_mnist, write_parquet
from tests.support.system import IMAGE_SIZE, random_tensors, root_specs

SETTINGS = f"""
[root]
source = "file"
file = "root.safetensors"
[defaults]
image_size = {IMAGE_SIZE}
[search]
rounds = 1
children_per_task = 1
generation_size = 1
[training]
batch_size = 4
intervals = 1
batches_per_interval = 1
device = "cpu"
threads = 1
[[tasks]]
name = "things"
"""
FOLDER = 'source = "folder"\nfolder = "images"\n'
TABLE = 'source = "csv"\nfile = "table.csv"\n'
ARRAYS = 'source = "arrays"\nfile = "arrays.npz"\n'
MNIST = 'source = "torchvision"\ndataset = "MNIST"\nfolder = "published"\n'
PARQUET = 'source = "huggingface"\npath = "parquet"\n'
GIVEN = "train/{0} train/{1} validation/{0} validation/{1} test/{0} test/{1}"


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    # What Hugging Face's library converts, it keeps.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "converted")
    random = np.random.default_rng(0)
    layers = {position: (spec, random_tensors(spec, random)) for position, spec in root_specs().items()}
    save_root(tmp_path / "root.safetensors", layers, IMAGE_SIZE)
    return tmp_path


def _images(folder: pathlib.Path, *classes: str, count: int = 3, size: tuple[int, int] = (6, 5)) -> None:
    """Writes images, all different, below images/."""
    for number, name in enumerate(classes):
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            random = np.random.default_rng([number, index])
            pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.png")


def _split(folder: pathlib.Path, a: str = "cat", b: str = "dog") -> None:
    _images(folder, *GIVEN.format(a, b).split())


def _run(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, task: str) -> int:
    file = folder / "experiment.toml"
    file.write_text(SETTINGS + task, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["munet-evolve", "run", str(file), "--system", str(folder / "system")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def _fewer_images_than_classes(folder: pathlib.Path) -> None:
    _images(folder, *(f"class {number}" for number in range(8)), count=1)


def _twice_after_normalising(folder: pathlib.Path) -> None:
    _images(folder, unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café"), "bar")


def _zero_size(folder: pathlib.Path) -> None:
    _split(folder)
    (folder / "images" / "train" / "cat" / "nothing.png").write_bytes(png_of_no_size())


def _text_files(folder: pathlib.Path) -> None:
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / "notes.txt").write_text("a picture of it")


def _text_called_image(folder: pathlib.Path) -> None:
    _split(folder)
    (folder / "images" / "train" / "cat" / "fake.jpg").write_text("a picture of it")


def _in_test_alone(folder: pathlib.Path) -> None:
    _split(folder)
    _images(folder, "test/parrot")


def _empty_class(folder: pathlib.Path) -> None:
    _images(folder, "cat", "dog")
    (folder / "images" / "parrot").mkdir()


def _table(*lines: str) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        _images(folder, "cat", "dog", count=6)
        (folder / "table.csv").write_text("\n".join(("file,label,split", *lines)))

    return make


def _arrays(numbers: list[int], **changes: np.ndarray) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        images = np.random.default_rng(0).integers(0, 256, (len(numbers), 5, 6, 3), dtype=np.uint8)
        np.savez(folder / "arrays.npz", **{"images": images, "labels": np.array(numbers), **changes})

    return make


def _mnist(folder: pathlib.Path) -> None:
    write_mnist(folder / "published", [index % 10 for index in range(100)], list(range(10)), size=6)


def _damaged_mnist(folder: pathlib.Path) -> None:
    _mnist(folder)
    file = folder / "published" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-3])


def _mnist_of_no_size(folder: pathlib.Path) -> None:
    _mnist(folder)
    write_idx(folder / "published" / "MNIST" / "raw" / "train-images-idx3-ubyte", np.zeros((100, 6, 0), np.uint8))


def _mnist_without_threes(folder: pathlib.Path) -> None:
    write_mnist(folder / "published", [0, 1, 2, 4, 5, 6, 7, 8, 9] * 9, list(range(10)), size=6)


def _parquet(labels: list[int] | None = None, **changes: bytes) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        images = [png(image) for image in pixels(40, 5, 6, 3)]
        images[3] = changes.get("image", images[3])
        write_parquet(folder / "parquet" / "train.parquet", images, labels or [0, 1] * 20, None if labels else ("cat", "dog"))

    return make


BAD: dict[str, tuple[Callable[[pathlib.Path], None], str, str]] = {
    "fewer images than classes": (
        _fewer_images_than_classes,
        FOLDER,
        "8 training images of 8 classes .* and no test and no validation images; expected at least 2 training images more",
    ),
    "one class only": (lambda folder: _images(folder, "cat", count=9), FOLDER, "one class only, 'cat',.*two or more classes"),
    "classes twice after normalising": (_twice_after_normalising, FOLDER, "found two folders.*café"),
    "an image of no size": (_zero_size, FOLDER, r"could not read the image .*nothing\.png.*skip_unreadable"),
    "text files": (_text_files, FOLDER, "found no images of class 'cat' in .*cat"),
    "text that calls itself an image": (_text_called_image, FOLDER, r"could not read the image .*fake\.jpg"),
    "a class in test alone": (_in_test_alone, FOLDER, "found class 'parrot' in .*test but not in .*train"),
    "a class without images": (_empty_class, FOLDER, "found no images of class 'parrot' in .*parrot"),
    "a folder outside the declared classes": (
        _split,
        FOLDER + 'classes = ["cat", "dgo"]\n',
        "found class 'dog' .*did you mean 'dgo'",
    ),
    "a declared class without images": (
        _split,
        FOLDER + 'classes = ["cat", "dog", "parrot"]\n',
        "found no training images of class 'parrot'",
    ),
    "no folder": (lambda folder: None, FOLDER, "found nothing at .*images"),
    "a label outside the classes in a table": (
        _table(
            *(f"images/cat/{n}.png,cat,{s}" for n, s in enumerate(("train", "validation", "test"))), "images/dog/0.png,dig,train"
        ),
        TABLE + 'classes = ["cat", "dog"]\n',
        "found class 'dig' .*line 5.*did you mean 'dog'",
    ),
    "a table that names a missing file": (
        _table("images/cat/0.png,cat,train", "images/dog/77.png,dog,train"),
        TABLE,
        r"77\.png",
    ),
    "a table with an unknown split": (_table("images/cat/0.png,cat,trian"), TABLE, "found split 'trian' in line 2"),
    "a class missing from train in a table": (
        _table(
            *(f"images/cat/{n}.png,cat,train" for n in range(3)),
            "images/dog/0.png,dog,train",
            "images/dog/1.png,dog,validation",
            "images/dog/2.png,parrot,test",
        ),
        TABLE,
        "found no training images of class 'parrot'",
    ),
    "labels outside the classes in arrays": (
        _arrays([0, 1] * 20 + [7]),
        ARRAYS + 'classes = ["cat", "dog"]\n',
        "found label 7 for .*0 to 1, the indices of its 2 classes",
    ),
    "negative labels": (_arrays([0, 1, -1] * 9), ARRAYS, "found label -1 at labels"),
    "floating point images": (
        _arrays([0, 1], images=np.zeros((2, 4, 4, 3))),
        ARRAYS,
        "found images of type float64 .*scale values to 0 to 255",
    ),
    "more images than labels": (_arrays([0, 1], labels=np.array([0])), ARRAYS, "found 2 images in images and 1 labels"),
    "pickled labels": (
        _arrays([0, 1], labels=np.array([{}, {}], dtype=object)),
        ARRAYS,
        "found pickled objects in array 'labels'",
    ),
    "a data set of torchvision that is not there": (lambda folder: None, MNIST, "found nothing at .*published.*download = true"),
    "a data set of torchvision that there is not": (_mnist, MNIST.replace("MNIST", "MINST"), "did you mean .*'MNIST'"),
    "a data set without one label for each image": (
        _mnist,
        MNIST.replace("MNIST", "CelebA"),
        "'CelebA' of torchvision, which is no",
    ),
    "a damaged idx file": (_damaged_mnist, MNIST, "could not open the test images of MNIST in .*published"),
    "idx images of no size": (_mnist_of_no_size, MNIST, "MNIST in .*published"),
    "a digit missing from train": (_mnist_without_threes, MNIST, "found no training images of class '3 - three' in MNIST"),
    "a split of EMNIST that there is not": (
        _mnist,
        MNIST.replace("MNIST", "EMNIST") + 'arguments = { split = "leters" }\n',
        "Unknown value 'leters' for argument split",
    ),
    "a data set that is neither here nor to be fetched": (
        lambda folder: None,
        PARQUET.replace("parquet", "somebody/pets"),
        "found no folder 'somebody/pets' beside the experiment.*set download = true",
    ),
    "a column that a Parquet file does not have": (_parquet(), PARQUET + 'label_column = "kind"\n', "expected a column 'kind'"),
    "labels outside the classes in a Parquet file": (
        _parquet([0, 1, 5, 1] * 10),
        PARQUET + 'classes = ["cat", "dog"]\n',
        r"found label 5 for 'train\[\d+\]' .*expected 0 to 1, the indices of its 2 classes",
    ),
    "an image of no size in a Parquet file": (
        _parquet(image=png_of_no_size()),
        PARQUET,
        r"could not read the image train\[3\] of data set .*parquet: found ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_exit_2_before_anything_is_written(folder, monkeypatch, capsys, case):
    make, task, message = BAD[case]
    make(folder)
    # Writing a Parquet file draws bars.
    capsys.readouterr()
    assert _run(folder, monkeypatch, task) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "expected" in error
    assert "Traceback" not in error
    assert re.search(message, error, re.DOTALL), error
    assert not (folder / "system").exists()


def test_splits_that_overlap_are_warned_of_with_counts(folder, monkeypatch, capsys):
    _split(folder)
    for index in range(2):
        (folder / "images" / "test" / "dog" / f"copy {index}.png").write_bytes(
            (folder / "images" / "train" / "dog" / f"{index}.png").read_bytes()
        )
    assert _run(folder, monkeypatch, FOLDER) == 0
    assert "warning: things: 2 of 8 test images of folder" in capsys.readouterr().err.replace("\n", " ")


def test_an_image_of_20000_by_1_pixels_is_used(folder, monkeypatch):
    _split(folder)
    for name, size in (("long", (20_000, 1)), ("high", (1, 20_000))):
        Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(folder / "images" / "train" / "cat" / f"{name}.png")
    assert _run(folder, monkeypatch, FOLDER) == 0
    assert System.open(folder / "system").tasks()["things"].labels == ("cat", "dog")


@pytest.mark.parametrize(("make", "task", "classes"), [(_mnist, MNIST, 10), (_parquet(), PARQUET, 2)], ids=["MNIST", "Parquet"])
def test_data_of_the_ecosystem_are_used(folder, monkeypatch, make, task, classes):
    make(folder)
    assert _run(folder, monkeypatch, task) == 0
    assert len(System.open(folder / "system").tasks()["things"].labels) == classes


def test_a_missing_library_exits_2_and_says_what_to_install(folder, monkeypatch, capsys):
    _parquet()(folder)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert _run(folder, monkeypatch, PARQUET) == 2
    message = "error: found no module 'datasets'; expected the packages of 'huggingface'; pip install '.[huggingface]'\n"
    assert capsys.readouterr().err == message
    assert not (folder / "system").exists()
