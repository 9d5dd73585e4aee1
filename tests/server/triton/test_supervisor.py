"""munet-server triton run on a real Triton: what it refuses, what dies under it, how it ends."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2

from server.cli import app
from server.config import TritonSettings
from server.errors import GenerationRefusedError, ServerError
from server.repository import Repository
from server.triton.plans import HeldGeneration
from server.triton.process import TritonProcess
from server.triton.shared_memory import FOLDER as MEMORY
from server.triton.supervisor import Supervisor, read_generation
from tests.support.background import Background
from tests.support.processes import TOP, lives, server
from tests.support.processes import environment as variables
from tests.support.repository import DIGITS, HEBREW, SHORT, RepositoryBuilder, TaskPlan, answer, random_images
from tests.support.triton import FOLDER, Caller, TritonRun, children, environment, kill, make_request, wait_until

PLANS = {"digits": DIGITS, "hebrew": HEBREW, "short": SHORT}
IMAGES = random_images(3, 8, seed=9)


def is_right(caller: Caller, task: str) -> bool:
    """Whether a task answers, and what it should."""
    try:
        logits = caller.infer(task, IMAGES)["logits"]
    except grpc.RpcError:
        return False
    np.testing.assert_allclose(logits, answer(PLANS[task], IMAGES), atol=1e-4)
    return True


# What dies while it runs


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("repository"))
    builder.publish(PLANS)
    return builder


@pytest.fixture(scope="module")
def run(builder: RepositoryBuilder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonRun]:
    with TritonRun(builder.root, tmp_path_factory.mktemp("output") / "output", "--interval", "0.2") as run:
        yield run
        log, prefix = run.log, prefix_of(run)
        assert run.stop() == 0, run.said
        assert not log.exists()
        assert run.said.rstrip().splitlines()[-1].startswith("stopped; ")
        assert not list(MEMORY.glob(f"{prefix}*"))


@pytest.fixture
def caller(run: TritonRun) -> Iterator[Caller]:
    with Caller(run.address) as caller:
        wait_until(lambda: all(is_right(caller, task) for task in PLANS))
        yield caller


@pytest.fixture(scope="module")
def trunk(builder: RepositoryBuilder) -> str:
    """What digits and short run through and hebrew does not."""
    (segment,) = [segment.name for segment in builder.read_manifest(1).segments if segment.units[0].layer_ids == ["block:trunk"]]
    return segment


def prefix_of(run: TritonRun) -> str:
    command = pathlib.Path(f"/proc/{run.triton_pid}/cmdline").read_text()
    return command.partition("shm-region-prefix-name=")[2].partition("-\0")[0]


def test_a_segment_killed_between_inferences_comes_back_and_others_notice_nothing(
    run: TritonRun, caller: Caller, trunk: str
) -> None:
    kill(run.stub_pid(trunk))
    wait_until(lambda: is_right(caller, "hebrew") and is_right(caller, "digits"))
    wait_until(lambda: f"{trunk} is loaded again" in run.said)
    assert all(is_right(caller, task) for task in PLANS)


def test_a_segment_killed_during_an_inference_fails_it_and_comes_back(run: TritonRun, caller: Caller, trunk: str) -> None:
    stub = run.stub_pid(trunk)
    os.kill(stub, signal.SIGSTOP)
    call = caller.stub.ModelInfer.future(make_request("digits", IMAGES), timeout=60)
    with pytest.raises(grpc.FutureTimeoutError):
        call.result(timeout=0.2)
    kill(stub)
    with pytest.raises(grpc.RpcError, match="is not healthy|has no available versions|unavailable"):
        call.result()
    wait_until(lambda: is_right(caller, "digits"))


def test_a_killed_triton_is_started_again_where_it_was(run: TritonRun, caller: Caller, builder: RepositoryBuilder) -> None:
    # What a test before killed may still be on its way back.
    wait_until(lambda: all(is_right(caller, task) for task in PLANS))
    before, loaded = run.triton_pid, caller.ready()
    stubs = children(before)
    kill(before)
    wait_until(lambda: children(run.process.pid) not in ([], [before]) and answers(caller) and caller.ready() == loaded)
    assert all(is_right(caller, task) for task in PLANS)
    assert not any(map(lives, stubs))
    num_segments = len(builder.read_manifest(1).segments)
    assert len(list(MEMORY.glob(f"{prefix_of(run)}-*"))) == num_segments


def answers(caller: Caller) -> bool:
    try:
        caller.ready()
    except grpc.RpcError:
        return False
    return True


def test_what_another_controller_unloads_stays_so_and_what_it_loads_is_kept_alive(
    run: TritonRun, caller: Caller, builder: RepositoryBuilder, trunk: str
) -> None:
    caller.unload("digits", "short")
    caller.unload(trunk)
    wait_until(lambda: trunk not in caller.ready())
    said = run.said
    # Long enough for several looks.
    with pytest.raises(AssertionError, match="waited in vain"):
        wait_until(lambda: bool({"digits", "short", trunk} & caller.ready()), timeout_seconds=1.0)
    assert run.said == said
    caller.load(trunk, "digits", "short")
    kill(run.stub_pid(trunk))
    wait_until(lambda: is_right(caller, "digits"))


def test_a_second_one_at_the_same_ports_says_so_and_harms_nobody(
    run: TritonRun, caller: Caller, builder: RepositoryBuilder
) -> None:
    result = server("triton", "run", "--repository", builder.root, "--environment", FOLDER, "--grpc", run.address)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == f"munet-server: grpc: found '{run.address}', expected an address to listen on that nobody else uses "
        + ("([Errno 98] Address already in use)\n")
    )
    assert all(is_right(caller, task) for task in PLANS)


def test_a_second_one_that_loads_nothing_only_starts_triton_again(
    run: TritonRun, caller: Caller, builder: RepositoryBuilder, trunk: str, tmp_path: pathlib.Path
) -> None:
    arguments = ("--no-load", "--interval", "0.1", "--log", str(tmp_path / "log"))
    with TritonRun(builder.root, tmp_path / "output", *arguments) as other, Caller(other.address) as both:
        assert "Triton serving nothing yet" in other.said
        both.load("digits")
        # Loaded alone: its segments came with it.
        assert is_right(both, "digits")
        executions = both.executions(trunk)
        kill(other.triton_pid)
        wait_until(lambda: "Triton was started again, with 0 models to load" in other.said and answers(both))
        assert both.ready() == set()
        both.load("digits")
        assert is_right(both, "digits")
        # Nobody else asks.
        assert both.executions(trunk) == executions
        assert other.stop(signal.SIGINT) == 0
    assert other.said.endswith("stopped; 1 restart, 0 segments loaded again\n")
    assert "successfully loaded 'digits'" in (tmp_path / "log").read_text()
    assert all(is_right(caller, task) for task in PLANS)


def test_a_triton_killed_while_the_first_generation_loads_is_started_again(
    builder: RepositoryBuilder, tmp_path: pathlib.Path
) -> None:
    with TritonRun(builder.root, tmp_path / "output", wait=False) as run:
        # One of several segments runs, so the load has begun and has not ended.
        wait_until(lambda: children(run.process.pid) and children(run.triton_pid))
        first, stubs, prefix = run.triton_pid, children(run.triton_pid), prefix_of(run)
        kill(first)
        run.wait_until_serving()
        assert "Triton ended with signal 9" in run.said.partition("Triton serving")[0]
        assert run.triton_pid != first
        assert not any(map(lives, stubs))
        with Caller(run.address) as caller:
            assert all(is_right(caller, task) for task in PLANS)
        assert run.stop() == 0
    assert run.said.endswith("stopped; 1 restart, 0 segments loaded again\n")
    assert not list(MEMORY.glob(f"{prefix}*"))


def test_a_command_killed_with_sigkill_takes_triton_along_and_what_it_leaves_goes_at_the_next_start(
    builder: RepositoryBuilder, tmp_path: pathlib.Path
) -> None:
    with TritonRun(builder.root, tmp_path / "output") as run:
        prefix = prefix_of(run)
        processes = [run.triton_pid, *children(run.triton_pid)]
        kill(run.process.pid)
        run.log.unlink()
    wait_until(lambda: not any(map(lives, processes)))
    assert list(MEMORY.glob(f"{prefix}*"))
    TritonRun(builder.root, tmp_path / "next", "--no-load").stop()
    assert not list(MEMORY.glob(f"{prefix}*"))


class Asker(Background):
    """Asks tasks by their plain names all the time, and keeps what went wrong."""

    def __init__(self, address: str, expected: dict[str, list[np.ndarray]]) -> None:
        self._address = address
        self._expected = expected
        super().__init__([functools.partial(self._run, task) for task in expected])
        self.latest: dict[str, int] = {}
        self.errors: list[BaseException] = []

    def _run(self, task: str, stop: threading.Event) -> None:
        with Caller(self._address) as caller:
            while not stop.wait(0.01):
                try:
                    logits = caller.infer(task, IMAGES)["logits"]
                    fitting = [
                        each.shape == logits.shape and np.allclose(each, logits, atol=1e-4) for each in self._expected[task]
                    ]
                    self.latest[task] = fitting.index(True)
                except (grpc.RpcError, ValueError) as error:
                    self.errors.append(error)


def test_what_is_published_meanwhile_is_taken_up_and_no_answer_fails_or_is_torn(
    run: TritonRun, caller: Caller, builder: RepositoryBuilder
) -> None:
    moved = TaskPlan((*SHORT.route[:2], "head:moved:3"), ("a", "b", "c"))
    expected = {"short": [answer(SHORT, IMAGES), answer(moved, IMAGES)], "digits": [answer(DIGITS, IMAGES)]}
    with Asker(run.address, expected) as asker:
        wait_until(lambda: asker.latest.keys() == expected.keys())
        builder.publish({**PLANS, "short": moved})
        wait_until(lambda: asker.latest["short"] == 1)
        broken = builder.publish({**PLANS, "short": TaskPlan((*moved.route[:2], "head:broken:3"), moved.labels)}, current=False)
        said = break_segment(builder, broken, "short")
        builder.set_current(broken)
        wait_until(lambda: re.search(f"generation {broken - 1} goes on: generation {broken} is refused: {said}", run.said))
        builder.publish(PLANS)
        wait_until(lambda: asker.latest["short"] == 0)
    assert asker.errors == []


# What it refuses, told by Triton itself


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> RepositoryBuilder:
    return RepositoryBuilder(tmp_path_factory.mktemp("changed"))


@pytest.fixture(scope="module")
def triton(changed: RepositoryBuilder) -> Iterator[TritonProcess]:
    with TritonProcess(environment(), changed.root) as triton:
        yield triton
        # Ending well would take it seconds, which prove nothing here.
        os.kill(triton.pid, signal.SIGKILL)


def break_segment(builder: RepositoryBuilder, number: int, name: str = "") -> str:
    (task,) = [task for task in builder.read_manifest(number).tasks if not name or task.name == name][:1]
    builder.replace_file(number, f"{task.route[-1]}/1/model.onnx", b"nonsense")
    return f"segment '{task.route[-1]}': found .*Protobuf parsing failed"


def remove_segment(builder: RepositoryBuilder, number: int) -> str:
    name = builder.read_manifest(number).tasks[0].route[-1]
    (builder.root / name / "1" / "model.onnx").unlink()
    return f"segment '{name}': found .*doesn't exist"


def alter_weights(builder: RepositoryBuilder, number: int) -> str:
    task = builder.read_manifest(number).tasks[0]
    other = RepositoryBuilder(builder.root / "other")
    other.publish({"odd": TaskPlan((*DIGITS.route[:-1], "head:of another:10"), DIGITS.labels)})
    head = other.read_manifest(1).tasks[0].route[-1]
    builder.replace_file(number, f"{task.route[-1]}/1/model.onnx", (other.root / head / "1" / "model.onnx").read_bytes())
    shutil.rmtree(other.root)
    return f"task '{task.name}': golden answer at .*: found a difference of .*, expected at most 0.0001"


@pytest.mark.parametrize("damage", [break_segment, remove_segment, alter_weights])
def test_what_triton_cannot_load_is_named(
    triton: TritonProcess, changed: RepositoryBuilder, damage: Callable[[RepositoryBuilder, int], str]
) -> None:
    name = damage.__name__.replace("_", "-")
    # A head of its own for each, so that what one damages no other needs.
    plan = TaskPlan((*SHORT.route[:-1], f"head:{name}:10"), DIGITS.labels)
    number = changed.publish({name: plan})
    if damage is remove_segment:
        generation = read_generation(Repository(changed.root))
        expected = damage(changed, number)
    else:
        expected = damage(changed, number)
        generation = read_generation(Repository(changed.root))
    with (
        contextlib.closing(Supervisor(triton, Repository(changed.root))) as supervisor,
        pytest.raises(GenerationRefusedError, match=f"(?s)generation {number} is refused: {expected}"),
    ):
        supervisor.load(generation, threading.Event())


def test_a_generation_without_faults_loads_beside_them(triton: TritonProcess, changed: RepositoryBuilder) -> None:
    changed.publish(PLANS)
    generation = read_generation(Repository(changed.root))
    with contextlib.closing(Supervisor(triton, Repository(changed.root))) as supervisor:
        supervisor.load(generation, threading.Event())
    with Caller(triton.addresses.grpc) as caller:
        assert {*HeldGeneration(generation).models, *generation.tasks} <= caller.ready()
        assert all(is_right(caller, task) for task in PLANS)


def test_what_no_generation_needs_any_more_is_unloaded(triton: TritonProcess, changed: RepositoryBuilder) -> None:
    stop = threading.Event()
    settings = TritonSettings(unload_after_seconds=0.3)

    def wanted(number: int) -> set[str]:
        generation = Repository(changed.root).read(number)
        return {*HeldGeneration(generation).models, *generation.tasks}

    first = changed.publish({"going": DIGITS, "staying": SHORT})
    with (
        contextlib.closing(Supervisor(triton, Repository(changed.root), settings=settings)) as supervisor,
        Caller(triton.addresses.grpc) as caller,
    ):
        supervisor.load(read_generation(Repository(changed.root)), stop)
        watcher = threading.Thread(target=supervisor.watch, args=(stop, 0.05))
        watcher.start()
        try:
            wait_until(lambda: caller.ready() == wanted(first))
            second = changed.publish({"coming": HEBREW, "staying": SHORT})
            wait_until(lambda: caller.ready() == wanted(second))
            # Back by hand. The alias is still there: only those of tasks that are still current were written anew.
            changed.set_current(first)
            wait_until(lambda: caller.ready() == wanted(first))
        finally:
            stop.set()
            watcher.join()


# What it refuses before it starts


def lose_a_file(builder: RepositoryBuilder) -> str:
    ensemble = builder.read_manifest(1).tasks[0].ensemble
    (builder.root / ensemble / "labels.txt").unlink()
    return f"files: '{ensemble}/labels.txt': found No such file"


def break_an_ensemble(builder: RepositoryBuilder) -> str:
    ensemble = builder.read_manifest(1).tasks[0].ensemble
    builder.edit_config(1, ensemble, lambda config: config.ensemble_scheduling.step.pop())
    return f"{ensemble}/config.pbtxt: output 'logits': found no step that gives it"


def break_an_alias(builder: RepositoryBuilder) -> str:
    task = builder.read_manifest(1).tasks[0]
    config = builder.root / task.name / "config.pbtxt"
    config.write_text(config.read_text().replace(task.route[-1], "seg-000000000000"))
    return f"short/config.pbtxt: found another config, expected {task.ensemble} under the task's name"


def remove_labels_of_an_alias(builder: RepositoryBuilder) -> str:
    (builder.root / "short" / "labels.txt").unlink()
    return "short/config.pbtxt: found [Errno 2] No such file or directory"


def move_to_a_gpu(builder: RepositoryBuilder) -> str:
    def move(config: Any) -> None:
        config.instance_group[0].kind = model_config_pb2.ModelInstanceGroup.KIND_GPU

    segment = builder.read_manifest(1).segments[0].name
    builder.edit_config(1, segment, move)
    return f"{segment}/config.pbtxt: instance_group: found KIND_GPU, expected KIND_CPU"


@pytest.mark.parametrize("damage", [lose_a_file, break_an_ensemble, break_an_alias, remove_labels_of_an_alias, move_to_a_gpu])
def test_faults_are_named_before_triton_starts(tmp_path: pathlib.Path, damage: Callable[[RepositoryBuilder], str]) -> None:
    builder = RepositoryBuilder(tmp_path)
    builder.publish({"short": SHORT})
    expected = damage(builder)
    with pytest.raises(GenerationRefusedError, match=re.escape(f"generation 1 is refused: {expected}")):
        read_generation(Repository(tmp_path))


def test_a_broken_segment_ends_it_with_status_2(tmp_path: pathlib.Path) -> None:
    builder = RepositoryBuilder(tmp_path / "repository")
    expected = break_segment(builder, builder.publish({"short": SHORT}))
    log = tmp_path / "log"
    arguments = ("--environment", FOLDER, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log", log)
    result = server("triton", "run", "--repository", builder.root, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    said = result.stderr
    name = expected.split("'")[1]
    assert said.startswith(f"munet-server: generation 1 is refused: segment {name!r}: found ")
    assert "Protobuf parsing failed. (INVALID_ARGUMENT), expected a segment that Triton loads; export it again" in said


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command in this process, which starts in no time, and returns the words of its error."""
    # Its handlers would stay.
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(repository: pathlib.Path, *arguments: str | pathlib.Path) -> str:
        with pytest.raises(ServerError) as caught:
            app(["triton", "run", "--repository", str(repository), *map(str, arguments)], standalone_mode=False)
        return str(caught.value)

    return run


