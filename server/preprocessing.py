"""Images as callers send them, and the threads that turn them into the pixels a route takes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from munet.preprocessing import ImageError, ImageLimits, Pixels, decode, from_raw, resize
from server.errors import ImageRefusedError


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedImage:
    """A whole JPEG, PNG, WebP or BMP file."""

    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class RawImage:
    """Unsigned bytes, row by row, channels innermost.

    Attributes:
        height: in pixels.
        width: in pixels.
        channels: 3 (RGB) or 1 (grey).
        data: height * width * channels bytes.
    """

    height: int
    width: int
    channels: int
    data: bytes


SentImage = EncodedImage | RawImage
"""An image as a caller sends it."""

Work = TypeVar("Work")


class Preprocessor:
    """Decodes and resizes images in threads of its own, off the event loop.

    Args:
        num_threads: how many images are worked on at once.
        limits: what is accepted.
    """

    def __init__(self, num_threads: int, limits: ImageLimits) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="preprocess")
        self._limits = limits

    async def to_rows(self, images: Sequence[SentImage], sizes: Sequence[int], where: str) -> list[npt.NDArray[np.uint8]]:
        """Returns the images at each of some sizes.

        If the caller is cancelled, images not yet begun are never decoded.

        Args:
            images: at least one.
            sizes: heights and widths, in pixels.
            where: what the request calls them; `{index}` in it stands for the index.

        Returns:
            For each size, [images, size, size, 3] uint8.

        Raises:
            ImageRefusedError: an image cannot be used; the first of them, if there are several.
        """
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(self._threads, self._prepare, image, sizes, where.format(index=index))
            for index, image in enumerate(images)
        ]
        try:
            by_image = [await job for job in jobs]
        finally:
            for job in jobs:
                job.cancel()
                # A job that fails after the first one did has nobody left to hear of it.
                job.add_done_callback(_hear)
        return [np.stack([pixels[index] for pixels in by_image]) for index in range(len(sizes))]

    async def run(self, work: Callable[[], Work]) -> Work:
        """Runs something else that takes its time in the same threads; never, if the caller is cancelled before it began."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Ends the threads when they have finished what they work on."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, image: SentImage, sizes: Sequence[int], where: str) -> list[Pixels]:
        try:
            if isinstance(image, EncodedImage):
                pixels = decode(image.data, self._limits)
            else:
                pixels = from_raw(image.data, image.height, image.width, image.channels, self._limits)
        except ImageError as error:
            raise ImageRefusedError(where, str(error)) from error
        return [resize(pixels, size) for size in sizes]


def _hear(job: asyncio.Future[list[Pixels]]) -> None:
    if not job.cancelled():
        job.exception()
