"""What holds for every test, and what they share."""

from __future__ import annotations

import gc
import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

# Whether an example took 200 ms, or ten of them a second to draw, says what else this machine did, and nothing of what is tested.
# What is drawn is the same in every run; `pytest --hypothesis-profile=anew` draws something else each time.
_ANY_SPEED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("anew", **_ANY_SPEED)
hypothesis.settings.register_profile("same", derandomize=True, **_ANY_SPEED)
hypothesis.settings.load_profile("same")

# Read when torch loads, as `munet-evolve` sets it: tests run beside each other, and threads that wait in a busy loop take the others' time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


_CACHE = "MUNET_CACHE"
_FOLDER = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    # One for all processes of a run, which inherit it from the first, and none of them sees the user's own.
    if not hasattr(config, "workerinput"):
        config.stash[_FOLDER] = tempfile.TemporaryDirectory(prefix="munet-cache-")
        os.environ[_CACHE] = config.stash[_FOLDER].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if _FOLDER in config.stash:
        config.stash[_FOLDER].cleanup()


def pytest_collection_finish() -> None:
    # What modules have defined stays for good: looking through it took half a second of every collection that a test asks for.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def triton_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model repository of `triton`; many tests publish to it."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="session")
def triton(triton_folder: pathlib.Path) -> Iterator[object]:
    """A real Triton, a `TritonProcess`, for all tests that leave it as it is; starting its segments takes seconds."""
    # Imported here: most tests, and those of the search in an environment of its own, need no server.
    from server.triton.process import TritonProcess
    from tests.support.triton import environment

    with TritonProcess(environment(), triton_folder, log=triton_folder.with_suffix(".log")) as process:
        yield process
        # Ending well would take it seconds, which prove nothing here.
        os.kill(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def warm_python() -> Iterator[pathlib.Path]:
    """Stands for Python where a test starts many processes, none of which is a test of how it starts."""
    from tests.support.warm import WarmPython

    with tempfile.TemporaryDirectory(prefix="munet-warm-") as folder, WarmPython(pathlib.Path(folder)) as warm:
        yield warm.executable


@pytest.fixture(scope="module")
def quick_disk() -> Iterator[None]:
    """Nobody in this process waits until the disk has what was written: only a power cut would tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield
