"""Why inferences have no deadline at Triton and are never cancelled: decision 14 stands on what is proven here of Triton itself.

It fails with a Triton that no longer crashes: then decision 14 may be thought over, and this file goes or stays with it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib
import random
import time
from collections.abc import Callable, Iterator

import grpc
import pytest

from server.repository import Repository
from server.triton.process import TritonProcess
from tests.support.repository import DIGITS, GREEK, RepositoryBuilder, random_images
from tests.support.triton import Caller, environment, make_request

NUM_CALM = 100
PATIENCE_SECONDS = 400.0
"""Of 36 tries on two busy cores, one or eight calls at a time, the longest took 36 s; other machines are slower."""

Ask = Callable[[float | None], grpc.Future]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("crash")
    # Two heads on one trunk.
    RepositoryBuilder(folder).publish({"digits": DIGITS, "greek": GREEK})
    return folder


@pytest.fixture(scope="module")
def started(folder: pathlib.Path) -> Iterator[TritonProcess]:
    with TritonProcess(environment(), folder, log=folder.with_suffix(".log")) as process:
        yield process


@pytest.fixture
def triton(started: TritonProcess) -> TritonProcess:
    if not started.is_running:
        started.start()
    return started


def expire(ask: Ask, seconds: float) -> None:
    with contextlib.suppress(grpc.RpcError):
        ask(seconds).result()


def cancel(ask: Ask, seconds: float) -> None:
    call = ask(None)
    time.sleep(seconds)
    call.cancel()


@pytest.mark.parametrize("leave", [expire, cancel])
def test_triton_crashes_when_clients_leave_an_ensemble_with_steps_side_by_side(
    folder: pathlib.Path, triton: TritonProcess, leave: Callable[[Ask, float], None]
) -> None:
    generation = Repository(folder).read()
    rng = random.Random(0)
    with Caller(triton.addresses.grpc) as caller:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(caller.load, generation.segments))
        caller.load(generation.ensembles[8])
        request = make_request(generation.ensembles[8], random_images(1, 8))

        def ask(seconds: float | None) -> grpc.Future:
            return caller.stub.ModelInfer.future(request, timeout=seconds)

        # Who stays harms nobody.
        began = time.monotonic()
        for _ in range(NUM_CALM):
            ask(None).result()
        usual = (time.monotonic() - began) / NUM_CALM
        deadline, num_calls = time.monotonic() + PATIENCE_SECONDS, 0
        while triton.is_running and time.monotonic() < deadline:
            leave(ask, rng.uniform(0, 2 * usual))
            num_calls += 1
    assert not triton.is_running, f"{num_calls} calls were left and Triton lives: may decision 14 be thought over?"
    # Writing to what was freed may be found out by the processor or by the C library.
    assert triton.outcome in ("signal 11", "signal 6")
