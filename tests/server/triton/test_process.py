"""The wheel's tritonserver as a child process, and our backend in it, on the very repository that other engines serve."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2

from server.errors import SettingsError, TritonProcessError
from server.triton.process import TritonAddresses, TritonProcess
from server.triton.shared_memory import FOLDER, SharedMemory, remove_abandoned
from tests.support.processes import TOP, lives
from tests.support.processes import environment as variables
from tests.support.repository import TASKS, TRAP, RepositoryBuilder, answer, random_images
from tests.support.triton import Caller, children, environment, kill, make_request, read_response, segment_process, wait_until

THREADS = 2


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("repository"))
    builder.publish({**TASKS, "trap": TRAP})
    return builder


@pytest.fixture(scope="module")
def triton(builder: RepositoryBuilder) -> Iterator[TritonProcess]:
    addresses = TritonAddresses(metrics="127.0.0.1:0")
    with TritonProcess(environment(), builder.root, addresses, threads=THREADS) as triton:
        manifest = builder.read_manifest(1)
        with Caller(triton.addresses.grpc) as caller:
            caller.load(
                *(segment.name for segment in manifest.segments), *(ensemble.name for ensemble in manifest.multi_task_ensembles)
            )
            caller.load(*(task.name for task in manifest.tasks))
        yield triton
        # Ending well would take it seconds, and is tried below.
        os.kill(triton.pid, signal.SIGKILL)
    assert not triton.log.exists()


@pytest.fixture
def caller(triton: TritonProcess) -> Iterator[Caller]:
    with Caller(triton.addresses.grpc) as caller:
        yield caller


def publish_half(root: pathlib.Path, name: str, parameters: dict[str, str]) -> None:
    """Writes a model that doubles float16 numbers."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["hidden", "hidden"], ["hidden_out"])],
        "segment",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT16, ["batch", "tokens", 4])],
        [helper.make_tensor_value_info("hidden_out", TensorProto.FLOAT16, ["batch", "tokens", 4])],
    )
    config = model_config_pb2.ModelConfig(name=name, backend="onnxruntime", max_batch_size=8)
    config.input.add(name="hidden", data_type=model_config_pb2.TYPE_FP16, dims=[-1, 4])
    config.output.add(name="hidden_out", data_type=model_config_pb2.TYPE_FP16, dims=[-1, 4])
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(text_format.MessageToString(config))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, root / name / "1" / "model.onnx")


# What it answers


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_answered_as_numpy_does(caller: Caller, task: str) -> None:
    for count in (1, 3, 8):
        images = random_images(count, TASKS[task].image_size, seed=count)
        np.testing.assert_allclose(caller.infer(task, images)["logits"], answer(TASKS[task], images), atol=1e-4)


def test_all_tasks_of_a_size_are_answered_at_once(caller: Caller, builder: RepositoryBuilder) -> None:
    (ensemble,) = [ensemble for ensemble in builder.read_manifest(1).multi_task_ensembles if ensemble.image_size == 8]
    images = random_images(2, 8)
    before = caller.executions(builder.read_manifest(1).tasks[0].route[0])
    answers = caller.infer(ensemble.name, images)
    assert answers.keys() == {f"logits_{task}" for task in ensemble.tasks}
    for task, plan in TASKS.items():
        if plan.image_size == 8:
            np.testing.assert_allclose(answers[f"logits_{task}"], answer(plan, images), atol=1e-4)
    assert caller.executions(builder.read_manifest(1).tasks[0].route[0]) == before + 1


def test_one_bad_request_harms_none_of_its_batch(triton: TritonProcess, caller: Caller, builder: RepositoryBuilder) -> None:
    (trap,) = [task for task in builder.read_manifest(1).tasks if task.name == "trap"]
    executions = caller.executions(trap.route[0])
    images = random_images(60, 8, seed=1)
    images[::6, 0, 0, 0] = 250
    # Held up, so that they share batches, however fast this machine answers.
    held_up = segment_process(triton, trap.route[0])
    os.kill(held_up, signal.SIGSTOP)
    try:
        calls = [caller.stub.ModelInfer.future(make_request("trap", image[np.newaxis]), timeout=60) for image in images]
        time.sleep(0.3)
    finally:
        os.kill(held_up, signal.SIGCONT)
    for number, call in enumerate(calls):
        if number % 6:
            found = read_response(call.result())["logits"]
            np.testing.assert_allclose(found, answer(TRAP, images[number : number + 1]), atol=1e-4)
        else:
            with pytest.raises(grpc.RpcError, match="out of data bounds"):
                call.result()
    assert caller.executions(trap.route[0]) - executions < len(images), "nothing was batched, so nothing was shown"


def test_float16_passes_through(caller: Caller, builder: RepositoryBuilder) -> None:
    publish_half(builder.root, "half", {})
    caller.load("half")
    hidden = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float16)
    found = caller.infer("half", hidden, "hidden")["hidden_out"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, hidden + hidden)


