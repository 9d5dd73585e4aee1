"""Images on the device, as uint8 where they fit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile

import numpy as np
import numpy.typing as npt
import torch

from evolve.data.task import ImageSet, LazyImages
from evolve.errors import DataError
from evolve.training.device import upload
from munet.preprocessing import Pixels, resize

FREE_SHARE = 0.5
"""Images stay in the host's memory if they would take more than this share of the device's free memory, and on disk if they would take
more than this share of the host's."""


@dataclasses.dataclass(frozen=True)
class DeviceImages:
    """Images of one split, all of one size.

    Attributes:
        pixels: [images, height, width, 3] uint8, on the device or, if they do not fit, on the CPU.
        labels: [images] int64, on the device.
        sizes: height and width of the original images, [images, 2] float32, on the CPU.
        device: where they are needed.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    sizes: torch.Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns pixels and labels of these images on the device, and their original sizes on the CPU."""
        rows = torch.from_numpy(indices)
        there = upload(rows, self.device)
        if self.pixels.device == self.labels.device:
            pixels = self.pixels.index_select(0, there)
        else:
            pixels = upload(self.pixels.index_select(0, rows), self.device)
        return pixels, self.labels.index_select(0, there), self.sizes.index_select(0, rows)


def training_images(images: ImageSet, image_size: int, device: torch.device, *, stay_on_host: bool = False) -> DeviceImages:
    """Returns training images in the one size that `storage_shape` gives.

    They are held in memory. If they come from a cache and would take more than FREE_SHARE of the memory that is free, they are written
    to a nameless file beside it, mapped into memory, and gone with the process.

    Args:
        images: decoded, in their own sizes.
        image_size: what the paths see, in pixels.
        device: where they are needed.
        stay_on_host: whether they stay in the host's memory even if they seem to fit into the device's.

    Raises:
        DataError: they fit neither into memory nor on the disk of the data's cache, or an image cannot be read.
    """
    height, width = storage_shape(images.sizes, image_size)
    pixels = _room(images, (len(images), height, width, 3))
    for row, image in enumerate(images.images):
        pixels[row] = image if image.shape[:2] == (height, width) else resize(image, height)
    return _placed(pixels, images.labels, images.sizes, device, stay_on_host)


def storage_shape(sizes: npt.NDArray[np.int64], image_size: int) -> tuple[int, int]:
    """Returns the height and width in which training images are kept for augmentation.

    Images of one size of at most twice the image size a side stay as they are. All others become squares of twice the image size, or of
    the longest side there is if that is shorter: bilinear sampling of a whole image of twice the size still weighs every pixel alike, so
    nothing aliases, and memory stays bounded. A small crop of a large photograph is therefore less sharp than one of the original.

    Args:
        sizes: height and width of each image, [images, 2].
        image_size: what the paths see, in pixels.
    """
    longest = int(sizes.max())
    if longest <= 2 * image_size and (sizes == sizes[0]).all():
        return int(sizes[0, 0]), int(sizes[0, 1])
    side = min(longest, 2 * image_size)
    return side, side


def evaluation_images(
    images: ImageSet, image_size: int, count: int, device: torch.device, *, stay_on_host: bool = False
) -> DeviceImages:
    """Returns the first images as a path sees them in evaluation, resized as serving does.

    Args:
        images: decoded, in their own sizes.
        image_size: height and width, in pixels.
        count: at most so many.
        device: where they are needed.
        stay_on_host: see `training_images`.
    """
    return _placed(images.resized(image_size, count), images.labels[:count], images.sizes[:count], device, stay_on_host)


def free_memory() -> int:
    """Returns how much of the host's memory is free, in bytes, as far as the system and its container say."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = pathlib.Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free))


def _room(images: ImageSet, shape: tuple[int, int, int, int]) -> Pixels:
    num_bytes = math.prod(shape)
    if not isinstance(images.images, LazyImages) or num_bytes <= FREE_SHARE * free_memory():
        return np.empty(shape, dtype=np.uint8)
    folder = images.images.scratch
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # All of it now: on a full disk, writing to a map would end the process.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return np.asarray(np.memmap(file, dtype=np.uint8, mode="r+", shape=shape))
    except OSError as error:
        raise DataError(
            f"could not write {num_bytes} bytes of resized training images to {folder} ({error.strerror}), nor hold them in memory",
            "room in one of them",
            "make room, choose a smaller image_size or set limit_per_class",
        ) from error


def _placed(
    pixels: Pixels, labels: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], device: torch.device, stay_on_host: bool
) -> DeviceImages:
    stored = torch.from_numpy(pixels)
    if device.type != "cpu" and not stay_on_host and pixels.nbytes <= FREE_SHARE * torch.cuda.mem_get_info(device)[0]:
        stored = stored.to(device)
    return DeviceImages(stored, torch.from_numpy(labels).to(device), torch.from_numpy(sizes.astype(np.float32)), device)
