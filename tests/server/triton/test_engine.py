"""What the engine does with Tritons beyond what every engine promises."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import shutil
import signal
import subprocess
import time
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from server.client import AdminClient, Client
from server.engine import Question
from server.errors import EndpointGoneError, NoEndpointError, SegmentRunError, ServerUnreachableError, SettingsError
from server.generation import Generation
from server.repository import Repository
from server.triton.endpoint import Access, Endpoint
from server.triton.engine import TritonEngine
from server.triton.process import TritonAddresses, TritonProcess
from tests.support.repository import DIGITS, GREEK, HEBREW, MAX_BATCH_SIZE, TASKS, RepositoryBuilder, answer, random_images
from tests.support.serving import serving
from tests.support.triton import Caller, engine_on, environment, segment_process, triton_settings, wait_until

SMALL = ("digits", "greek", "hebrew", "short")


@pytest.fixture
def builder(triton_folder: pathlib.Path) -> RepositoryBuilder:
    return RepositoryBuilder(triton_folder)


@pytest.fixture
def generation(builder: RepositoryBuilder) -> Generation:
    return Repository(builder.root).read(builder.publish())


@pytest.fixture
def two(builder: RepositoryBuilder) -> Generation:
    """A smaller one, for Tritons that start for one test."""
    return Repository(builder.root).read(builder.publish({"digits": DIGITS, "greek": GREEK}))


def settled(caller: Caller, model: str = "", num_rows: int = 0) -> dict[str, tuple[int, int]]:
    """Returns what Triton counts, once it has counted all: it does so a moment after it answers.

    Args:
        caller: of the Triton.
        model: one that is known to have so many rows in the end.
        num_rows: how many.
    """
    if model:
        wait_until(lambda: caller.counts()[model][0] >= num_rows)
    while True:
        counts = caller.counts()
        time.sleep(0.1)
        if caller.counts() == counts:
            return counts


def test_triton_itself_counts_a_trunk_once_for_several_tasks(
    builder: RepositoryBuilder, triton: TritonProcess, generation: Generation
) -> None:
    # Without probes: Triton's own counters know nothing of what is not to be counted.
    with engine_on(builder, triton, probe_interval_seconds=1000.0) as engine, Caller(triton.addresses.grpc) as caller:
        engine.load(generation)
        before = settled(caller)
        engine.answer(Question(generation, random_images(1, 8), SMALL)).result()
        stem, trunk = generation.tasks["digits"].route[:2]
        ensemble = generation.ensembles[8]
        after = settled(caller, ensemble, before[ensemble][0] + 1)
        assert [after[name][0] - before[name][0] for name in (stem, trunk)] == [1, 1]
        assert after[ensemble][0] - before[ensemble][0] == 1
        # Tasks that are not asked do not run.
        engine.answer(Question(generation, random_images(1, 8), ("digits", "greek"))).result()
        heads = [generation.tasks[name].route[-1] for name in ("hebrew", "short")]
        assert [settled(caller)[name][0] - after[name][0] for name in heads] == [0, 0]


def test_tasks_are_batched_together(builder: RepositoryBuilder, triton: TritonProcess, generation: Generation) -> None:
    with engine_on(builder, triton, probe_interval_seconds=1000.0) as engine, Caller(triton.addresses.grpc) as caller:
        engine.load(generation)
        before = settled(caller)
        stem, trunk = generation.tasks["digits"].route[:2]
        images = random_images(1, 8)
        # Held up, so that all wait for the same weights, however slow this machine is.
        held_up = segment_process(triton, trunk)
        os.kill(held_up, signal.SIGSTOP)
        try:
            futures = [engine.answer(Question(generation, images, (SMALL[index % 2],))) for index in range(40)]
            # What ran on the stem is at the trunk, or as good as there.
            wait_until(lambda: caller.counts()[stem][0] >= before[stem][0] + 40)
        finally:
            os.kill(held_up, signal.SIGCONT)
        for future in futures:
            future.result(20)
        after = settled(caller, trunk, before[trunk][0] + 40)
        rows, executions = (after[trunk][index] - before[trunk][index] for index in (0, 1))
        assert rows == 40
        # Of one task alone there are only 20 rows: fewer batches than 20 hold rows of both.
        assert executions < 20


def test_what_waits_here_is_not_at_triton(builder: RepositoryBuilder, triton: TritonProcess, generation: Generation) -> None:
    with engine_on(builder, triton, probe_interval_seconds=1000.0, max_rows_in_flight=8) as engine:
        engine.load(generation)
        stem = generation.tasks["digits"].route[0]
        # Held up, so that nothing is answered before the others are cancelled, however fast this machine answers.
        held_up = segment_process(triton, stem)
        os.kill(held_up, signal.SIGSTOP)
        try:
            futures = [engine.answer(Question(generation, random_images(8, 8), SMALL)) for _ in range(50)]
            assert all(report.rows_in_flight <= 8 for report in engine.endpoints())
            for future in futures[1:]:
                future.cancel()
        finally:
            os.kill(held_up, signal.SIGCONT)
        futures[0].result()
        wait_until(lambda: not engine.endpoints()[0].rows_in_flight)
        computed = {segment.name: segment.rows_computed for segment in engine.statistics()}[stem]
        assert computed < 25 * 8


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton whose backend fails all of a batch for one row, as ONNX Runtime's own does: here any batch that is not full."""

    def __init__(self, generation: Generation) -> None:
        self._models = [
            *generation.segments,
            *(task.ensemble for task in generation.tasks.values()),
            *generation.ensembles.values(),
        ]
        self.rows: list[int] = []

    def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.RepositoryIndexResponse(
            models=[service_pb2.RepositoryIndexResponse.ModelIndex(name=name, state="READY") for name in self._models]
        )

    def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.RepositoryModelLoadResponse()

    def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerMetadataResponse(version="of a fake")

    def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelStatisticsResponse()

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(tuple(request.inputs[0].shape))
        self.rows.append(len(images))
        if len(images) < MAX_BATCH_SIZE or (images[:, 0, 0, 0] == 255).any():
            context.abort(grpc.StatusCode.INTERNAL, "onnx runtime error 2: somebody's row")
        response = service_pb2.ModelInferResponse(raw_output_contents=[answer(DIGITS, images).astype(np.float32).tobytes()])
        response.outputs.add(name="logits", datatype="FP32", shape=(len(images), len(DIGITS.labels)))
        return response