def test_threads_are_those_of_the_config_or_else_of_who_started_it(
    triton: TritonProcess, caller: Caller, builder: RepositoryBuilder
) -> None:
    publish_half(builder.root, "threads-default", {})
    publish_half(builder.root, "threads-4", {"intra_op_thread_count": "4"})
    caller.load("threads-default", "threads-4")
    counts = {}
    for pid in children(triton.pid):
        command = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
        for name in ("threads-default", "threads-4"):
            if name in command:
                counts[name] = len(list(pathlib.Path(f"/proc/{pid}/task").iterdir()))
    assert counts["threads-4"] - counts["threads-default"] == 4 - THREADS


def test_a_config_of_other_tensors_is_refused(caller: Caller, builder: RepositoryBuilder) -> None:
    publish_half(builder.root, "other", {})
    config = builder.root / "other" / "config.pbtxt"
    config.write_text(config.read_text().replace("hidden_out", "hidden_in"))
    with pytest.raises(grpc.RpcError, match=r"found outputs \['hidden_out'\], expected those of config.pbtxt, \['hidden_in'\]"):
        caller.load("other")


def test_http_and_metrics_answer(triton: TritonProcess) -> None:
    assert triton.addresses.metrics is not None
    for address, path in ((triton.addresses.http, "v2/health/live"), (triton.addresses.metrics, "metrics")):
        with urllib.request.urlopen(f"http://{address}/{path}", timeout=10) as response:
            assert response.status == 200


# How it starts and ends


@pytest.mark.parametrize("kind", ["grpc", "http", "metrics"])
def test_a_used_port_is_named_and_nothing_starts(builder: RepositoryBuilder, kind: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        process = TritonProcess(environment(), builder.root, TritonAddresses(**{kind: address}))
        with pytest.raises(SettingsError, match=f"{kind}: found '{address}', expected .* nobody else uses"), process:
            pass
    assert not process.log.exists()


def test_a_failed_start_shows_the_log_and_keeps_it(builder: RepositoryBuilder) -> None:
    process = TritonProcess(environment(), builder.root, arguments=["--load-model=nothing"])
    with (
        pytest.raises(TritonProcessError, match="(?s)exit status 1, expected .*failed to poll model 'nothing'") as raised,
        process,
    ):
        pass
    assert "failed to poll model 'nothing'" in raised.value.log.read_text()
    assert not process.is_running
    process.log.unlink()


def test_it_ends_with_whoever_started_it_and_the_next_one_tidies_up(builder: RepositoryBuilder) -> None:
    program = f"""
import pathlib, time
from server.triton.process import TritonProcess
from tests.support.triton import Caller, environment
with TritonProcess(environment(), pathlib.Path({str(builder.root)!r})) as triton, Caller(triton.addresses.grpc) as caller:
    caller.load({builder.read_manifest(1).segments[0].name!r})
    print(triton.pid, triton._memory.prefix, triton.log, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=TOP, env=variables(), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, prefix, log = parent.stdout.readline().split()
        processes = [int(pid), *children(int(pid))]
        assert len(processes) == 2
        assert list(FOLDER.glob(f"{prefix}*"))
        remove_abandoned()
        assert list(FOLDER.glob(f"{prefix}*")), "what is used was removed"
        parent.kill()
        wait_until(lambda: not any(map(lives, processes)))
    remove_abandoned()
    assert not list(FOLDER.glob(f"{prefix[:-1]}*"))
    pathlib.Path(log).unlink()


def test_a_kill_leaves_nothing_in_shared_memory(builder: RepositoryBuilder) -> None:
    with TritonProcess(environment(), builder.root) as triton, Caller(triton.addresses.grpc) as caller:
        caller.load(builder.read_manifest(1).segments[0].name)
        assert triton._memory is not None
        pid, prefix = triton.pid, triton._memory.prefix
        (stub,) = children(pid)
        kill(pid)
        wait_until(lambda: not triton.is_running)
        assert triton.outcome == "signal 9"
        before = triton.addresses
        triton.start()
        assert triton.addresses == before
        assert not lives(stub)
        caller.load(builder.read_manifest(1).segments[0].name)
        assert len(list(FOLDER.glob(f"{prefix}*"))) == 1
        assert triton.stop() == 0
    assert not list(FOLDER.glob(f"{prefix[:-1]}*"))


def test_two_have_shared_memory_of_their_own() -> None:
    memories = [SharedMemory() for _ in range(2)]
    try:
        files = [FOLDER / f"{memory.prefix}file" for memory in memories]
        for file in files:
            file.touch()
        remove_abandoned()
        memories[0].clear()
        assert [file.exists() for file in files] == [False, True]
    finally:
        for memory in memories:
            memory.close()
    assert not any(file.exists() for file in files)


def test_many_can_tidy_up_and_begin_at_once() -> None:
    def begin_and_end(_: int) -> None:
        memory = SharedMemory()
        file = FOLDER / f"{memory.prefix}file"
        file.touch()
        assert file.exists()
        memory.close()
        assert not file.exists()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(begin_and_end, range(200)))
