"""Images as callers send them, and the threads that turn them into the pixels a route takes.

Whose image is next goes by flow (`server.fairness`): one image of a quiet task does not wait for all those of a task that floods.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from munet.preprocessing import ImageError, ImageLimits, Pixels, decode, from_raw, resize
from server.errors import ImageRefusedError
from server.fairness import FairLine, Flow, VirtualTimes


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


MOST_AHEAD_SECONDS = 1.0
"""What a flow may have had more than others, in seconds of a thread, before it counts no more."""


class Preprocessor:
    """Decodes and resizes images in threads of its own, off the event loop. For one event loop.

    Args:
        num_threads: how many images are worked on at once.
        limits: what is accepted.
    """

    def __init__(self, num_threads: int, limits: ImageLimits) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="preprocess")
        self._limits = limits
        # One more than there are threads, so that none of them waits for the event loop.
        self._num_free = num_threads + 1
        self._times = VirtualTimes(MOST_AHEAD_SECONDS)
        self._waiting: dict[int, tuple[Flow, asyncio.Future[None]]] = {}
        self._line = FairLine(self._waiting, self._times)
        self._numbers = itertools.count(1)

    async def to_rows(
        self, images: Sequence[SentImage], sizes: Sequence[int], where: str, flow: Flow = ""
    ) -> list[npt.NDArray[np.uint8]]:
        """Returns the images at each of some sizes.

        If the caller is cancelled, images not yet begun are never decoded.

        Args:
            images: at least one.
            sizes: heights and widths, in pixels.
            where: what the request calls them; `{index}` in it stands for the index.
            flow: whose share of the threads they use.

        Returns:
            For each size, [images, size, size, 3] uint8.

        Raises:
            ImageRefusedError: an image cannot be used; the first of them, if there are several.
        """
        if len(images) == 1 and all(_fits(images[0], size) for size in sizes):
            # Nothing to compute, and telling a thread would take longer than all else here.
            return [pixels[np.newaxis] for pixels in self._prepare(images[0], sizes, where.format(index=0))]
        works = [functools.partial(self._prepare, image, sizes, where.format(index=index)) for index, image in enumerate(images)]
        by_image = [await self.run(works[0], flow)] if len(works) == 1 else await self._run_all(works, flow)
        return [np.stack([pixels[index] for pixels in by_image]) for index in range(len(sizes))]

    async def _run_all(self, works: Sequence[Callable[[], list[Pixels]]], flow: Flow) -> list[list[Pixels]]:
        jobs = [asyncio.ensure_future(self.run(work, flow)) for work in works]
        try:
            return [await job for job in jobs]
        finally:
            for job in jobs:
                job.cancel()
                # A job that fails after the first one did has nobody left to hear of it.
                job.add_done_callback(_hear)

    async def run(self, work: Callable[[], Work], flow: Flow = "") -> Work:
        """Runs what takes its time in the threads, in its flow's turn; never, if the caller is cancelled before it began."""
        await self._take_turn(flow)
        started_seconds = time.monotonic()
        end_turn = functools.partial(self._end_turn, flow, started_seconds)
        loop = asyncio.get_running_loop()
        job = self._threads.submit(work)
        try:
            return await asyncio.wrap_future(job)
        finally:
            if job.done():
                end_turn()
            else:
                # The caller left, and the thread goes on.
                job.add_done_callback(lambda _: _call_in(loop, end_turn))

    async def _take_turn(self, flow: Flow) -> None:
        if self._num_free and not self._waiting:
            self._num_free -= 1
            self._times.reach(flow)
            return
        number = next(self._numbers)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = flow, turn
        self._line.add(number, flow, number)
        try:
            await turn
        except asyncio.CancelledError:
            if self._waiting.pop(number, None) is not None:
                self._line.leave()
            elif not turn.cancelled():
                # Given in the same moment: the next one has it.
                self._num_free += 1
                self._give_turns()
            raise

    def _end_turn(self, flow: Flow, started_seconds: float) -> None:
        self._times.charge(flow, time.monotonic() - started_seconds)
        self._num_free += 1
        self._give_turns()

    def _give_turns(self) -> None:
        while self._num_free and (number := self._line.first()) is not None:
            flow, turn = self._waiting.pop(number)
            self._line.leave()
            if not turn.done():
                self._times.reach(flow)
                self._num_free -= 1
                turn.set_result(None)

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


def _fits(image: SentImage, size: int) -> bool:
    """Whether an image is what a route takes already."""
    return isinstance(image, RawImage) and image.height == image.width == size


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Calls in an event loop, from another thread; not if the loop is closed, where nobody waits any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


def _hear(job: asyncio.Future[list[Pixels]]) -> None:
    if not job.cancelled():
        job.exception()
