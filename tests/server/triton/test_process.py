"""The wheel's tritonserver as a child process, on the same repository that other engines serve."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from server.triton.process import TritonProcess
from server.triton.shared_memory import FOLDER
from tests.support.repository import DIGITS, RepositoryBuilder, answer, random_images
from tests.support.triton import Caller, environment


def test_it_serves_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    builder = RepositoryBuilder(tmp_path)
    number = builder.publish({"digits": DIGITS})
    with TritonProcess(environment(), tmp_path) as triton, Caller(triton.addresses.grpc) as caller:
        caller.load(*(segment.name for segment in builder.read_manifest(number).segments), "digits")
        images = random_images(4, 8)
        assert caller.infer("digits", images)["logits"] == pytest.approx(answer(DIGITS, images), abs=1e-4)
        assert np.isfinite(caller.infer("digits", images)["logits"]).all()
        assert len(list(FOLDER.glob("munet-triton-*")))
    assert not list(FOLDER.glob("munet-triton-*"))
    assert not triton.log.exists()
