"""The cache of decoded images: the same data as in memory, built once, whole after a kill, a full disk or a folder without leave."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from evolve.config import FolderTask
from evolve.data import cache
from evolve.data.cache import HEADER_BYTES, RECORD
from evolve.data.load import load_task
from evolve.data.mapped import MappedImages
from evolve.data.splits import SHARE
from evolve.data.stored import Decoded, FileImage, StoredImage
from evolve.data.task import LazyImages, TaskData
from evolve.errors import DataError
from evolve.training.images import evaluation_images, training_images

NUM_IMAGES = 60


def paint(folder: pathlib.Path, count: int, seed: int = 0, prefix: str = "", ending: str = ".png") -> None:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        height, width = random.integers(4, 40, 2)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{prefix}{index:03}{ending}")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    for seed, label in enumerate(("cat", "dog")):
        paint(tmp_path / "images" / label, NUM_IMAGES // 2, seed)
    return tmp_path / "images"


def load(folder: pathlib.Path, kept: pathlib.Path | None = None, **settings: object) -> TaskData:
    return load_task(FolderTask(name="t", source="folder", folder=folder, cache=kept, **settings))  # type: ignore[arg-type]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """The files that the cache decoded."""
    files: list[pathlib.Path] = []
    read = cache.read_image

    def count(file: tuple[StoredImage, str]) -> Decoded | DataError:
        assert isinstance(file[0], FileImage)
        files.append(file[0].path)
        return read(file)

    monkeypatch.setattr(cache, "read_image", count)
    return files


def only(folder: pathlib.Path) -> pathlib.Path:
    (found,) = folder.iterdir()
    return found


def num_records(kept: pathlib.Path) -> int:
    try:
        return ((only(kept) / "index").stat().st_size - HEADER_BYTES) // RECORD.itemsize
    except (OSError, ValueError):
        return 0


def equal(one: TaskData, other: TaskData) -> None:
    assert one.fingerprint == other.fingerprint
    for split in ("train", "validation", "test"):
        a, b = getattr(one, split), getattr(other, split)
        assert list(a.names) == list(b.names)
        assert a.sizes.tolist() == b.sizes.tolist()
        assert a.hashes == b.hashes
        for x, y in zip(a.images, b.images, strict=True):
            assert np.array_equal(x, y)


def test_gives_the_data_that_memory_gives(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    kept = tmp_path / "new" / "cache"
    equal(load(folder), load(folder, kept))
    limited = load(folder, kept, limit_per_class=5)
    equal(load(folder, limit_per_class=5), limited)
    assert isinstance(limited.train.images, LazyImages)


def test_training_and_evaluation_see_the_same_bytes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    memory, mapped = load(folder), load(folder, tmp_path / "cache")
    cpu = torch.device("cpu")
    one, other = training_images(memory.train, 16, cpu), training_images(mapped.train, 16, cpu)
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.sizes, other.sizes)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(
        evaluation_images(memory.validation, 16, 2, cpu).pixels, evaluation_images(mapped.validation, 16, 2, cpu).pixels
    )


def test_resized_training_images_may_be_on_disk(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(folder, tmp_path / "cache")
    cpu = torch.device("cpu")
    in_memory = training_images(data.train, 16, cpu)
    monkeypatch.setattr("evolve.training.images.free_memory", lambda: 0)
    before = sorted(only(tmp_path / "cache").iterdir())
    on_disk = training_images(data.train, 16, cpu)
    assert torch.equal(in_memory.pixels, on_disk.pixels)
    taken = [images.take(np.array([5, 0, 7]))[0] for images in (in_memory, on_disk)]
    assert torch.equal(taken[0], taken[1])
    assert sorted(only(tmp_path / "cache").iterdir()) == before

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        DataError, match="could not write [0-9]+ bytes of resized training images to .* [(]No space left on device[)]"
    ):
        training_images(data.train, 16, cpu)


def test_is_built_once(folder: pathlib.Path, tmp_path: pathlib.Path, decoded: list[pathlib.Path]) -> None:
    first = load(folder, tmp_path / "cache")
    assert len(decoded) == NUM_IMAGES
    seen: list[tuple[int, int]] = []
    task = FolderTask(name="other", source="folder", folder=folder, cache=tmp_path / "cache")
    again = load_task(task, lambda done, of: seen.append((done, of)))
    assert len(decoded) == NUM_IMAGES
    assert again.fingerprint == first.fingerprint
    assert seen == [(done, 2 * NUM_IMAGES) for done in range(1, 2 * NUM_IMAGES + 1)]


def test_a_fingerprint_is_computed_once(folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder, tmp_path / "cache").fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(MappedImages, "_map", property(lambda _: pytest.fail("pixels were read")))
        assert load(folder, tmp_path / "cache").fingerprint == first
    # What was altered is not believed.
    for file in (only(tmp_path / "cache") / "digests").iterdir():
        file.write_text(file.read_text().replace("a", "b"))
    assert load(folder, tmp_path / "cache").fingerprint == first


def test_takes_up_new_and_changed_files_alone(folder: pathlib.Path, tmp_path: pathlib.Path, decoded: list[pathlib.Path]) -> None:
    load(folder, tmp_path / "cache")
    decoded.clear()
    paint(folder / "dog", 4, 7, "new-")
    paint(folder / "cat", 1, 8)
    data = load(folder, tmp_path / "cache")
    assert sorted(file.name for file in decoded) == ["000.png", "new-000.png", "new-001.png", "new-002.png", "new-003.png"]
    equal(load(folder), data)


def test_copied_files_keep_their_pixels(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = load(folder, tmp_path / "cache")
    size = (only(tmp_path / "cache") / "pixels").stat().st_size
    for file in folder.glob("*/*.png"):
        os.utime(file, (1, 1))
    equal(before, load(folder, tmp_path / "cache"))
    assert (only(tmp_path / "cache") / "pixels").stat().st_size == size


def test_files_of_equal_size_and_date_may_take_each_others_place(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "images"
    for seed, label in enumerate(("cat", "dog")):
        paint(folder / label, 20, seed, "", ".bmp")
        for file in (folder / label).iterdir():
            os.utime(file, (1, 1))
    load(folder, tmp_path / "cache")
    for name in ("000.bmp", "001.bmp"):
        cat, dog, aside = folder / "cat" / name, folder / "dog" / name, folder.parent / name
        cat.rename(aside)
        dog.rename(cat)
        aside.rename(dog)
    equal(load(folder), load(folder, tmp_path / "cache"))


def test_sources_do_not_mix(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "elsewhere" / "images"
    for label in ("cat", "dog"):
        paint(other / label, 20, 99)
    equal(load(folder), load(folder, tmp_path / "cache"))
    equal(load(other), load(other, tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_skips_what_cannot_be_read(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (folder / "cat" / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="could not read the image .*bad.png: found 8 bytes that start with b'no image'"):
        load(folder, tmp_path / "cache")
    data = load(folder, tmp_path / "cache", skip_unreadable=True)
    equal(load(folder, skip_unreadable=True), data)
    assert data.warnings[0].startswith(f"left out 1 image of folder {folder}, the first because munet could not read the image ")
    assert sum(len(images) for images in (data.train, data.validation, data.test or ())) == NUM_IMAGES


@pytest.mark.parametrize("limit", [None, 10])
def test_skips_the_same_as_memory(folder: pathlib.Path, tmp_path: pathlib.Path, limit: int | None) -> None:
    # So many files that cannot be decoded would fill the limit, and one would be the bird to train on: the other's place is in test.
    for index in range(60):
        (folder / "cat" / f"bad {index}.png").write_bytes(f"no image {index}".encode())
    for seed in itertools.count():
        paint(folder / "bird", 1, seed)
        if hashlib.sha256((folder / "bird" / "000.png").read_bytes()).digest()[0] < 256 * SHARE - 1:
            break
    bad = next(content for content in map(b"no bird %d".__mod__, itertools.count()) if hashlib.sha256(content).digest()[0] > 128)
    (folder / "bird" / "bad.png").write_bytes(bad)
    memory = load(folder, skip_unreadable=True, limit_per_class=limit)
    equal(memory, load(folder, tmp_path / "cache", skip_unreadable=True, limit_per_class=limit))
    assert "bird/000.png" in memory.train.names
    # They are the data that there are without those files, too.
    for file in folder.glob("*/bad*.png"):
        file.unlink()
    equal(memory, load(folder, limit_per_class=limit))


def test_can_be_pickled_without_its_pixels(tmp_path: pathlib.Path) -> None:
    for seed, label in enumerate("ab"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (300, 300), (seed, index, 0)).save(tmp_path / "images" / label / f"{index}.png")
    data = load(tmp_path / "images", tmp_path / "cache")
    data.train.images[0]
    pickled = pickle.dumps(data)
    assert len(pickled) < 20_000
    equal(data, pickle.loads(pickled))


# What goes wrong

BUILD = """
import sys, time, pathlib
from evolve.config import FolderTask
from evolve.data import cache, reading
from evolve.data.load import load_task
folder, kept, commit, stop = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
cache.COMMIT_BYTES = commit
read = cache.read_image
left = iter(range(stop))
def slowly(file):
    time.sleep(600 if next(left, None) is None else 0.01)
    return read(file)