def test_no_environment_says_how_to_make_one(tmp_path: pathlib.Path, refuse: Callable[..., str]) -> None:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish({"short": SHORT})
    assert refuse(builder.root, "--environment", tmp_path / "nowhere") == (
        f"Triton's environment '{tmp_path}/nowhere': found no folder, expected the environment that Triton runs in; "
        "run `make triton` in the checkout, or `munet-server triton install`"
    )


@pytest.mark.parametrize("arguments", [(), ("--no-load",)])
def test_what_is_no_repository_is_refused(tmp_path: pathlib.Path, arguments: tuple[str, ...], refuse: Callable[..., str]) -> None:
    assert "found a folder without the file CURRENT, expected a published generation" in refuse(tmp_path, *arguments)


def test_what_is_no_address_is_refused(tmp_path: pathlib.Path, refuse: Callable[..., str]) -> None:
    assert refuse(tmp_path, "--http", "nowhere").startswith("--http: found 'nowhere', expected HOST:PORT")


# Shared memory


def test_too_little_shared_memory_is_said_before_it_starts_and_a_full_one_fails_only_who_needs_more() -> None:
    command = ["unshare", "--mount", sys.executable, "-m", "tests.server.triton.little_memory"]
    if os.geteuid():
        command[1:1] = ["--user", "--map-root-user"]
    result = subprocess.run(command, cwd=TOP, env=variables(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
