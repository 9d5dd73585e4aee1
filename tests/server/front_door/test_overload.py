"""What callers are told of overload, over real channels."""

from __future__ import annotations

import concurrent.futures
import logging
import pathlib
import threading
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2, service_pb2_grpc

from munet.v1 import inference_pb2 as pb
from server.client import CallTimeoutError, Client, ServerBusyError
from server.config import Limits, TaskLimits
from server.embedded.costs import Kind
from server.front_door.edge import deadline_of
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import ENGINE, Brake, ServerThread, serving, wait_until

IMAGES = random_images(64, 8)


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path)
    builder.publish()
    return builder


def retry_seconds(error: grpc.RpcError) -> float:
    """Reads what every client library can read."""
    status = rpc_status.from_call(error)
    assert status is not None
    assert (status.code, status.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], error.details())
    hint = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(hint)
    return hint.retry_delay.ToTimedelta().total_seconds()


def teach(server: ServerThread, seconds: float) -> None:
    """Has the engine believe that each segment takes so long."""
    engine = server.server.engine
    engine._costs.keep(())
    for name in engine._memory.sessions:
        engine._costs.observe(Kind(name, 8), 1, seconds, time.monotonic())


def test_both_protocols_say_when_to_try_again(builder: RepositoryBuilder) -> None:
    engine = ENGINE.model_copy(update={"max_waiting_rows": 100})
    with serving(builder.root, engine=engine) as server, Client(server.address) as client:
        brake = Brake(server.server.engine)
        first = threading.Thread(target=client.classify, args=("digits", list(IMAGES)))
        first.start()
        assert brake.entered.wait(60)
        raw = pb.RawImage(height=8, width=8, channels=3, data=IMAGES[0].tobytes())
        tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[1, 8, 8, 3])
        infer = service_pb2.ModelInferRequest(model_name="digits", inputs=[tensor], raw_input_contents=[IMAGES[0].tobytes()])
        with grpc.insecure_channel(server.address) as channel:
            unary = channel.unary_unary("/munet.v1.InferenceService/Classify")
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for call in (
                lambda: unary(pb.ClassifyRequest(task="digits", images=[pb.Image(raw=raw)]).SerializeToString(), timeout=20),
                lambda: stub.ModelInfer(infer, timeout=20),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert 0.05 <= retry_seconds(caught.value) <= 5
        brake.go_on.set()
        first.join()


def test_a_deadline_that_cannot_be_met_is_refused_at_once(builder: RepositoryBuilder) -> None:
    with serving(builder.root) as server, Client(server.address, retry=None) as client:
        brake = Brake(server.server.engine)
        teach(server, 20.0)
        first = threading.Thread(target=client.classify, args=("greek", IMAGES[0]))
        first.start()
        assert brake.entered.wait(60)
        started = time.monotonic()
        with pytest.raises(CallTimeoutError, match="the deadline cannot be met: found"):
            client.classify("digits", IMAGES[0], timeout_seconds=30)
        with pytest.raises(ServerBusyError, match="seconds of work ahead of this question"):
            client.classify("greek", IMAGES[0], timeout_seconds=85)
        # Far from any of these.
        assert time.monotonic() - started < 20
        brake.go_on.set()
        first.join()
        # With nothing else to do it is tried, and what was believed is found out.
        assert client.classify("digits", IMAGES[0], timeout_seconds=30).classifications


def test_a_task_that_floods_leaves_room_for_others(builder: RepositoryBuilder) -> None:
    limits = Limits(max_requests_in_flight=18)
    with serving(builder.root, limits=limits) as server, Client(server.address) as client:
        brake = Brake(server.server.engine)
        with concurrent.futures.ThreadPoolExecutor(31) as threads:
            flood = [threads.submit(client.classify, "greek", IMAGES[0]) for _ in range(30)]
            wait_until(lambda: sum(call.done() for call in flood) == 14)
            quiet = threads.submit(client.classify, "digits", IMAGES[0])
            wait_until(lambda: len(server.server.engine._questions) == 17)
            brake.go_on.set()
            assert quiet.result().classifications
            refused = [error for call in flood if (error := call.exception()) is not None]
        assert len(refused) == 14
        assert all(isinstance(error, ServerBusyError) and "to the same task: found 16" in str(error) for error in refused)


def test_limits_of_one_task(builder: RepositoryBuilder, caplog: pytest.LogCaptureFixture) -> None:
    limits = {"digits": TaskLimits(max_requests_in_flight=1), "gone": TaskLimits()}
    with caplog.at_level(logging.WARNING), serving(builder.root, task_limits=limits) as server, Client(server.address) as client:
        assert "task_limits name tasks that generation 1 does not serve: gone" in caplog.text
        brake = Brake(server.server.engine)
        first = threading.Thread(target=client.classify, args=("digits", IMAGES[0]))
        first.start()
        assert brake.entered.wait(60)
        words = "requests to task 'digits' in flight: found 1 waiting, expected at most 1"
        with pytest.raises(ServerBusyError, match=words):
            client.classify("digits", IMAGES[0])
        with pytest.raises(ServerBusyError, match=words):
            client.classify_tasks(IMAGES[0], ["greek", "digits"])
        brake.go_on.set()
        assert client.classify("greek", IMAGES[0]).classifications
        first.join()
        assert client.classify("digits", IMAGES[0]).classifications


@pytest.mark.parametrize(("of_call", "of_question", "kept"), [(10.0, None, 0.01), (0.1, None, 0.005), (10.0, 0.1, 0.005)])
def test_some_of_a_deadline_is_kept_for_the_way(of_call: float, of_question: float | None, kept: float) -> None:
    class Call:
        def time_remaining(self) -> float:
            return of_call

    before = time.monotonic()
    # Of a context, nothing else is asked.
    found = deadline_of(Call(), of_question)  # type: ignore[arg-type]
    after = time.monotonic()
    assert found is not None
    left = min(of_call, of_question or of_call) - kept
    assert before + left - 1e-6 <= found <= after + left + 1e-6
