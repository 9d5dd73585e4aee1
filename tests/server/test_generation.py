"""Reading what belongs to a generation."""

from __future__ import annotations

import concurrent.futures
import gc
import pathlib
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from server.generation import Golden


@pytest.fixture
def busy_collector() -> Iterator[None]:
    """Garbage is looked for all the time, and others run meanwhile, as they may wherever something has a finaliser."""

    def pause(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    before, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(pause)
    gc.set_threshold(5)
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
        gc.callbacks.remove(pause)


@pytest.mark.usefixtures("busy_collector")
def test_golden_images_are_read_by_many_threads_at_once(tmp_path: pathlib.Path) -> None:
    images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    np.save(tmp_path / "images.npy", images)
    # Without a lock this fails every other time with a Python before 3.11.8.
    golden = Golden(tmp_path / "images.npy", np.zeros((4, 2), dtype=np.float32), 0.0)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda _: golden.read_images(), range(2000)):
            assert (found == images).all()