def test_who_fails_because_of_another_is_asked_again_in_a_batch_of_its_own(tmp_path: pathlib.Path) -> None:
    builder = RepositoryBuilder(tmp_path)
    generation = Repository(tmp_path).read(builder.publish({"digits": DIGITS}))
    fake = FakeTriton(generation)
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    told = triton_settings(tmp_path, probe_interval_seconds=1000.0)
    engine = TritonEngine(
        told.model_copy(update={"triton": told.triton.model_copy(update={"endpoints": (f"127.0.0.1:{port}",)})})
    )
    try:
        engine.load(generation)
        fake.rows.clear()
        images = random_images(11, 8)
        logits = engine.answer(Question(generation, images, ("digits",))).result(20)["digits"]
        np.testing.assert_allclose(logits, answer(DIGITS, images), atol=1e-4, rtol=0)
        # A full batch and one of three, which fails and is filled up.
        assert sorted(fake.rows) == [3, MAX_BATCH_SIZE, MAX_BATCH_SIZE]
        images[9, 0, 0, 0] = 255
        error = engine.answer(Question(generation, images, ("digits",))).exception(20)
        assert isinstance(error, SegmentRunError)
        assert "somebody's row" in str(error)
    finally:
        engine.close()
        server.stop(None)


def test_questions_go_to_whoever_has_least_to_do(
    builder: RepositoryBuilder, triton: TritonProcess, two: Generation, tmp_path: pathlib.Path
) -> None:
    with (
        TritonProcess(environment(), builder.root, log=tmp_path / "log") as other,
        engine_on(builder, triton, other, max_rows_in_flight=16) as engine,
    ):
        engine.load(two)
        # Held up, so that both are given all that they take, however much faster one of them may answer.
        held_up = [segment_process(one, two.tasks["digits"].route[0]) for one in (triton, other)]
        for process in held_up:
            os.kill(process, signal.SIGSTOP)
        try:
            futures = [engine.answer(Question(two, random_images(2, 8), ("digits",))) for _ in range(100)]
            wait_until(lambda: [report.rows_in_flight for report in engine.endpoints()] == [16, 16])
        finally:
            for process in held_up:
                os.kill(process, signal.SIGCONT)
        for future in futures:
            future.result()
        with Caller(triton.addresses.grpc) as one, Caller(other.addresses.grpc) as another:
            ensemble = two.tasks["digits"].ensemble
            wait_until(lambda: sum(caller.counts()[ensemble][0] for caller in (one, another)) >= 200)
            assert min(caller.counts()[ensemble][0] for caller in (one, another)) >= 16


