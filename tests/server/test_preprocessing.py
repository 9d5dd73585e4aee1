from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import numpy as np
import pytest

from munet.preprocessing import ImageLimits, decode, resize
from server.errors import ImageRefusedError
from server.preprocessing import EncodedImage, Preprocessor, RawImage
from tests.support.images import encode
from tests.support.repository import random_images

PIXELS = random_images(1, 20)[0]


def test_images_are_those_of_the_shared_function() -> None:
    preprocessor = Preprocessor(2, ImageLimits())
    sent = [EncodedImage(encode(PIXELS, "JPEG")), RawImage(20, 20, 3, PIXELS.tobytes())]
    small, large = asyncio.run(preprocessor.to_rows(sent, [8, 40], "images[{index}]"))
    assert (small.shape, large.shape) == ((2, 8, 8, 3), (2, 40, 40, 3))
    assert np.array_equal(small[0], resize(decode(encode(PIXELS, "JPEG")), 8))
    assert np.array_equal(large[1], resize(PIXELS, 40))
    preprocessor.close()


def test_pixels_that_fit_need_no_thread() -> None:
    preprocessor = Preprocessor(1, ImageLimits())
    preprocessor.close()
    (rows,) = asyncio.run(preprocessor.to_rows([RawImage(20, 20, 3, PIXELS.tobytes())], [20], "image"))
    assert np.array_equal(rows, PIXELS[np.newaxis])
    with pytest.raises(ImageRefusedError, match=r"image: found 7 bytes"):
        asyncio.run(preprocessor.to_rows([RawImage(20, 20, 3, b"7 bytes")], [20], "image"))
    # Any other size has to be computed, and there is no thread any more.
    with pytest.raises(RuntimeError, match="shutdown"):
        asyncio.run(preprocessor.to_rows([RawImage(20, 20, 3, PIXELS.tobytes())], [20, 8], "image"))


def test_the_first_bad_image_is_named() -> None:
    preprocessor = Preprocessor(2, ImageLimits())
    sent = [EncodedImage(encode(PIXELS)), EncodedImage(b"bad"), EncodedImage(b"bad")]
    with pytest.raises(ImageRefusedError, match=r"images\[1\]: found 3 bytes"):
        asyncio.run(preprocessor.to_rows(sent, [8], "images[{index}]"))
    gc.collect()
    preprocessor.close()


class SlowDecoding:
    """Stands for `decode`: does the same once it is told to go on.

    Attributes:
        begun: whether an image was begun.
        go_on: tells it.
        decoded: the images, in order.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.decoded: list[bytes] = []
        patch.setattr("server.preprocessing.decode", self._decode)

    def _decode(self, data: bytes, limits: ImageLimits) -> Any:
        self.decoded.append(data)
        self.begun.set()
        self.go_on.wait(60)
        return decode(data, limits)


def test_what_nobody_waits_for_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowDecoding(monkeypatch)
    preprocessor = Preprocessor(1, ImageLimits())

    async def ask() -> None:
        waiting = asyncio.create_task(preprocessor.to_rows([EncodedImage(encode(PIXELS))] * 20, [8], "images[{index}]"))
        await asyncio.to_thread(slow.begun.wait, 60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        slow.go_on.set()

    asyncio.run(ask())
    preprocessor.close()
    assert len(slow.decoded) == 1


def test_one_image_does_not_wait_for_all_of_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowDecoding(monkeypatch)
    preprocessor = Preprocessor(1, ImageLimits())
    loud, quiet = encode(PIXELS), encode(PIXELS, "JPEG")

    async def ask() -> None:
        flood = [
            asyncio.create_task(preprocessor.to_rows([EncodedImage(loud)] * 20, [8], "images[{index}]", "loud")) for _ in range(2)
        ]
        await asyncio.to_thread(slow.begun.wait, 60)
        single = asyncio.create_task(preprocessor.to_rows([EncodedImage(quiet)], [8], "image", "quiet"))
        left = asyncio.create_task(preprocessor.to_rows([EncodedImage(b"nobody waits for it")], [8], "image", "quiet"))
        await asyncio.sleep(0)
        left.cancel()
        slow.go_on.set()
        assert (await single)[0].shape == (1, 8, 8, 3)
        await asyncio.gather(*flood)

    asyncio.run(ask())
    preprocessor.close()
    # One is worked on, and one more is with the threads already.
    assert slow.decoded.index(quiet) <= 2
    assert len(slow.decoded) == 41
