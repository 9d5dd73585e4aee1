"""The wall clock of a server's whole process jumps by years, forth and back: only what tells the time of day tells another one."""

from __future__ import annotations

import datetime as dt
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import grpc
import pytest

from benchmarks.held import Held
from munet.v1 import inference_pb2 as pb
from server.client import AdminClient, Client
from tests.support.processes import TOP, ServerProcess
from tests.support.repository import DIGITS, GREEK, HEBREW, RepositoryBuilder, random_images
from tests.support.serving import wait_until

IMAGE = random_images(1, 8)[0]
DECADE = 10 * 365 * 86400


class Clock:
    """The time of day of processes that have its `variables`."""

    def __init__(self, folder: pathlib.Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip(
                "there is no C compiler here, and only a library that is preloaded can shift the clock of all that a server is made of"
            )
        library = folder / "clock.so"
        source = TOP / "tests" / "support" / "clock.c"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
        self._file = folder / "ahead"
        self._file.write_bytes(bytes(8))
        self.variables = {"LD_PRELOAD": str(library), "MUNET_CLOCK": str(self._file)}

    def jump(self, seconds_ahead: int) -> None:
        """Sets how far it is ahead of the true one."""
        with self._file.open("r+b") as file:
            file.write(seconds_ahead.to_bytes(8, "little", signed=True))


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("model") / "repository")
    builder.publish({"digits": DIGITS, "greek": GREEK})
    return builder


@pytest.fixture(scope="module")
def server(builder: RepositoryBuilder, clock: Clock) -> Iterator[ServerProcess]:
    with ServerProcess(builder.root, "--drain", "0", variables=clock.variables) as process:
        yield process
    assert process.status == 0


def logits(client: Client) -> bytes:
    classification = client.classify("digits", IMAGE, include_logits=True, timeout_seconds=30).classifications[0]
    assert classification.logits is not None
    return classification.logits.tobytes()


def test_jumps_change_nothing(server: ServerProcess, builder: RepositoryBuilder, clock: Clock) -> None:
    with Client(server.address) as client, AdminClient(server.admin_address) as admin:
        answers = {logits(client)}
        started = admin.status().started
        before = Held.by(server.process.pid)
        for number, seconds in enumerate((DECADE, -2 * DECADE, 3600, 0), start=2):
            clock.jump(seconds)
            answers |= {logits(client) for _ in range(20)}
            builder.publish({"digits": DIGITS, "greek": GREEK if number % 2 else HEBREW})
            assert admin.reload(timeout_seconds=60).generation == number
            status = admin.status()
            # When a reload ended is told by the clock as it is; how long it took, and how long the server runs, by no clock of the day.
            told = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
            assert abs(status.last_reload.finished - told) < dt.timedelta(seconds=60)
            assert 0 <= status.last_reload.duration_seconds < 60
            assert 0 < status.uptime_seconds < 600
            assert status.started == started
        assert len(answers) == 1
        # Nobody lost a connection, or made another one.
        wait_until(lambda: Held.by(server.process.pid).descriptors <= before.descriptors)


def test_calls_in_flight_outlive_a_jump(server: ServerProcess, clock: Clock) -> None:
    images = [pb.Image(raw=pb.RawImage(height=8, width=8, channels=3, data=image.tobytes())) for image in random_images(64, 8)]
    request = pb.ClassifyRequest(task="digits", images=images, include_logits=True).SerializeToString()
    calls = []
    with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
        number = client.list_tasks().generation
        for jump in (DECADE, -DECADE, 0) * 5:
            calls += [channel.unary_unary("/munet.v1.InferenceService/Classify").future(request, timeout=60) for _ in range(5)]
            clock.jump(jump)
        answers = {call.result() for call in calls}
    assert len(answers) == 1
    assert pb.ClassifyResponse.FromString(answers.pop()).generation == number