cache.read_image = slowly
print(load_task(FolderTask(name="t", source="folder", folder=folder, cache=kept)).fingerprint)
"""


def build(
    folder: pathlib.Path, kept: pathlib.Path, commit: int = 1, stop: int = NUM_IMAGES, before: str = ""
) -> subprocess.Popen[str]:
    """Starts a process that builds a cache, and stands still once it has read so many images."""
    command = [sys.executable, "-c", before + BUILD, str(folder), str(kept), str(commit), str(stop)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_goes_on_after_a_kill(folder: pathlib.Path, tmp_path: pathlib.Path, decoded: list[pathlib.Path]) -> None:
    kept = tmp_path / "cache"
    for wanted, stop in ((1, 20), (25, 39)):
        process = build(folder, kept, commit=5000, stop=stop)
        deadline = time.monotonic() + 240
        while num_records(kept) < wanted:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
    # A kill in the middle of a write, on top.
    with (only(kept) / "index").open("ab") as index, (only(kept) / "pixels").open("ab") as pixels:
        index.write(b"half a record")
        pixels.write(b"half an image")
    before = num_records(kept)
    assert 25 <= before < NUM_IMAGES
    equal(load(folder), load(folder, kept))
    assert len(decoded) == NUM_IMAGES - before


def test_two_processes_at_once(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    both = [build(folder, tmp_path / "cache", commit=2000) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [output[0].strip() for output in outputs] == [load(folder).fingerprint] * 2, outputs
    assert num_records(tmp_path / "cache") == NUM_IMAGES


def test_full_disk_keeps_what_is_whole(folder: pathlib.Path, tmp_path: pathlib.Path, decoded: list[pathlib.Path]) -> None:
    kept = tmp_path / "cache"
    # No file may be larger: a write stops midway, as on a full disk.
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
    process = build(folder, kept, commit=10_000, before=limit)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert f"evolve.errors.DataError: could not write the cache {only(kept)} (File too large)" in message
    assert "expected a folder that can be written, with room for height * width * 3 bytes of each image; make room" in message
    records = np.frombuffer((only(kept) / "index").read_bytes()[HEADER_BYTES:], dtype=RECORD)
    whole = int((records["height"].astype(int) * records["width"] * 3).sum())
    assert 10_000 <= whole == (only(kept) / "pixels").stat().st_size < 30_000
    equal(load(folder), load(folder, kept))
    assert len(decoded) == NUM_IMAGES - len(records)


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Gives up root's right to write anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[pathlib.Path]:
    """A folder that every user may read, unlike tmp_path."""
    made = pathlib.Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    for found in (made, *made.rglob("*")):
        if found.is_dir():
            found.chmod(0o755)
    shutil.rmtree(made)


def test_folder_that_may_not_be_written(open_folder: pathlib.Path) -> None:
    images, kept = open_folder / "images", open_folder / "cache"
    for seed, label in enumerate("ab"):
        paint(images / label, 10, seed)
    kept.mkdir()
    kept.chmod(0o555)
    in_memory = load(images)
    with nobody(), pytest.raises(DataError) as caught:
        load(images, kept)
    assert str(caught.value).startswith(f"could not write the cache {kept / 'images-'}")
    assert "(Permission denied); expected a folder that can be written" in str(caught.value)
    assert not list(kept.iterdir())
    # One that is complete needs no writing.
    kept.chmod(0o755)
    load(images, kept)
    for found in (kept, only(kept)):
        found.chmod(0o555)
    with nobody():
        equal(in_memory, load(images, kept))


def test_cache_below_a_file(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"could not write the cache .*file/images-.* \((Not a directory|File exists)\)"):
        load(folder, tmp_path / "file")


def test_altered_pixels_are_noticed(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = load(folder, tmp_path / "cache")
    with (only(tmp_path / "cache") / "pixels").open("r+b") as pixels:
        pixels.seek(1000)
        byte = pixels.read(1)[0]
        pixels.seek(1000)
        pixels.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match="found altered pixels in .*pixels, at byte .*; delete the folder .*: it is built again"):
        data.fingerprint  # noqa: B018


@pytest.mark.parametrize("harm", ["record", "pixels", "no pixels"])
def test_damaged_cache(folder: pathlib.Path, tmp_path: pathlib.Path, harm: str) -> None:
    load(folder, tmp_path / "cache")
    found = only(tmp_path / "cache")
    if harm == "record":
        raw = bytearray((found / "index").read_bytes())
        raw[HEADER_BYTES + 3] ^= 1
        (found / "index").write_bytes(raw)
    elif harm == "pixels":
        os.truncate(found / "pixels", 1000)
    else:
        (found / "pixels").unlink()
    with pytest.raises(DataError, match="found a damaged cache in .*; delete that folder: it is built again"):
        load(folder, tmp_path / "cache")


def test_an_end_that_was_never_written_is_cut(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    load(folder, tmp_path / "cache")
    with (only(tmp_path / "cache") / "index").open("ab") as index:
        index.write(bytes(3 * RECORD.itemsize))
    paint(folder / "dog", 3, 7, "new-")
    equal(load(folder), load(folder, tmp_path / "cache"))
    assert num_records(tmp_path / "cache") == NUM_IMAGES + 3


def test_cache_of_another_version(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    load(folder, tmp_path / "cache")
    index = only(tmp_path / "cache") / "index"
    index.write_bytes(index.read_bytes().replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(DataError, match='found a cache of another version, .*"format": 9.* expected .*"format": 1'):
        load(folder, tmp_path / "cache")


MEASURE = """
import sys, pathlib
from evolve.config import FolderTask
from evolve.data import reading
from evolve.data.load import load_task
reading.THREADS = 2
def peak():  # of memory in use, in MiB; getrusage would tell the parent's
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
before = peak()
kept = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else None
load_task(FolderTask(name="t", source="folder", folder=pathlib.Path(sys.argv[1]), cache=kept))
print(peak() - before)
"""


def test_memory_stays_bounded(tmp_path: pathlib.Path) -> None:
    image = tmp_path / "image.jpg"
    Image.new("RGB", (1200, 1200), (200, 3, 40)).save(image)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(40):
            # Bytes behind the end of a JPEG do not matter to what it shows.
            (tmp_path / "images" / label / f"{index}.jpg").write_bytes(image.read_bytes() + f"{label}{index}".encode())
    all_mebibytes = 80 * 1200 * 1200 * 3 / 2**20

    def measure(*folders: pathlib.Path) -> int:
        command = [sys.executable, "-c", MEASURE, *map(str, folders)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert measure(tmp_path / "images") > 0.9 * all_mebibytes, "the measure sees images in memory"
    assert measure(tmp_path / "images", tmp_path / "cache") < 0.4 * all_mebibytes
    # Reading holds one image at a time.
    data = load(tmp_path / "images", tmp_path / "cache")
    tracemalloc.start()
    try:
        assert len(data.fingerprint) == 32
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
