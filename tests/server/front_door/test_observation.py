"""What a running server shows of its calls: metrics as Prometheus scrapes them, request ids, lines of the log, health for probes."""

from __future__ import annotations

import io
import json
import logging
import pathlib
import threading
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from munet.v1 import inference_pb2 as pb
from server.client import AdminClient, Client
from server.config import LogSettings, TokenSettings
from server.errors import CallRefusedError, ServerUnreachableError
from server.logs import JsonFormatter, TextFormatter
from server.probe import probe
from tests.support.repository import DIGITS, RepositoryBuilder, random_images
from tests.support.serving import Brake, HeldPause, ServerThread, serving, wait_until

IMAGES = random_images(4, 8, seed=3)
CLASSIFY = "/munet.v1.InferenceService/Classify"


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("repository"))
    builder.publish()
    return builder


@pytest.fixture(scope="module")
def server(builder: RepositoryBuilder) -> Iterator[ServerThread]:
    with serving(builder.root, metrics_listen="127.0.0.1:0", log=LogSettings(access=True)) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: ServerThread) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


class Log:
    """What is logged within a block, as one of the formatters writes it."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self._stream = io.StringIO()
        self._handler = logging.StreamHandler(self._stream)
        self._handler.setFormatter(formatter)

    def __enter__(self) -> Log:
        root = logging.getLogger()
        self._level = root.level
        root.setLevel("INFO")
        root.addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger().setLevel(self._level)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def lines(self, count: int) -> list[dict[str, object]]:
        """Returns lines of JSON, once there are so many: a call's own is written after its answer."""
        wait_until(lambda: self.text.count("\n") >= count)
        return [json.loads(line) for line in self.text.splitlines()]


def samples(server: ServerThread) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://{server.server.metrics_address}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


def sample(server: ServerThread, name: str, **labels: str) -> float:
    return samples(server).get((name, tuple(sorted(labels.items()))), 0.0)


def request(task: str = "digits") -> bytes:
    image = pb.Image(raw=pb.RawImage(height=8, width=8, channels=3, data=IMAGES[0].tobytes()))
    return pb.ClassifyRequest(task=task, images=[image]).SerializeToString()


def request_id(metadata: object) -> str:
    (found,) = [value for key, value in metadata if key == "x-request-id"]  # type: ignore[attr-defined]
    return str(found)


def test_a_scrape_tells_of_tasks_and_segments(builder: RepositoryBuilder) -> None:
    with serving(builder.root, metrics_listen="127.0.0.1:0") as server, Client(server.address) as client:
        client.classify("digits", list(IMAGES))
        client.classify_tasks(IMAGES[0], ["digits", "greek"])
        route = client.get_task("digits").route
        with pytest.raises(CallRefusedError):
            client.classify("digits", b"no image")
        # The last batch is noted after its answer.
        wait_until(lambda: sample(server, "munet_segment_batch_rows_count", segment=route[-1]) == 2)
        found = samples(server)

    def value(name: str, **labels: str) -> float:
        return found[name, tuple(sorted(labels.items()))]

    assert value("munet_task_requests_total", task="digits", outcome="answered") == 2
    assert value("munet_task_requests_total", task="digits", outcome="image_refused") == 1
    assert value("munet_task_images_total", task="digits") == 5
    for name in ("munet_task_seconds", "munet_task_queue_seconds", "munet_task_compute_seconds"):
        assert value(f"{name}_count", task="digits") == value(f"{name}_bucket", task="digits", le="+Inf") == 2
    seconds = value("munet_task_seconds_sum", task="digits")
    computed = value("munet_task_compute_seconds_sum", task="digits")
    assert 0 < computed < computed + value("munet_task_queue_seconds_sum", task="digits") < seconds
    assert value("munet_segment_rows_requested_total", segment=route[0]) == 6
    assert value("munet_segment_rows_computed_total", segment=route[0]) == 5
    assert value("munet_segment_rows_saved_total", segment=route[0]) == 1
    assert value("munet_segment_queue_seconds_count", segment=route[0]) == 5
    assert value("munet_segment_batch_tasks_sum", segment=route[0]) == 3
    assert value("munet_rejections_total", reason="image_refused") == 1
    assert value("munet_calls_total", method="InferenceService/Classify", status="INVALID_ARGUMENT") == 1
    assert value("munet_reloads_total", outcome="served") == value("munet_reload_seconds_count", outcome="served") == 1
    assert (value("munet_serving"), value("munet_requests_in_flight"), value("munet_generation")) == (1, 0, 1)
    assert value("process_resident_memory_bytes") > 2**20
    assert value("process_open_fds") > 3
    assert value("process_threads") > threading.active_count() / 2
    assert not any("task" in dict(labels) and dict(labels)["task"] == "hebrew" for _, labels in found)


