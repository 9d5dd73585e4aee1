"""What a process in a mount namespace of its own sees of Triton when its shared memory is small, and when it is full."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from server.engine import Question
from server.errors import SegmentRunError
from server.repository import Repository
from server.triton.engine import TritonEngine
from server.triton.shared_memory import FOLDER
from tests.support.processes import server
from tests.support.repository import SHORT, RepositoryBuilder, TaskPlan, answer, random_images
from tests.support.triton import FOLDER as ENVIRONMENT
from tests.support.triton import Caller, TritonRun, triton_settings, wait_until

BIG = TaskPlan(("stem:512:b", "head:big:4"), ("a", "b", "c", "d"))
"""One image of it is about as large as what Triton takes for a segment at first, and eight are larger."""


def give(megabytes: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(FOLDER)], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        builder = RepositoryBuilder(pathlib.Path(folder) / "repository")
        builder.publish({"big": BIG, "short": SHORT})
        give(4)
        result = server("triton", "run", "--repository", builder.root, "--environment", ENVIRONMENT)
        assert result.returncode == 2, result.stderr
        assert "'/dev/shm': found 4.0 MiB free, expected at least 6.0 MiB for 5 segments" in result.stderr, result.stderr
        assert "--shm-size" in result.stderr
        give(64)
        with TritonRun(builder.root, pathlib.Path(folder) / "output", "--interval", "0.1") as run, Caller(run.address) as caller:
            assert "full batches of all segments could need 66 MiB" in run.said, run.said
            generation = Repository(builder.root).read()
            engine = TritonEngine(triton_settings(builder.root, endpoints=(run.address,)))
            try:
                engine.load(generation)
                fill_and_ask(run, caller, lambda task, images: engine.answer(Question(generation, images, (task,))).exception(20))
                wait_until(lambda: not engine.endpoints()[0].reason)
            finally:
                engine.close()
            assert run.stop() == 0
        assert run.said.endswith("stopped; 0 restarts, 0 segments loaded again\n"), run.said


def fill_and_ask(run: TritonRun, caller: Caller, fault: Callable[[str, np.ndarray], BaseException | None]) -> None:
    large, small = random_images(8, 512), random_images(8, 8)
    filler = FOLDER / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(FOLDER).free))
    with pytest.raises(grpc.RpcError, match="Failed to increase the shared memory pool size"):
        caller.infer("big", large)
    # What the front door gets says which segment and why, and others go on.
    error = fault("big", large)
    assert isinstance(error, SegmentRunError), error
    # By the segment's name, or by the ensemble's where Triton says no more than that it failed in there.
    assert re.search(r"segment '(seg-|big\.).*Failed to increase the shared memory pool size", str(error)), error
    assert fault("short", small) is None
    looks = caller.executions(segment := next(name for name in caller.ready() if name.startswith("seg-")))
    wait_until(lambda: caller.executions(segment) >= looks + 3)
    np.testing.assert_allclose(caller.infer("short", small)["logits"], answer(SHORT, small), atol=1e-4)
    filler.unlink()
    assert fault("big", large) is None
    np.testing.assert_allclose(caller.infer("big", large)["logits"], answer(BIG, large), atol=1e-4)


if __name__ == "__main__":
    main()
