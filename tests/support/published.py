"""Small data sets in the very files that torchvision and Hugging Face's library read."""

from __future__ import annotations

import csv
import io
import pathlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def pixels(count: int, *shape: int, seed: int = 0) -> Pixels:
    """Returns random images, all different; the first value of each is its number."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    images.reshape(count, -1)[:, 0] = np.arange(count) % 256
    return images


def write_idx(file: pathlib.Path, array: npt.NDArray[np.uint8]) -> None:
    """Writes an array as the files of MNIST and its kin hold it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(header + array.tobytes())


def write_mnist(root: pathlib.Path, train: Sequence[int], test: Sequence[int], name: str = "MNIST", size: int = 28) -> None:
    """Writes MNIST, FashionMNIST or KMNIST with these labels."""
    raw = root / name / "raw"
    for prefix, labels, seed in (("train", train, 0), ("t10k", test, 1)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pixels(len(labels), size, size, seed=seed))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))


def write_emnist(root: pathlib.Path, split: str, train: Sequence[int], test: Sequence[int]) -> None:
    """Writes one split of EMNIST with these labels."""
    for part, labels, seed in (("train", train, 0), ("test", test, 1)):
        stem = root / "EMNIST" / "raw" / f"emnist-{split}-{part}"
        write_idx(stem.with_name(f"{stem.name}-images-idx3-ubyte"), pixels(len(labels), 28, 28, seed=seed))
        write_idx(stem.with_name(f"{stem.name}-labels-idx1-ubyte"), np.array(labels, dtype=np.uint8))


def write_gtsrb(root: pathlib.Path, train: Sequence[int], test: Sequence[int]) -> None:
    """Writes GTSRB with images of these classes: PPM files of different sizes in folders, and a table for the test."""
    base = root / "gtsrb"
    for number in range(43):
        (base / "GTSRB" / "Training" / f"{number:05}").mkdir(parents=True)
    for index, label in enumerate(train):
        image = Image.fromarray(pixels(1, 15 + index % 3, 16, 3, seed=index)[0])
        image.save(base / "GTSRB" / "Training" / f"{label:05}" / f"{index:05}_00000.ppm")
    (base / "GTSRB" / "Final_Test" / "Images").mkdir(parents=True)
    with (base / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
        for index, label in enumerate(test):
            Image.fromarray(pixels(1, 15, 16, 3, seed=1000 + index)[0]).save(
                base / "GTSRB" / "Final_Test" / "Images" / f"{index:05}.ppm"
            )
            writer.writerow([f"{index:05}.ppm", 16, 15, 1, 1, 14, 14, label])


def png(image: Pixels) -> bytes:
    """Returns an image as the bytes of a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def png_of_no_size() -> bytes:
    """Returns a PNG whose header says 0 x 5 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write_parquet(
    file: pathlib.Path,
    images: Sequence[bytes | None],
    labels: Sequence[object],
    names: Sequence[str] | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> None:
    """Writes encoded images and labels as the hub keeps them; with names the labels are class labels.

    The features go into the file's metadata, where Hugging Face's library looks for them.
    """
    import datasets

    encoded = [None if image is None else {"bytes": image, "path": None} for image in images]
    table = datasets.Dataset.from_dict({image_column: encoded, label_column: list(labels)})
    table = table.cast_column(image_column, datasets.Image())
    if names is not None:
        table = table.cast_column(label_column, datasets.ClassLabel(names=list(names)))
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(file)