def test_status_has_the_same_with_details(server: ServerThread) -> None:
    with AdminClient(server.admin_address) as admin, Client(server.address) as client:
        client.classify("short", IMAGES[0])
        route = client.get_task("short").route
        assert admin.status().tasks == ()
        found = admin.status(details=True)
        (short,) = [task for task in found.tasks if task.name == "short"]
        assert (short.answered, short.images, short.latency.count, short.compute.count) == (1, 1, 1, 1)
        wait_until(
            lambda: (
                next(segment for segment in admin.status(details=True).segments if segment.name == route[-1]).distributions
                is not None
            )
        )


def test_requests_in_flight_are_seen(server: ServerThread, channel: grpc.Channel) -> None:
    brake = Brake(server.server.engine)
    call = channel.unary_unary(CLASSIFY).future(request(), timeout=20)
    assert brake.entered.wait(60)
    assert sample(server, "munet_requests_in_flight") == 1
    assert sample(server, "munet_request_bytes_in_flight") == len(request())
    brake.go_on.set()
    call.result()


@pytest.mark.parametrize("sent", ["shop-7f3a", "!" * 128, "a=b;c"])
def test_a_callers_request_id_comes_back(channel: grpc.Channel, sent: str) -> None:
    answer = channel.unary_unary(CLASSIFY).with_call(request(), metadata=[("x-request-id", sent)])
    assert request_id(answer[1].trailing_metadata()) == sent


@pytest.mark.parametrize("metadata", [[], [("x-request-id", "a" * 129)], [("x-request-id", "a b")], [("x-request-id", "")]])
@pytest.mark.parametrize("task", ["digits", "nobody"])
def test_else_one_is_made(channel: grpc.Channel, metadata: list[tuple[str, str]], task: str) -> None:
    ids = set()
    for _ in range(2):
        call = channel.unary_unary(CLASSIFY).future(request(task), metadata=metadata)
        call.exception()
        ids.add(request_id(call.trailing_metadata()))
    assert len(ids) == 2
    assert all(len(one) == 16 for one in ids)


def test_several_ids_are_none(channel: grpc.Channel) -> None:
    metadata = [("x-request-id", "a"), ("x-request-id", "b")]
    _, call = channel.unary_unary(CLASSIFY).with_call(request(), metadata=metadata)
    assert request_id(call.trailing_metadata()) not in ("a", "b")


def test_messages_of_a_stream_share_an_id_and_have_lines_of_their_own(channel: grpc.Channel) -> None:
    message = service_pb2.ModelInferRequest(model_name="nobody").SerializeToString()
    with Log(JsonFormatter()) as log:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        call = stream(iter([message, message]), metadata=[("x-request-id", "mine")])
        assert len(list(call)) == 2
        lines = log.lines(2)
    assert request_id(call.trailing_metadata()) == "mine"
    assert [(line["request_id"], line["reason"]) for line in lines] == [("mine", "unknown_task")] * 2


def test_each_call_is_a_line(channel: grpc.Channel) -> None:
    with Log(JsonFormatter()) as log:
        channel.unary_unary(CLASSIFY)(request(), metadata=[("x-request-id", "shop-1")])
        channel.unary_unary(CLASSIFY).future(request("nobody"), metadata=[("x-request-id", "shop-2")]).exception()
        first, second = log.lines(2)
    assert first["message"].startswith("InferenceService/Classify OK in ")  # type: ignore[attr-defined]
    told = {name: first[name] for name in ("level", "logger", "request_id", "method", "tasks", "num_tasks", "status")}
    assert told == {
        "level": "info",
        "logger": "server.access_log",
        "request_id": "shop-1",
        "method": "InferenceService/Classify",
        "tasks": ["digits"],
        "num_tasks": 1,
        "status": "OK",
    }
    assert 0 < first["seconds"] < 10  # type: ignore[operator]
    assert (second["status"], second["reason"], second["request_id"]) == ("NOT_FOUND", "unknown_task", "shop-2")