def test_the_front_door_says_which_triton_is_wrong(
    builder: RepositoryBuilder, triton: TritonProcess, two: Generation, tmp_path: pathlib.Path
) -> None:
    told = triton_settings(builder.root, triton)
    with serving(builder.root, engine=told.engine, triton=told.triton) as server, AdminClient(server.admin_address) as admin:
        (endpoint,) = admin.status().endpoints
        assert (endpoint.state, endpoint.reason, endpoint.address) == ("serving", "", triton.addresses.grpc)
        assert endpoint.generations == (two.number,)
        assert admin.status().engine == f"triton {endpoint.version} at {endpoint.address}"
        assert admin.status().memory is None
    # One that nobody else needs.
    with TritonProcess(environment(), builder.root, log=tmp_path / "log") as other:
        told = triton_settings(builder.root, other)
        with serving(builder.root, engine=told.engine, triton=told.triton) as server, Client(server.address) as client:
            assert client.classify("digits", random_images(1, 8)[0]).generation == two.number
            os.kill(other.pid, signal.SIGKILL)
            with pytest.raises(ServerUnreachableError, match="found what computes here out of reach") as caught:
                client.classify("digits", random_images(1, 8)[0])
            # Whoever asks questions does not learn where Tritons are; whoever administers does.
            assert other.addresses.grpc not in str(caught.value)
            # It was reached.
            assert str(caught.value).endswith("ask again later, or another one (UNAVAILABLE)")
            with AdminClient(server.admin_address) as admin:
                (endpoint,) = admin.status().endpoints
                assert (endpoint.state, endpoint.address, endpoint.reason != "") == ("down", other.addresses.grpc, True)
            with grpc.insecure_channel(server.address) as channel:
                check = health_pb2_grpc.HealthStub(channel).Check
                wait_until(lambda: check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING)
                other.start()
                wait_until(lambda: check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING)
            assert client.classify("digits", random_images(1, 8)[0]).generation == two.number
        os.kill(other.pid, signal.SIGKILL)


def test_without_any_triton_it_does_not_start(builder: RepositoryBuilder, two: Generation) -> None:
    told = triton_settings(builder.root, start_seconds=0.2).model_copy()
    nobody = told.triton.model_copy(update={"endpoints": ("127.0.0.1:1",)})
    with (
        pytest.raises(NoEndpointError, match="127.0.0.1:1 is down"),
        serving(builder.root, engine=told.engine, triton=nobody),
    ):
        pass
    with pytest.raises(SettingsError, match="HOST:PORT of a Triton"):
        TritonEngine(told)