def test_an_internal_error_tells_its_callers_id_and_the_log_why(
    server: ServerThread, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("server.front_door.converters.to_images", fail)
    with Log(JsonFormatter()) as log, Log(TextFormatter()) as text:
        call = channel.unary_unary(CLASSIFY).future(request(), metadata=[("x-request-id", "shop-3")])
        assert call.code() is grpc.StatusCode.INTERNAL
        assert call.details() == "the server failed to answer; its log says why under the id shop-3"
        failure, access = log.lines(2)
    assert (failure["level"], failure["request_id"]) == ("error", "shop-3")
    assert "ZeroDivisionError: a secret" in str(failure["exception"])
    assert (access["status"], access["reason"]) == ("INTERNAL", "bug")
    assert "ERROR server.front_door.edge: InferenceService/Classify failed, id shop-3 [shop-3]" in text.text
    assert sample(server, "munet_rejections_total", reason="bug") == 1


def test_whoever_has_no_token_gets_an_id_too(builder: RepositoryBuilder, tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokens.toml").write_text("[tokens]\n")
    tokens = TokenSettings(file=tmp_path / "tokens.toml")
    with (
        serving(builder.root, tokens=tokens, log=LogSettings(access=True)) as server,
        grpc.insecure_channel(server.address) as channel,
        Log(JsonFormatter()) as log,
    ):
        call = channel.unary_unary(CLASSIFY).future(request(), metadata=[("x-request-id", "stranger")])
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert request_id(call.trailing_metadata()) == "stranger"
        (line,) = log.lines(1)
        assert (line["request_id"], line["reason"]) == ("stranger", "unauthenticated")
        # Health is open, for probes.
        assert probe([server.address]) == ""


def test_series_of_a_task_end_with_it(builder: RepositoryBuilder, server: ServerThread) -> None:
    with AdminClient(server.admin_address) as admin, Client(server.address) as client:
        client.classify("digits", IMAGES[0])
        builder.publish({"new": DIGITS})
        admin.reload()
        client.classify("new", IMAGES[0])
        tasks = {dict(labels)["task"] for name, labels in samples(server) if name == "munet_task_images_total"}
        assert tasks == {"new"}
        builder.publish()
        admin.reload()


def test_a_probe_says_what_is_wrong(server: ServerThread) -> None:
    assert probe([server.address]) == probe([server.address, "--task", "digits"]) == ""
    assert "NOT_FOUND" in probe([server.address, "--task", "nobody"])
    assert "found no health at 127.0.0.1:1: UNAVAILABLE" in probe(["127.0.0.1:1"])


def test_readiness_goes_down_before_requests_are_refused(builder: RepositoryBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = HeldPause(monkeypatch)
    seen: list[object] = []

    def watch(address: str, admin: str) -> None:
        with grpc.insecure_channel(address) as channel, Client(address) as client:
            for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                seen.append(answer.status)
                if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    seen.append(client.classify("digits", IMAGES[0]).task)
                    seen.append(probe([admin]))
                    seen.append(probe([admin, "--live"]))
                    pause.over.set()
                    break

    with serving(builder.root, drain_seconds=1.5) as server:
        watching = threading.Thread(target=watch, args=(server.address, server.admin_address))
        watching.start()
        wait_until(lambda: bool(seen))
        address, admin_address = server.address, server.admin_address
    watching.join()
    assert pause.asked_seconds == [1.5]
    serving_, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert seen == [serving_, not_serving, "digits", f"found {admin_address} NOT_SERVING; expected it to serve", ""]
    with Client(address) as client, pytest.raises(ServerUnreachableError):
        client.classify("digits", IMAGES[0], timeout_seconds=5)