def test_aliases_follow_for_clients_that_talk_to_triton(builder: RepositoryBuilder, triton: TritonProcess) -> None:
    images = random_images(3, 8)
    told = triton_settings(builder.root, triton, unload_after_seconds=0.0)
    # What runs through segments that others need does not go with them.
    builder.publish({"changing": DIGITS, "going": GREEK, "staying": GREEK})
    with serving(builder.root, engine=told.engine, triton=told.triton) as server, Caller(triton.addresses.grpc) as caller:
        wait_until(lambda: {"changing", "going"} <= caller.ready())
        np.testing.assert_allclose(caller.infer("changing", images)["logits"], answer(DIGITS, images), atol=1e-4, rtol=0)
        builder.publish({"changing": HEBREW, "staying": GREEK})
        # As the exporter does.
        shutil.rmtree(builder.root / "going")
        wait_until(lambda: server.server.reloader.generation.number == builder.newest())
        # Whoever asks meanwhile gets one or the other, whole.
        while True:
            logits = caller.infer("changing", images)["logits"]
            if logits.shape[1] == len(HEBREW.labels):
                break
            np.testing.assert_allclose(logits, answer(DIGITS, images), atol=1e-4, rtol=0)
        np.testing.assert_allclose(logits, answer(HEBREW, images), atol=1e-4, rtol=0)
        # A task that is gone goes there too, and then what only it needed.
        wait_until(lambda: "going" not in caller.ready())
        generation = server.server.reloader.generation
        wait_until(lambda: {name for name in caller.ready() if name.startswith("seg-")} == set(generation.segments))


def test_an_alias_that_is_not_right_yet_is_left_as_it_was(builder: RepositoryBuilder, triton: TritonProcess) -> None:
    images = random_images(3, 8)
    told = triton_settings(builder.root, triton, unload_after_seconds=0.0)
    builder.publish({"waiting": DIGITS})
    with serving(builder.root, engine=told.engine, triton=told.triton) as server, Caller(triton.addresses.grpc) as caller:
        wait_until(lambda: "waiting" in caller.ready())
        number = builder.publish({"waiting": HEBREW}, current=False)
        builder.set_current(number)
        wait_until(lambda: server.server.reloader.generation.number == number)
        # What the alias runs through stays, though no generation needs it: else the alias would fall.
        for _ in range(20):
            np.testing.assert_allclose(caller.infer("waiting", images)["logits"], answer(DIGITS, images), atol=1e-4, rtol=0)
        builder.publish({"waiting": HEBREW}, number=number)
        wait_until(lambda: caller.infer("waiting", images)["logits"].shape[1] == len(HEBREW.labels))


def test_what_a_cache_answers_is_right_and_did_not_run(tmp_path: pathlib.Path) -> None:
    builder = RepositoryBuilder(tmp_path / "repository")
    number = builder.publish({"digits": DIGITS, "greek": GREEK})
    stem = builder.read_manifest(number).tasks[0].route[0]
    builder.edit_config(number, stem, lambda config: setattr(config.response_cache, "enable", True))
    generation = Repository(builder.root).read()
    arguments = environment().cache_arguments(16 * 2**20)
    with TritonProcess(environment(), builder.root, log=tmp_path / "log", arguments=arguments) as triton:
        with engine_on(builder, triton, probe_interval_seconds=0.02) as engine:
            engine.load(generation)
            first, second = random_images(2, 8, seed=21)[:, np.newaxis]
            for image in (first, second, first, first):
                for tasks in (("digits",), ("greek",), ("digits", "greek")):
                    logits = engine.answer(Question(generation, image, tasks)).result(20)
                    for name in tasks:
                        np.testing.assert_allclose(logits[name], answer(TASKS[name], image), atol=1e-4, rtol=0)
            found = {segment.name: segment for segment in engine.statistics()}
            assert (found[stem].rows_requested, found[stem].rows_computed) == (16, 2)
            # What comes after it has no cache.
            assert found[generation.tasks["digits"].route[1]].rows_computed == 12
            # Probes go past the cache: they find what is dead behind it.
            os.kill(segment_process(triton, stem), signal.SIGKILL)
            wait_until(lambda: engine.endpoints()[0].reason)
            wait_until(lambda: not engine.endpoints()[0].reason)
            assert engine.answer(Question(generation, random_images(1, 8, seed=22), ("digits",))).result(20)
        os.kill(triton.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An authority, and certificates of a Triton and of a client that it signed."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(arguments: str) -> None:
        subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)

    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=authority")
    (folder / "names").write_text("subjectAltName=DNS:triton.example")
    for name in ("triton", "client"):
        openssl(f"req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}.example")
        signed = f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2 -extfile names"
        openssl(signed)
    (folder / "keys").write_text("admin=secret-1\n")
    return folder


class TlsTriton(TritonProcess):
    """One whose readiness the launcher cannot ask for: it speaks plain text."""

    def _await_ready(self, addresses: TritonAddresses, offset: int) -> None:
        wait_until(lambda: "Started GRPCInferenceService" in self.log.read_text())


def test_tls_and_keys(builder: RepositoryBuilder, two: Generation, certificates: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = (
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={certificates / 'triton.pem'}",
        f"--grpc-server-key={certificates / 'triton.key'}",
        f"--grpc-root-cert={certificates / 'ca.pem'}",
        "--grpc-restricted-protocol=model-repository,inference,statistics,model-config:admin=secret-1",
    )
    tls = {
        "ca_file": str(certificates / "ca.pem"),
        "certificate_file": str(certificates / "client.pem"),
        "key_file": str(certificates / "client.key"),
        "server_name": "triton.example",
        "start_seconds": 20.0,
    }
    with TlsTriton(environment(), builder.root, log=tmp_path / "log", arguments=arguments) as triton:
        address = triton.addresses.grpc
        images = random_images(2, 8)

        def settings(**overrides: object) -> object:
            told = triton_settings(builder.root, **tls | overrides)
            return told.model_copy(update={"triton": told.triton.model_copy(update={"endpoints": (address,)})})

        engine = TritonEngine(settings(keys_file=str(certificates / "keys")))
        try:
            engine.load(two)
            logits = engine.answer(Question(two, images, ("digits", "greek"))).result(20)
            np.testing.assert_allclose(logits["digits"], answer(TASKS["digits"], images), atol=1e-4, rtol=0)
            assert engine.statistics()[0].rows_computed
        finally:
            engine.close()
        # Without the key Triton says what is missing; without our certificate it says nothing at all.
        with pytest.raises(EndpointGoneError, match="restricted"):
            Endpoint(address, Access.read(settings().triton)).models()
        bare = settings(certificate_file=None, key_file=None).triton
        with pytest.raises(EndpointGoneError):
            Endpoint(address, Access.read(bare)).version()


def test_settings_of_access_are_checked(tmp_path: pathlib.Path) -> None:
    def read(**values: object) -> Access:
        return Access.read(triton_settings(tmp_path, **values).triton)

    assert read().metadata == ()
    with pytest.raises(SettingsError, match="both or neither"):
        read(certificate_file="a.pem")
    with pytest.raises(SettingsError, match=r"triton\.ca_file"):
        read(certificate_file="a.pem", key_file="a.key")
    with pytest.raises(SettingsError, match="a readable file"):
        read(ca_file=str(tmp_path / "none.pem"))
    (tmp_path / "keys").write_text("\nadmin=a=b \nother-one=c\n")
    assert read(keys_file=str(tmp_path / "keys")).metadata == (
        ("triton-grpc-protocol-admin", "a=b"),
        ("triton-grpc-protocol-other-one", "c"),
    )
    (tmp_path / "keys").write_text("a secret without a name\n")
    with pytest.raises(SettingsError, match="NAME=VALUE") as caught:
        read(keys_file=str(tmp_path / "keys"))
    assert "secret without" not in str(caught.value)
